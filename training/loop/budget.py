"""Budget of a stage: a number of steps, or a number of minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.config.fields import DEFAULT_EPOCHS, FitHyperparameters


@dataclass(frozen=True)
class Budget:
    """Steps or seconds to train for. Schedules follow `progress`, whichever it is."""

    total: float
    unit: Literal["step", "s"]

    @classmethod
    def of(cls, settings: FitHyperparameters, num_batches: int) -> Budget:
        """Return the budget that the hyperparameters set; num_batches: batches in one epoch."""
        if settings.max_minutes is not None:
            return cls(60 * settings.max_minutes, "s")
        epochs = settings.epochs or DEFAULT_EPOCHS
        return cls(settings.max_steps or epochs * num_batches, "step")

    def done(self, step: int, seconds: float) -> float:
        """Return the spent part after `step` steps and `seconds` seconds, in `unit`."""
        return step if self.unit == "step" else seconds

    def progress(self, step: int, seconds: float) -> float:
        """Return the spent share, in [0, 1]."""
        return min(1.0, self.done(step, seconds) / self.total)

    def seconds_left(self, step: int, seconds: float) -> float:
        """Estimate the seconds that are left, from the mean of all steps; `step` is at least 1."""
        left = max(0.0, self.total - self.done(step, seconds))
        return left if self.unit == "s" else left * seconds / step
