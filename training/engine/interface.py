"""What the training loop needs of an engine, and an engine of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Trainable(Protocol):
    """What an engine needs of a stage."""

    @property
    def model(self) -> nn.Module: ...

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]: ...


class Engine(Protocol):
    """What the training loop needs to turn a stage's loss into better weights.

    It has the weights, the optimiser's state and the running average from `begin` to `finish`;
    in between the stage's own model is whole within `whole_model` only. Every rank makes the same
    calls in the same order, for they may exchange what is shared out among them.
    """

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        ...

    def begin(self, state: dict[str, Any] | None) -> None:
        """Start with what a checkpoint holds of `state()`, or with the model as it is.

        state: the first rank's; what the others give is ignored. Its tensors may be changed.
        """
        ...

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The stage's loss of this rank's share of a batch, and what it reports beside it.

        Likewise of a part of it: of gradient_accumulation_steps equal ones, one after another.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss: the mean over a step's parts and all ranks."""
        ...

    def step(self, step: int, progress: float) -> float:
        """Update the weights, forget the gradients, return the schedule's share in [0, 1]."""
        ...

    @property
    def gradient_norm(self) -> Tensor | None:
        """Scalar: the norm of the gradient that the last step used, before clipping.

        None when nothing was clipped or the step was left out.
        """
        ...

    def whole_model(self) -> AbstractContextManager[None]:
        """Let the stage's model have all the weights that would be saved now, on every rank.

        Those are the averaged ones when ema_decay is set. No rank waits for another on leaving.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Everything to begin with again: plain values and tensors, `model` among them.

        `model` is the model's state dict. Whole on the first rank, and the same for any number of
        ranks; the others' is not to be used.
        """
        ...

    def finish(self) -> None:
        """Put the weights that are to be saved into the stage's model, equal on every rank."""
        ...
