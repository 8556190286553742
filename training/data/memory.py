"""Small data sets, decoded once and kept as one uint8 tensor.

Letters: M pairs, H = W = image_size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle.errors import DataError
from dalle.images import ImageError, Pixels
from training.data.pairs import Dataset, SkipReason, Skips

MAX_DECODED_BYTES = 1 << 30


class InMemory:
    """Another data set's usable pairs, decoded; a `Dataset` itself.

    images: uint8 [M, 3, H, W]. Pairs whose image cannot be decoded are left out and counted in
    the skips of the data set they come from, which are shared.
    """

    def __init__(self, source: Dataset) -> None:
        """Decode everything. Raises `DataError` when too many images are unusable."""
        size = source.image_size
        self.images = torch.empty((len(source), 3, size, size), dtype=torch.uint8)
        self._kept: list[int] = []
        self._source = source
        # A bar only on a terminal, and only where there is something to wait for.
        numbers = tqdm(
            range(len(source)), f"decoding {source.channel}", unit="images", disable=None, delay=0.5
        )
        for index in numbers:
            try:
                pixels = source.image(index)
            except ImageError as error:
                source.skips.add_damaged(SkipReason.of(error), source.name(index), str(error))
                continue
            self.images[len(self._kept)] = to_planes(pixels)
            self._kept.append(index)
        if not self._kept:
            raise DataError(
                f"{source.channel}: not one image could be decoded: {source.skips.describe()}"
            )
        source.skips.check_share(len(self._kept), source.max_bad_share)
        self.images = self.images[: len(self._kept)]

    @property
    def channel(self) -> str:
        return self._source.channel

    @property
    def image_size(self) -> int:
        return self._source.image_size

    @property
    def fingerprint(self) -> str:
        """The source's: of the pairs as they were found, before any was decoded."""
        return self._source.fingerprint

    @property
    def skips(self) -> Skips:
        return self._source.skips

    @property
    def max_bad_share(self) -> float:
        return self._source.max_bad_share

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, index: int) -> str:
        return self._source.name(self._kept[index])

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(self._kept[index])

    def image(self, index: int) -> Pixels:
        """uint8 [H, W, 3], a copy."""
        return np.ascontiguousarray(self.images[index].permute(1, 2, 0).numpy())


def decode_if_small(dataset: Dataset, max_decoded_bytes: int = MAX_DECODED_BYTES) -> Dataset:
    """Decode a data set into memory when its images fit into `max_decoded_bytes` as uint8.

    One that is decoded already, or that is larger, is returned as it is.
    """
    num_bytes = len(dataset) * 3 * dataset.image_size**2
    if isinstance(dataset, InMemory) or num_bytes > max_decoded_bytes:
        return dataset
    return InMemory(dataset)


def to_planes(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, H, W], sharing memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)
