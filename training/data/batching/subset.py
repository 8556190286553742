"""Some pairs of another data set, themselves a data set.

`Subset` is a fixed random sample: what validation looks at each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dalle.preprocess.images import Pixels
from training.data.pairs import Dataset, Skips


class View:
    """The pairs `indices` of another data set, in that order.

    fingerprint, skips and max_bad_share are the source's: they speak of the channel as a whole.
    """

    def __init__(self, source: Dataset, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = indices

    @property
    def channel(self) -> str:
        return self._source.channel

    @property
    def image_size(self) -> int:
        return self._source.image_size

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    @property
    def skips(self) -> Skips:
        return self._source.skips

    @property
    def max_bad_share(self) -> float:
        return self._source.max_bad_share

    @property
    def groups(self) -> tuple[int, ...] | None:
        return None  # it is at hand, or too small to matter

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(self._indices[index])

    def image(self, index: int) -> Pixels:
        return self._source.image(self._indices[index])


class Subset(View):
    """At most `most` pairs of another data set, drawn without replacement by `seed`."""

    def __init__(self, source: Dataset, most: int, seed: int = 0) -> None:
        chosen = np.random.default_rng(seed).permutation(len(source))[:most]
        super().__init__(source, [int(index) for index in chosen])
