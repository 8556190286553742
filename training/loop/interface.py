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
class FitResult:
    """End of a stage's training.

    step, seconds, cpu_seconds: in all, those before an interruption included; the times are of
    this process. is_finished: the budget is spent and the last validation done; False after a
    stop. validation: the last numbers of `validate`.
    """

    step: int
    seconds: float
    cpu_seconds: float
    is_finished: bool
    validation: dict[str, float]
