"""Small data sets, decoded once and kept as one uint8 tensor.

Letters: M pairs, H = W = image_size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle.errors import DataError
from dalle.preprocess.images import ImageError, Pixels
from training.data.batching.subset import View
from training.data.pairs import Dataset, SkipReason
from training.stopping import NEVER, Stop, unless_stopped

MAX_DECODED_BYTES = 1 << 30
MAX_CHUNK_IMAGES = 256
MAX_CHUNK_PIXELS = 1 << 20  # 16 images of 256 x 256: 8 s of the base dVAE on one thread


class InMemory(View):
    """Another data set's usable pairs, decoded; a `Dataset` itself.

    images: uint8 [M, 3, H, W]. Pairs whose image cannot be decoded are left out and counted in
    the skips of the data set they come from, which are shared.
    """

    def __init__(self, source: Dataset, stop: Stop = NEVER) -> None:
        """Decode everything. Raises `DataError` when too many images are unusable; Stopped."""
        size = source.image_size
        self.images = torch.empty((len(source), 3, size, size), dtype=torch.uint8)
        kept: list[int] = []
        # A bar only on a terminal, and only where there is something to wait for.
        numbers = tqdm(
            range(len(source)), f"decoding {source.channel}", unit="images", disable=None, delay=0.5
        )
        for index in unless_stopped(numbers, stop):
            try:
                pixels = source.image(index)
            except ImageError as error:
                source.skips.add_damaged(SkipReason.of(error), source.name(index), str(error))
                continue
            self.images[len(kept)] = to_planes(pixels)
            kept.append(index)
        if not kept:
            raise _no_image(source)
        source.skips.check_share(source.max_bad_share)
        self.images = self.images[: len(kept)]
        super().__init__(source, kept)

    def image(self, index: int) -> Pixels:
        """uint8 [H, W, 3], a copy."""
        return np.ascontiguousarray(self.images[index].permute(1, 2, 0).numpy())


def decode_if_small(
    dataset: Dataset, max_decoded_bytes: int = MAX_DECODED_BYTES, stop: Stop = NEVER
) -> Dataset:
    """Decode a data set into memory when its images fit into `max_decoded_bytes` as uint8.

    A larger one is returned as it is. Raises what `InMemory` does.
    """
    return InMemory(dataset, stop) if is_small(dataset, max_decoded_bytes) else dataset


def is_small(dataset: Dataset, max_decoded_bytes: int = MAX_DECODED_BYTES) -> bool:
    """Whether all images fit into so many bytes as uint8."""
    return len(dataset) * 3 * dataset.image_size**2 <= max_decoded_bytes


def first_usable(dataset: Dataset, most: int, stop: Stop = NEVER) -> tuple[Tensor, list[str]]:
    """The first pairs whose image can be decoded: images uint8 [B, 3, H, W], a caption of each.

    Unusable ones are counted in the data set's skips. Raises `DataError` when there are no
    others; Stopped.
    """
    images: list[Tensor] = []
    captions: list[str] = []
    for index in unless_stopped(range(len(dataset)), stop):
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


def float_chunks(images: Tensor, device: torch.device, stop: Stop = NEVER) -> Iterator[Tensor]:
    """Images uint8 [M, 3, H, W] as float in [0, 1] on a device, some at a time. Raises Stopped."""
    for chunk in unless_stopped(torch.split(images, images_together(images.shape[-1])), stop):
        yield chunk.to(device).float() / 255


def images_together(image_size: int) -> int:
    """How many images to give to a model at once: so few that a stop need not wait long."""
    return max(1, min(MAX_CHUNK_IMAGES, MAX_CHUNK_PIXELS // image_size**2))


def to_planes(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, H, W], sharing memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _no_image(dataset: Dataset) -> DataError:
    return DataError(
        f"{dataset.channel}: not one image could be decoded: {dataset.skips.describe()}"
    )
