"""Detection of divergence: losses, gradient norms and weights that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.errors import DivergenceError
from dalle.types import StageName
from training.config.fields import FitHyperparameters


@dataclass(frozen=True)
class DivergenceCheck:
    """Checks of one stage. They raise DivergenceError naming the step and what to change."""

    stage: StageName
    settings: FitHyperparameters

    def check_losses(
        self, first_step: int, losses: Sequence[Tensor], gradient_norms: Mapping[int, Tensor]
    ) -> None:
        """Check the losses of consecutive steps, and gradient norms by step."""
        checked = [(step, "loss", loss) for step, loss in enumerate(losses, first_step)]
        checked += [(step, "gradient norm", norm) for step, norm in gradient_norms.items()]
        if not checked:
            return
        checked.sort(key=lambda each: each[0])  # stable: a loss comes before its gradient
        # One transfer from the device for all of them.
        wrong = torch.stack([value.float() for *_, value in checked]).isfinite().logical_not()
        if wrong.any():
            step, what, value = checked[int(wrong.nonzero()[0])]
            raise self._error(f"the {what} of stage {self.stage} is {value.item()}", step)

    def check_weights(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Check a model's state dict."""
        named = [(name, value) for name, value in state.items() if value.is_floating_point()]
        are_finite = torch.stack([value.isfinite().all() for _, value in named])
        if not are_finite.all():
            name, _ = named[int(are_finite.logical_not().nonzero()[0])]
            raise self._error(f"the weights {name} of stage {self.stage} are not finite", step)

    def _error(self, what: str, step: int) -> DivergenceError:
        return DivergenceError(
            f"{what} at step {step}; "
            f"try a smaller learning_rate (now {self.settings.learning_rate}), "
            f"more warmup_steps (now {self.settings.warmup_steps}) or "
            f"another precision (now {self.settings.precision})"
        )
