"""The interface of a data set of image-caption pairs, views of one, totals and fingerprint.

A pair is an image with one or more captions. Batches, reports and evaluation use `Dataset` only.
Knows nothing of where pairs come from.

Letters: M pairs in a data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dalle.preprocess.images import ImageError, Pixels
from training.data.skips import SkipReason, Skips


class Dataset(Protocol):
    """M image-caption pairs, by number; the same number is always the same pair.

    channel: the name that messages use. image_size: side of the square images, in pixels.
    fingerprint: 64 hexadecimal digits, see `fingerprint`. skips: what was left out so far.
    max_bad_share: 0 to 1, how many pairs may turn out to be bad before a `DataError` is raised.
    groups: see `Sampler`; None where pairs are equally quick to read in any order.
    """

    channel: str
    image_size: int
    fingerprint: str
    skips: Skips
    max_bad_share: float

    @property
    def groups(self) -> tuple[int, ...] | None: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the pair's name for messages, such as a file's path within the channel."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the pair's captions, at least one, none of them empty."""
        ...

    def image(self, index: int) -> Pixels:
        """Return the pair's image, uint8 [image_size, image_size, 3]. Raises `ImageError`."""
        ...


def image_or_skip(dataset: Dataset, index: int) -> Pixels | None:
    """Return the pair's image, or None and count it as damaged when it cannot be decoded."""
    try:
        return dataset.image(index)
    except ImageError as error:
        dataset.skips.add_damaged(SkipReason.of(error), dataset.name(index), str(error))
        return None


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


@dataclass(frozen=True)
class Totals:
    """Size and fingerprint of a data set, or of all hosts' parts of one together.

    num_pairs: usable ones, as far as is known.
    """

    num_pairs: int
    num_captions: int
    fingerprint: str

    @classmethod
    def of(cls, dataset: Dataset) -> Totals:
        """Count one data set."""
        num_captions = sum(len(dataset.captions(index)) for index in range(len(dataset)))
        return cls(len(dataset), num_captions, dataset.fingerprint)


def fingerprint(pairs: Iterable[tuple[str, int, tuple[str, ...]]]) -> str:
    """Identify a data set cheaply by the (name, number of image bytes, captions) of its pairs.

    It is the sum of their sha256 modulo 2**256, so that the fingerprints of parts add up to that of
    the whole, see `add_fingerprints`. Image contents are not read: an image replaced by another of
    exactly the same length in bytes is not noticed. Order, folder, times and owners do not matter.
    """
    total = 0
    for name, num_bytes, captions in pairs:
        digest = hashlib.sha256()
        # Lengths first, so that no two different pairs join to the same text.
        for text in (name, str(num_bytes), *captions):
            encoded = text.encode("utf-8", "surrogateescape")
            digest.update(b"%d:" % len(encoded) + encoded)
        total += int.from_bytes(digest.digest())
    return _hexadecimal(total)


def add_fingerprints(fingerprints: Iterable[str]) -> str:
    """Return the fingerprint of a data set from those of its parts, in any order."""
    return _hexadecimal(sum(int(part, 16) for part in fingerprints))


def _hexadecimal(total: int) -> str:
    return f"{total % (1 << 256):064x}"
