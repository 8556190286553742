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
    last = name.rpartition(".")[2]
    if len(shape) == 1:  # gains of norms, and biases
        values = 0.2 * values + (0 if last == "bias" else 1)
    elif len(shape) == 2 and "emb" not in name:  # keeps the variance of what it multiplies
        values *= (3 / shape[1]) ** 0.5
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
