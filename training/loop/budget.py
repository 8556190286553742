"""Budget of a stage: a number of steps, or a number of minutes."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import DEFAULT_EPOCHS, FitHyperparameters


@dataclass(frozen=True)
class Budget:
    """Budget with one of two limits. Schedules follow `progress`, whichever it is."""

    max_steps: int | None = None
    max_seconds: float | None = None

    @classmethod
    def of(cls, settings: FitHyperparameters, num_batches: int) -> Budget:
        """Return the budget that the hyperparameters set; num_batches: batches in one epoch."""
        if settings.max_minutes is not None:
            return cls(max_seconds=60 * settings.max_minutes)
        if settings.max_steps is not None:
            return cls(max_steps=settings.max_steps)
        return cls(max_steps=(settings.epochs or DEFAULT_EPOCHS) * num_batches)

    @property
    def total(self) -> float:
        """The whole budget, in `unit`."""
        limit = self.max_seconds if self.max_steps is None else self.max_steps
        assert limit is not None, "a budget has one limit"
        return limit

    @property
    def unit(self) -> str:
        return "s" if self.max_steps is None else "step"

    def done(self, step: int, seconds: float) -> float:
        """Return the spent part after `step` steps and `seconds` seconds, in `unit`."""
        return seconds if self.max_steps is None else step

    def progress(self, step: int, seconds: float) -> float:
        """Return the spent share, in [0, 1]."""
        return min(1.0, self.done(step, seconds) / self.total)
