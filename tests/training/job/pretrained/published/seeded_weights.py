"""Random weights that are the same on every machine, so that fixtures need not hold them."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def seeded_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return name -> tensor float32. numpy promises the stream of RandomState for ever."""
    return {name: _seeded(name, tuple(shape)) for name, shape in shapes.items()}


def _seeded(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if len(shape) == 4:  # keeps the variance of features through ReLU, whatever the width
        values *= np.sqrt(6 / np.prod(shape[1:]))
    elif len(shape) == 1:
        values = 0.2 * values + (1 if name.endswith("weight") else 0)  # gains of norms; biases
    if name == "decoder.conv_out.weight":
        values *= 0.25  # no pixel is clipped, and rounding on other machines stays below 1e-5
    return torch.from_numpy(values.astype(np.float32))
