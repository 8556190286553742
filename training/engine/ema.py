"""A running average of a model's weights, often better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def ema_decay_at(decay: float, step: int) -> float:
    """Share of the average that is kept after `step` steps, counted from 1.

    The first steps keep less, so that the average does not remember the initialisation.
    """
    return min(decay, (1 + step) / (10 + step))


class ModelEma:
    """Exponential average of the parameters; buffers stay the model's own.

    decay: in (0, 1), share of the average kept in one step, but for the first ones.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._average = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps, counted from 1."""
        weight = 1 - ema_decay_at(self._decay, step)
        torch._foreach_lerp_(self._average, list(model.parameters()), weight)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Make the average the model's weights for good."""
        torch._foreach_copy_(list(model.parameters()), self._average)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Let the model have the averaged weights for a while, then its own again."""
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
