"""How fast images come out of tar shards and of other layouts, on one core.

They are read, decoded, cropped square and shrunk. Measured in CPU time of this process, so that
other load on the machine matters little. The loader adds some milliseconds a batch, for passing it
between processes.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.sources.channel import open_channel
from training.data.tools.sharding import add_member

SIZES = ((256, 256), (341, 256), (500, 375), (1024, 768))
"""Those of `shard --shrink-to 256` (square, 4:3), of CUB, and of a small camera."""

ROUNDS = 5  # of all layouts in turn, so that a busy machine is busy for all of them
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


def compare_layouts(image_size: int, seconds: float) -> dict[str, float]:
    """Load the smallest of `SIZES` out of each layout, for about so much CPU time each.

    Returns images a CPU second, as a share of those out of tar shards.
    """
    images = {f"{n:03}": _photograph(*SIZES[0], n) for n in range(NUM_IMAGES)}
    spent = dict.fromkeys(LAYOUTS, 0.0)
    counts = dict.fromkeys(LAYOUTS, 0)
    with tempfile.TemporaryDirectory() as parent:
        datasets = {}
        for layout, write in LAYOUTS.items():
            folder = Path(parent) / layout
            folder.mkdir()
            write(folder, images)
            datasets[layout] = open_channel(folder, image_size=image_size)
            for index in range(NUM_IMAGES):  # warm-up
                datasets[layout].image(index)
        for _ in range(ROUNDS):
            for layout, dataset in datasets.items():
                begin = time.process_time()
                while (now := time.process_time() - begin) < seconds / ROUNDS:
                    dataset.image(counts[layout] % NUM_IMAGES)
                    counts[layout] += 1
                spent[layout] += now
    speeds = {layout: counts[layout] / spent[layout] for layout in LAYOUTS}
    return {layout: speed / speeds["tar shards"] for layout, speed in speeds.items()}


def _write_shards(folder: Path, images: Mapping[str, bytes]) -> None:
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for name, image in images.items():
            add_member(archive, f"{name}.jpg", image)
            add_member(archive, f"{name}.txt", b"noise")


def _write_text_files(folder: Path, images: Mapping[str, bytes]) -> None:
    for name, image in images.items():
        (folder / f"{name}.jpg").write_bytes(image)
        (folder / f"{name}.txt").write_text("noise")


def _write_parquet(folder: Path, images: Mapping[str, bytes]) -> None:
    import pyarrow as pa  # half a second
    import pyarrow.parquet as pq

    column = [{"bytes": image, "path": f"{name}.jpg"} for name, image in images.items()]
    table = pa.table({"image": column, "text": ["noise"] * len(column)})
    pq.write_table(table, folder / "images.parquet")


def _write_table(folder: Path, images: Mapping[str, bytes]) -> None:
    rows = [json.dumps({"file_name": f"{name}.jpg", "text": "noise"}) for name in images]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    for name, image in images.items():
        (folder / f"{name}.jpg").write_bytes(image)


LAYOUTS: Mapping[str, Callable[[Path, Mapping[str, bytes]], None]] = {
    "tar shards": _write_shards,
    "text files": _write_text_files,
    "Parquet": _write_parquet,
    "metadata table": _write_table,
}


def _measure(width: int, height: int, image_size: int, seconds: float) -> LoadingSpeed:
    with tempfile.TemporaryDirectory() as folder:
        images = {f"{n:03}": _photograph(width, height, n) for n in range(NUM_IMAGES)}
        num_bytes = sum(map(len, images.values()))
        _write_shards(Path(folder), images)
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
