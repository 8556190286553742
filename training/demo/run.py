"""The rainbow shapes trained and scored below one directory: what demo and bench have in common.

    recipe, a JSON file of flat hyperparameters -> data -> train -> evaluate

Imports torch only in `read`, so that a run that reuses everything does not wait for it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from dalle.errors import UserError
from dalle.platform.environment import Paths
from dalle.types import StageName
from training import rainbow
from training.config import hyperparameters
from training.demo.commands import run_train
from training.demo.steps import Step, digest_of_code, training_code

if TYPE_CHECKING:
    from dalle.artefact import Artefact
    from training.evaluate.ground_truth import GroundTruth

CHANNELS = ("train", "validation")
RECIPE = "rainbow_cpu.json"
RECIPE_MINUTES = 10.5  # of the whole demo on two quiet cores, with the budgets of the recipe

# Seconds on two quiet cores, for the estimate of the time left: of a step of the recipe, and of the
# other parts.
STEP_SECONDS: dict[StageName, float] = {"dvae": 0.11, "transformer": 0.23, "clip": 0.28}
SECONDS = {"data": 6.0, "start": 25.0, "serve": 25.0, "evaluate": 45.0, "report": 12.0}
"""start: of `train`, that is importing, encoding the data, writing artefact and report."""


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
        return artefact, read_ground_truth(self.data, artefact.require("dvae").config.image_size)


def read_recipe(path: Path | None, minutes: float) -> dict[str, str]:
    """Read a recipe; scale its training budgets so that the demo takes about `minutes` on two quiet
    cores.

    path: None for the default. Raises UserError or HyperparameterError.
    """
    recipe = read_recipe_file(path, RECIPE)
    others = sum(SECONDS.values())
    scale = (60 * minutes - others) / (60 * RECIPE_MINUTES - others)
    if minutes != RECIPE_MINUTES:
        for name in recipe:
            if name.endswith("max_minutes"):
                recipe[name] = f"{float(recipe[name]) * scale:.3g}"
            elif name.endswith("max_steps"):
                recipe[name] = str(max(1, round(float(recipe[name]) * scale)))
    return recipe


def read_recipe_file(path: Path | None, name: str) -> dict[str, str]:
    """Read and check a recipe; without a path, the one of that name in `training/recipes`."""
    file = resources.files("training") / "recipes" / name if path is None else path
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a recipe: {error}") from error
    recipe = {str(name): str(value) for name, value in content.items()}
    hyperparameters.parse(recipe)
    return recipe


def training_seconds(recipe: Mapping[str, str]) -> float:
    """Return the time of all stages' budgets together, as far as they are in steps or minutes."""
    settings = hyperparameters.parse(recipe)
    return sum(
        60 * (settings.of(name).max_minutes or 0) + seconds * (settings.of(name).max_steps or 0)
        for name, seconds in STEP_SECONDS.items()
    )
