"""The rainbow shapes trained and scored below one directory: what demo and bench have in common.

    data -> train -> evaluate

Imports torch only in `read`, so that a run that reuses everything does not wait for it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dalle.platform.environment import Paths
from training import rainbow
from training.demo.commands import run_train
from training.demo.steps import Step, digest_of_code, training_code

if TYPE_CHECKING:
    from dalle.artefact import Artefact
    from training.evaluate.ground_truth import GroundTruth

CHANNELS = ("train", "validation")


@dataclass(frozen=True)
class RainbowRun:
    """One directory: `data/`, and `ml/` as SageMaker lays out /opt/ml.

    recipe: hyperparameters. seed: chooses the training captions, and is the seed of the training
    unless the recipe sets one.
    """

    out: Path
    recipe: Mapping[str, str]
    seed: int = 0

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def root(self) -> Path:
        return self.out / "ml"

    @property
    def manifest(self) -> Path:
        """Return the artefact's manifest, which the training writes last."""
        return Paths(self.root).model / "manifest.json"

    def data_step(self, title: str, seconds: float) -> Step:
        """Write the folders and `attributes.json`."""
        return Step(
            name="data",
            title=title,
            seconds=seconds,
            key=self.seed,
            inputs=[Path(rainbow.__file__)],
            outputs=[self.data / name for name in CHANNELS],
            action=self.write_data,
        )

    def train_step(self, title: str, seconds: float) -> Step:
        """Train all three models by `train`."""
        return Step(
            name="train",
            title=title,
            seconds=seconds,
            key=[self.seed, dict(self.recipe), digest_of_code(training_code())],
            inputs=[Path(rainbow.__file__)],
            outputs=[self.manifest],
            action=self.train,
        )

    def write_data(self, _is_continued: bool) -> None:
        unfinished = self.out / "data.unfinished"
        for directory in (unfinished, self.data):
            shutil.rmtree(directory, ignore_errors=True)
        rainbow.write_folder(unfinished, self.seed)
        os.replace(unfinished, self.data)

    def train(self, is_continued: bool) -> None:
        """Train anew, or resume from the checkpoints of a run of the same recipe."""
        if not is_continued:
            shutil.rmtree(self.root, ignore_errors=True)
        file = Paths(self.root).hyperparameters
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = {"seed": str(self.seed), **self.recipe}
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        run_train(self.root, {name: self.data / name for name in CHANNELS})

    def read(self) -> tuple[Artefact, GroundTruth]:
        """Load the artefact onto the device that `train` used, and read the real images."""
        from dalle import artefact as artefacts
        from training.engine.devices import choose_device
        from training.evaluate.ground_truth import read_ground_truth

        device = choose_device(os.environ.get("DALLE_DEVICE", "auto"))
        artefact = artefacts.load(Paths(self.root).model, device)
        image_size = artefact.require("dvae").config.image_size
        return artefact, read_ground_truth(self.data, image_size)
