"""How often a generated picture is rather the training picture of another caption.

Letters: Q queries, P pictures, S image size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from training.data.batching.nearest import nearest
from training.data.batching.preload import Preloaded, first_usable
from training.data.pairs import Dataset
from training.stopping import NEVER, Stop

MOST_BYTES = 1 << 30  # of pictures that a report compares with, as float64
MOST_DECODED = 2_000  # of them where they are not in memory


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
