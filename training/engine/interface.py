"""Interfaces: of an engine for the training loop, and of a stage for an engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Trainable(Protocol):
    """Model and loss of a stage."""

    @property
    def model(self) -> nn.Module:
        """The model, on the engine's device or where the engine moves it from.

        An optional method `muon_parameters()` returns its hidden matrices.
        """
        ...

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the scalar to minimise, and detached scalars to report.

        progress: share of the budget done, in [0, 1). Runs inside the engine's autocast with the
        model in training mode. The loop reports the first scalar as `loss`, and means over ranks.
        """
        ...


class Engine(Protocol):
    """Backward pass and weight updates of one stage.

    The engine holds the weights, the optimizer's state and the EMA from `begin` to `finish`; in
    between the stage's model is complete only within `whole_model`. Every rank must make the same
    calls in the same order, because they may exchange data.
    """

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        ...

    def begin(self, state: dict[str, Any] | None) -> None:
        """Start from a `state()` of a checkpoint, or with None from the model as it is.

        state: the first rank's; ignored on the others. Its tensors may be changed.
        """
        ...

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the stage's loss and scalars for this rank's share of a batch.

        Or for one of its gradient_accumulation_steps micro-batches, one after another.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss: the mean over micro-batches and all ranks."""
        ...

    def step(self, step: int, progress: float) -> float:
        """Update the weights, clear the gradients, return the schedule's share in [0, 1]."""
        ...

    @property
    def gradient_norm(self) -> Tensor | None:
        """Norm of the last step's gradient before clipping, a scalar.

        None when clipping is off or the step was skipped.
        """
        ...

    def whole_model(self) -> AbstractContextManager[None]:
        """Give the stage's model, within the context, all weights that would be saved now.

        On every rank; the averaged ones when ema_decay is set. Leaving waits for no other rank.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the state for `begin`: plain values and tensors; `model` is a state dict.

        Complete on the first rank only, and the same for any number of ranks.
        """
        ...

    def finish(self) -> None:
        """Put the weights to be saved into the stage's model, equal on every rank."""
        ...
