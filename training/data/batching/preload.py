"""Small data sets, decoded once and kept as one uint8 tensor.

Letters: M pairs, B images, H = W = image_size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle.errors import DataError
from dalle.preprocess.images import Pixels
from training.data.pairs import Dataset, View, image_or_skip
from training.stopping import NEVER, Stop, unless_stopped

MAX_PRELOADED_BYTES = 1 << 30
MAX_CHUNK_IMAGES = 256
MAX_CHUNK_PIXELS = 1 << 20  # 16 images of 256 x 256: 8 s of the base dVAE on one thread


class Preloaded(View):
    """Another data set's usable pairs, decoded; a `Dataset` itself.

    images: uint8 [M, 3, H, W]. Pairs whose image cannot be decoded are left out and counted in
    the skips of the source, which are shared.
    """

    def __init__(self, source: Dataset, stop: Stop = NEVER) -> None:
        """Decode everything. Raises `DataError` when too many images are unusable; Stopped."""
        size = source.image_size
        images = torch.empty((len(source), 3, size, size), dtype=torch.uint8)
        usable: list[int] = []
        numbers = tqdm(
            range(len(source)), f"decoding {source.channel}", unit="images", disable=None, delay=0.5
        )
        for index in unless_stopped(numbers, stop):
            pixels = image_or_skip(source, index)
            if pixels is not None:
                images[len(usable)] = to_chw(pixels)
                usable.append(index)
        if not usable:
            raise _no_image(source)
        source.skips.check_share(source.max_bad_share)
        self.images = images[: len(usable)]
        super().__init__(source, usable)

    def image(self, index: int) -> Pixels:
        """Return a copy, uint8 [H, W, 3]."""
        return np.ascontiguousarray(self.images[index].permute(1, 2, 0).numpy())


def preload_if_small(
    dataset: Dataset, max_bytes: int = MAX_PRELOADED_BYTES, stop: Stop = NEVER
) -> Dataset:
    """Decode a data set into memory when it `is_small`, else return it as it is.

    Raises what `Preloaded` raises.
    """
    return Preloaded(dataset, stop) if is_small(dataset, max_bytes) else dataset


def is_small(dataset: Dataset, max_bytes: int = MAX_PRELOADED_BYTES) -> bool:
    """Return whether all images fit into so many bytes as uint8."""
    return len(dataset) * 3 * dataset.image_size**2 <= max_bytes


def first_usable(dataset: Dataset, most: int, stop: Stop = NEVER) -> tuple[Tensor, list[str]]:
    """Return the first images that can be decoded, uint8 [B, 3, H, W], and a caption of each.

    Unusable ones are counted in the data set's skips. Raises `DataError` when there are no
    others; Stopped.
    """
    images: list[Tensor] = []
    captions: list[str] = []
    for index in unless_stopped(range(len(dataset)), stop):
        pixels = image_or_skip(dataset, index)
        if pixels is not None:
            images.append(to_chw(pixels))
            captions.append(dataset.captions(index)[0])
        if len(images) == most:
            break
    if not images:
        raise _no_image(dataset)
    return torch.stack(images), captions


def float_chunks(images: Tensor, device: torch.device, stop: Stop = NEVER) -> Iterator[Tensor]:
    """Convert uint8 images [M, 3, H, W] to float in [0, 1] on a device, a chunk at a time.

    Raises Stopped.
    """
    for chunk in unless_stopped(torch.split(images, images_per_chunk(images.shape[-1])), stop):
        yield chunk.to(device).float() / 255


def images_per_chunk(image_size: int) -> int:
    """Return how many images a model takes at once: few enough that a stop need not wait long."""
    return max(1, min(MAX_CHUNK_IMAGES, MAX_CHUNK_PIXELS // image_size**2))


def to_chw(pixels: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [3, H, W], sharing memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _no_image(dataset: Dataset) -> DataError:
    return DataError(
        f"{dataset.channel}: not one image could be decoded: {dataset.skips.describe()}"
    )
