"""Weights of a stage's best validation, in files beside its checkpoints.

    best.save(400, weights)       # a validation was better than all before it
    best.keep_for([300, 500])     # steps of the checkpoints; other files are removed
    best.load(400)

A checkpoint names the best step so far, so that a resumed run keeps what an uninterrupted one
keeps. There are at most as many files as checkpoints, and one more. Knows nothing of losses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dalle.platform.disk import disk_errors, replacing
from training.loop.checkpoints import read_content, reading, write_content

logger = logging.getLogger(__name__)

NAME = re.compile(r"best-(\d{9})\.pt")


@dataclass(frozen=True)
class BestWeights:
    """The files of one stage in the directory of its checkpoints."""

    directory: Path

    def save(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Write a model's state dict after `step` steps.

        Raises DiskFullError, or PlatformError for other trouble with the disk; earlier files are
        untouched then.
        """
        path = self._path(step)
        with (
            disk_errors(
                f"write the best weights {path}",
                if_full="the checkpoints are kept. Give the job a larger volume, or set keep=last",
                directory=self.directory,
                num_bytes=sum(each.nbytes for each in weights.values()),
            ),
            replacing(path, is_durable=True) as temporary,
        ):
            write_content(temporary, {"step": step, "weights": dict(weights)})

    def load(self, step: int) -> dict[str, Tensor] | None:
        """Return the state dict of a step, on the CPU; None where it is missing or damaged.

        Raises PlatformError for other trouble with the disk.
        """
        path = self._path(step)
        with reading(path):
            content = read_content(path, with_tensors=False) if path.is_file() else None
        if content is None or content.keys() != {"step", "weights"}:
            return None
        weights: dict[str, Tensor] = content["weights"]
        return weights

    def remove_after(self, step: int) -> None:
        """Remove the weights of later steps, which the run that goes on from `step` makes anew."""
        for each in self._steps():
            if each > step:
                self._path(each).unlink(missing_ok=True)

    def keep_for(self, checkpoint_steps: Collection[int]) -> None:
        """Remove all but the newest weights, and the newest that each checkpoint knows of."""
        steps = self._steps()
        ends = [*checkpoint_steps, max(steps, default=0)]
        needed = {max((each for each in steps if each <= end), default=0) for end in ends}
        for each in steps:
            if each not in needed:
                self._path(each).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.directory / f"best-{step:09d}.pt"

    def _steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        found = (NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return [int(each[1]) for each in found if each]
