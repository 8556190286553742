"""Weights of the fixtures of open_clip, the same on every machine; the files do not hold them."""

import math
from collections.abc import Mapping, Sequence

import torch

from tests.training.job.pretrained.published.seeded_weights import seeded_weights


def open_clip_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return name -> tensor float32. The logits are cosines times 10, so that no caption wins."""
    weights = seeded_weights(shapes)
    for name, value in weights.items():
        if value.ndim == 2:
            value *= 0.2
        elif name == "logit_scale":
            value.fill_(math.log(10))
    return weights
