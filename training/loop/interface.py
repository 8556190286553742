"""Interface between the training loop and a stage: its batches, model, loss and validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dalle.types import StageName
from training.engine.interface import Trainable


class Batches(Protocol):
    """Batches of one rank; their order depends only on the seed and the step."""

    @property
    def num_per_epoch(self) -> int:
        """Number of batches in one pass over the pairs, at least 1."""
        ...

    def batch(self, step: int) -> Any:
        """Return the batch of one step, counted from 0 over all epochs, for `Stage.loss`.

        With gradient_accumulation_steps it has `micro_batches`.
        """
        ...

    def close(self) -> None:
        """Stop loading the batches of later steps."""
        ...


class Stage(Trainable, Protocol):
    """A model to train: what the loop needs of the dVAE, the transformer and CLIP."""

    @property
    def name(self) -> StageName: ...

    @property
    def batches(self) -> Batches: ...

    def validate(self) -> Mapping[str, float]:
        """Return numbers to report, with `validation_loss`; empty without validation pairs.

        Runs in evaluation mode without gradients, on every rank, with the averaged weights if
        there are any. It may use random numbers without an effect on training. Raises Stopped
        after a stop.
        """
        ...

    def identity(self) -> Mapping[str, Any]:
        """Return plain values besides the hyperparameters that decide what is computed.

        The model's config, the data's fingerprint, the hashes of frozen models. A checkpoint with
        other values is refused.
        """
        ...


@dataclass(frozen=True)
class Validation:
    """Numbers of `Stage.validate` after a step, which is part of an epoch."""

    step: int
    epoch: float
    numbers: dict[str, float]

    def loss(self, stage: StageName) -> float:
        """Return the number that decides which weights of a stage are best: the lowest.

        The transformer's captions are learned by heart long before its images, and what it is
        for is the images.
        """
        loss = self.numbers["validation_loss"]
        return self.numbers.get("validation_image_loss", loss) if stage == "transformer" else loss


@dataclass(frozen=True)
class FitResult:
    """End of a stage's training.

    step, seconds, cpu_seconds: in all, those before an interruption included; the times are of
    this process. is_finished: the budget is spent and the last validation done; False after a
    stop. kept_step: the one whose weights the model has. best, newest: of all validations, None
    without any.
    """

    step: int
    seconds: float
    cpu_seconds: float
    is_finished: bool
    kept_step: int
    best: Validation | None = None
    newest: Validation | None = None

    @property
    def validation(self) -> dict[str, float]:
        """The last validation's numbers of the weights that the model has, or had before."""
        is_best = self.best is not None and self.best.step == self.kept_step
        chosen = self.best if is_best else self.newest
        return {} if chosen is None else chosen.numbers
