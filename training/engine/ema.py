"""Exponential moving average of a model's weights, often better than those of any one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def ema_decay_at(decay: float, step: int) -> float:
    """Return the share of the average that step `step`, counted from 1, keeps.

    The first steps keep less, so that the average forgets the initial weights.
    """
    return min(decay, (1 + step) / (10 + step))


class ModelEma:
    """Average of the parameters; buffers are not averaged.

    decay: in (0, 1), the share of the average that a step keeps, except for the first steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._average = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after `step` steps, counted from 1."""
        weight = 1 - ema_decay_at(self._decay, step)
        torch._foreach_lerp_(self._average, list(model.parameters()), weight)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average."""
        torch._foreach_copy_(list(model.parameters()), self._average)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights within the context."""
        own = [parameter.detach().clone() for parameter in model.parameters()]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), own)

    def state(self) -> list[Tensor]:
        return self._average

    @torch.no_grad()
    def load_state(self, state: Sequence[Tensor]) -> None:
        for average, saved in zip(self._average, state, strict=True):
            average.copy_(saved)
