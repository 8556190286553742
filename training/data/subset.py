"""A fixed random sample of a data set, itself a data set: what validation looks at each time."""

from __future__ import annotations

import numpy as np

from dalle.images import Pixels
from training.data.pairs import Dataset, Skips


class Subset:
    """At most `most` pairs of another data set, drawn without replacement by `seed`."""

    def __init__(self, source: Dataset, most: int, seed: int = 0) -> None:
        self._source = source
        chosen = np.random.default_rng(seed).permutation(len(source))[:most]
        self._indices = [int(index) for index in chosen]

    @property
    def channel(self) -> str:
        return self._source.channel

    @property
    def image_size(self) -> int:
        return self._source.image_size

    @property
    def fingerprint(self) -> str:
        """The source's."""
        return self._source.fingerprint

    @property
    def skips(self) -> Skips:
        return self._source.skips

    @property
    def max_bad_share(self) -> float:
        return self._source.max_bad_share

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(self._indices[index])

    def image(self, index: int) -> Pixels:
        return self._source.image(self._indices[index])
