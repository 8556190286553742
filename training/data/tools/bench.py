"""How fast images come out of shards: read, decoded, cropped square and shrunk, on one core.

Measured in CPU time of this process, so that other load on the machine matters little. The loader
adds some milliseconds a batch, for passing it between processes.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.sources.channel import open_channel
from training.data.tools.sharding import add_member

SIZES = ((256, 256), (341, 256), (500, 375), (1024, 768))
"""Those of `shard --shrink-to 256` (square, 4:3), of CUB, and of a small camera."""

NUM_IMAGES = 24  # different ones of each size
DETAIL = ((8, 60), (32, 30), (128, 14), (512, 8))
"""Cells across an image and their contrast: about as many bytes as photographs of birds have."""


@dataclass(frozen=True)
class LoadingSpeed:
    """Of JPEG images of one size. image_megabytes: of a file, on average, of 10**6 bytes."""

    width: int
    height: int
    image_megabytes: float
    num_images: int
    images_per_cpu_second: float


def measure(image_size: int, seconds: float) -> list[LoadingSpeed]:
    """Load images of each of `SIZES` as squares of `image_size`, for so much CPU time each."""
    return [_measure(width, height, image_size, seconds) for width, height in SIZES]


def _measure(width: int, height: int, image_size: int, seconds: float) -> LoadingSpeed:
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = 0
        with tarfile.open(Path(folder) / "shard.tar", "w") as archive:
            for number in range(NUM_IMAGES):
                image = _photograph(width, height, number)
                num_bytes += len(image)
                add_member(archive, f"{number:03}.jpg", image)
                add_member(archive, f"{number:03}.txt", b"noise")
        dataset = open_channel(Path(folder), image_size=image_size)
        for index in range(len(dataset)):  # warm-up
            dataset.image(index)
        count = 0
        begin = time.process_time()
        while (spent := time.process_time() - begin) < seconds:
            dataset.image(count % len(dataset))
            count += 1
    return LoadingSpeed(width, height, num_bytes / NUM_IMAGES / 1e6, count, count / spent)


def _photograph(width: int, height: int, seed: int) -> bytes:
    """Return a JPEG of smooth noise at several scales."""
    generator = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for cells, contrast in DETAIL:
        noise = generator.integers(0, 256, (max(1, cells * height // width), cells, 3))
        layer = Image.fromarray(noise.astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        pixels += (np.asarray(layer, dtype=np.float32) - 128) * (contrast / 60)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format="JPEG", quality=90)
    return file.getvalue()
