"""Some pairs of another data set, themselves a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dalle.preprocess.images import Pixels
from training.data.pairs import Dataset


class View:
    """The pairs `indices` of another data set, in that order.

    fingerprint, skips and max_bad_share are the source's: they are those of the whole channel.
    """

    groups = None  # pairs are in memory, or too few to matter

    def __init__(self, source: Dataset, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = indices
        self.channel = source.channel
        self.image_size = source.image_size
        self.fingerprint = source.fingerprint
        self.skips = source.skips
        self.max_bad_share = source.max_bad_share

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(self._indices[index])

    def image(self, index: int) -> Pixels:
        return self._source.image(self._indices[index])


class Subset(View):
    """A fixed random sample of at most `most` pairs, for validation."""

    def __init__(self, source: Dataset, most: int, seed: int = 0) -> None:
        chosen = np.random.default_rng(seed).permutation(len(source))[:most]
        super().__init__(source, [int(index) for index in chosen])
