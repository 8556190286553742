"""Nearest picture of a set, and how often a generated one is another caption's training picture.

Letters: Q queries, P pictures, S image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.data.batching.preload import Preloaded, first_usable
from training.data.pairs import Dataset
from training.stopping import NEVER, Stop, Stopped

CHUNK_BYTES = 64 << 20  # of pictures as float64 at once
MOST_BYTES = 1 << 30  # of pictures that a report compares with, as float64
MOST_DECODED = 2_000  # of them where they are not in memory


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


class TrainingPictures:
    """Pictures of the training pairs that a report compares with, and their captions.

    All of a small data set; of one that is not in memory the first `MOST_DECODED`.
    """

    def __init__(self, pairs: Dataset, stop: Stop = NEVER) -> None:
        """Raises DataError when not one picture can be decoded; Stopped."""
        most = max(1, MOST_BYTES // (8 * 3 * pairs.image_size**2))
        if isinstance(pairs, Preloaded):
            self.images = pairs.images[:most]
            self._captions = [pairs.captions(index) for index in range(len(self.images))]
        else:
            self.images, captions = first_usable(pairs, min(most, MOST_DECODED), stop)
            self._captions = [(caption,) for caption in captions]

    def __len__(self) -> int:
        """Return P."""
        return len(self.images)

    def captions(self, number: int) -> Sequence[str]:
        """Return the captions of a picture."""
        return self._captions[number]

    def nearest(self, images: Tensor, stop: Stop = NEVER) -> tuple[Tensor, Tensor]:
        """As the function `nearest`, for images uint8 [Q, 3, S, S] of these pictures' size."""
        return nearest(images, len(self), lambda numbers: self.images[list(numbers)], stop)

    def memorised_share(
        self, images: Tensor, actuals: Tensor, captions: Sequence[str], stop: Stop = NEVER
    ) -> float:
        """Return the share of images that are rather another caption's training picture.

        images: uint8 [Q, 3, S, S], generated for the captions, whose real pictures are `actuals`.
        One counts when its nearest training picture has another caption, and is nearer than its
        real picture. Q at least 1. Raises Stopped.
        """
        numbers, distances = self.nearest(images, stop)
        off = (images.double() - actuals.double()).square().flatten(1).sum(dim=1)
        nearer: list[bool] = (distances < off).tolist()
        counts = [
            is_nearer and caption not in self.captions(number)
            for number, is_nearer, caption in zip(numbers.tolist(), nearer, captions, strict=True)
        ]
        return sum(counts) / len(counts)
