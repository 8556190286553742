"""Interface between the training loop and a stage: its batches, model, loss and validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from dalle.types import StageName


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


class Stage(Protocol):
    """A model to train: what the loop needs of the dVAE, the transformer and CLIP."""

    @property
    def name(self) -> StageName: ...

    @property
    def model(self) -> nn.Module:
        """The model, on the engine's device or where the engine moves it from.

        An optional method `muon_parameters()` returns its hidden matrices.
        """
        ...

    @property
    def batches(self) -> Batches: ...

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the scalar to minimise, and detached scalars to report.

        progress: share of the budget done, in [0, 1). Runs inside the engine's autocast with the
        model in training mode. The loop reports the first scalar as `loss`, and means over ranks.
        """
        ...

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
