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
from training.data.pairs import Dataset, SkipReason
from training.data.subset import View

MAX_DECODED_BYTES = 1 << 30


class InMemory(View):
    """Another data set's usable pairs, decoded; a `Dataset` itself.

    images: uint8 [M, 3, H, W]. Pairs whose image cannot be decoded are left out and counted in
    the skips of the data set they come from, which are shared.
    """

    def __init__(self, source: Dataset) -> None:
        """Decode everything. Raises `DataError` when too many images are unusable."""
        size = source.image_size
        self.images = torch.empty((len(source), 3, size, size), dtype=torch.uint8)
        kept: list[int] = []
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
            self.images[len(kept)] = to_planes(pixels)
            kept.append(index)
        if not kept:
            raise _no_image(source)
        source.skips.check_share(source.skips.num_good, source.max_bad_share)
        self.images = self.images[: len(kept)]
        super().__init__(source, kept)

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


def first_usable(dataset: Dataset, most: int) -> tuple[Tensor, list[str]]:
    """The first pairs whose image can be decoded: images uint8 [B, 3, H, W], a caption of each.

    Unusable ones are counted in the data set's skips. Raises `DataError` when there are no others.
    """
    images: list[Tensor] = []
    captions: list[str] = []
    for index in range(len(dataset)):
        try:
            images.append(to_planes(dataset.image(index)))
        except ImageError as error:
            dataset.skips.add_damaged(SkipReason.of(error), dataset.name(index), str(error))
            continue
        captions.append(dataset.captions(index)[0])
        if len(images) == most:
            break
    if not images:
        raise _no_image(dataset)
    return torch.stack(images), captions


def to_planes(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, H, W], sharing memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _no_image(dataset: Dataset) -> DataError:
    return DataError(
        f"{dataset.channel}: not one image could be decoded: {dataset.skips.describe()}"
    )
