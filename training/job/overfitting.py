"""Words for a stage that overfits: its validation loss rose while it was trained on."""

from __future__ import annotations

from dalle.models.configs import TransformerConfig
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.types import StageName
from training.config.models import Config
from training.loop.interface import FitResult

RISE = 0.02
"""Share of the lowest validation loss by which a later one may be higher for other reasons."""
LEAST_DROPOUT, MOST_DROPOUT = 0.2, 0.5


def overfitting(stage: StageName, result: FitResult, config: Config) -> str:
    """Return a sentence on when the validation loss rose, and what would help; empty if it did not.

    config: of the stage's model.
    """
    best, newest = result.best, result.newest
    if best is None or newest is None:
        return ""
    lowest, now = best.loss(stage), newest.loss(stage)
    if now <= lowest + RISE * abs(lowest):
        return ""
    kept = f"the weights of step {result.kept_step:,} are kept"
    if result.kept_step == result.step:
        kept += "; keep=best would keep those of the lowest loss"
    return (
        f"{stage} overfits: its validation loss rose after step {best.step:,} (epoch "
        f"{best.epoch:.3g}), from {lowest:.4g} to {now:.4g} at step {newest.step:,}; {kept}. What "
        f"helps: more pictures, or {_remedy(stage, best.step, config)}"
    )


def _remedy(stage: StageName, best_step: int, config: Config) -> str:
    if isinstance(config, TransformerConfig | LegacyTransformerConfig):
        dropout = min(MOST_DROPOUT, max(LEAST_DROPOUT, 2 * config.dropout))
        if dropout > config.dropout:
            return f"dropout={dropout:.2g} (it was {config.dropout:.2g})"
    return f"{stage}_max_steps={best_step}"
