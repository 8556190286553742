"""The picture of a set that is nearest to another one, pixel by pixel.

Letters: Q queries, P pictures, S image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.stopping import NEVER, Stop, Stopped

CHUNK_BYTES = 64 << 20  # of pictures as float64 at once


def nearest(
    queries: Tensor,
    num_pictures: int,
    pictures: Callable[[Sequence[int]], Tensor],
    stop: Stop = NEVER,
) -> tuple[Tensor, Tensor]:
    """Return the picture that is nearest to each query in L2 over all pixels; of equals the first.

    queries: uint8 [Q, 3, S, S]. pictures: numbers -> uint8 [., 3, S, S], asked once for each of
    `num_pictures`, at least one. Returns their numbers [Q] int64, and the squared distances [Q]
    float64, exact: sums of whole numbers. Raises Stopped.
    """
    size = max(1, CHUNK_BYTES // (8 * 3 * queries.shape[-1] ** 2))
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    numbers = torch.full((len(queries),), -1)
    norms = queries.flatten(1).double().square().sum(dim=1)
    for first in range(0, num_pictures, size):
        if stop.is_set():
            raise Stopped
        rows = pictures(range(first, min(first + size, num_pictures))).flatten(1).double()
        row_norms = rows.square().sum(dim=1)
        for start in range(0, len(queries), size):
            here = slice(start, start + size)
            products = queries[here].flatten(1).double() @ rows.T
            distance, row = (row_norms - 2 * products).min(dim=1)
            distance += norms[here]
            nearer = distance < best[here]
            numbers[here] = torch.where(nearer, row + first, numbers[here])
            best[here] = torch.where(nearer, distance, best[here])
    return numbers, best
