"""What is around attention and feed-forward: norms, token shift, rotation, residual streams."""

from __future__ import annotations

from dataclasses import dataclass

from dalle.models.legacy.config import LegacyNormKind
from training.job.legacy.config.positions import rotary_angles
from training.job.legacy.saved.names import Layers
from training.job.legacy.saved.saved_model import SavedModel


@dataclass(frozen=True)
class Wrapping:
    """What is around attention and feed-forward, the same in all layers."""

    norm: LegacyNormKind
    sandwich_norm: bool
    token_shift: bool
    rotary_width: int
    """Channels of a head that positions turn; 0 for none."""
    reversible: bool


def wrapping_of(saved: SavedModel, layers: Layers) -> Wrapping:
    """Return what is around the branches, by names and shapes alone."""
    attention, feed_forward = layers.branches[0]
    rotary = rotary_angles(saved.weights)
    norm: LegacyNormKind = "layer"
    if "norm.gain" in attention.weights:
        norm = "length" if attention.weights["norm.gain"].numel() == 1 else "rms"
    # PreNorm, and LayerScale from 0.8.0 on, wrap every feed-forward; token shift wraps it further.
    plain = 2 if "scale" in feed_forward.weights else 1
    return Wrapping(
        norm=norm,
        sandwich_norm="norm_out.weight" in attention.weights,
        token_shift=feed_forward.num_wrappers > plain,
        rotary_width=0 if rotary is None else rotary.shape[-1],
        reversible=layers.is_reversible,
    )
