"""Any channel as WebDataset tar shards, in an order that depends on the seed alone.

A shard of 50 to 150 MB is quick to fetch from S3 and quick to read; thousands of small files are
neither. Image files are copied as they are, unless they are to be shrunk: photographs of a camera's
size slow a job down. The same input gives the same bytes: members have no times or owners.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle.errors import UserError
from dalle.platform.disk import replacing
from dalle.preprocess.images import ImageError, decode_image, image_format
from training.data.batching.sampler import Sampler
from training.data.skips import SkipReason, printable
from training.data.sources.index import IMAGE_SUFFIXES, Pairs

BLOCK = tarfile.BLOCKSIZE
MAX_PIXELS_TO_SHRINK = 100_000_000  # as decoded; 400 MB as RGBA


@dataclass(frozen=True)
class Written:
    """What was written. num_bytes: of all shards together."""

    num_shards: int
    num_pairs: int
    num_captions: int
    num_bytes: int


def write_shards(
    dataset: Pairs,
    out: Path,
    *,
    megabytes: float,
    seed: int = 0,
    shrink_to: int | None = None,
) -> Written:
    """Write shards of about `megabytes` (of 10**6 bytes) into a new or empty directory.

    shrink_to: pixels of the shorter side; larger images are encoded again at that size, as JPEG
        (quality 95) if they were JPEG, else as PNG. Shards then are smaller than `megabytes`.
    An image file that cannot be read, or is too large, is left out and counted in the data set's
    skips. Raises UserError for a directory that is not empty; DataError when more than the data
    set's `max_bad_share` are left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new directory")
    order = Sampler(num_pairs=len(dataset), batch_size=1, seed=seed).permutation(0)
    sizes = np.asarray([_tar_bytes(dataset, index) for index in order.tolist()])
    ends = np.cumsum(sizes)
    num_shards = max(1, round(float(ends[-1]) / (megabytes * 1e6)))
    # A pair goes where its middle lies, so that shards differ by less than a pair.
    shard_of = ((ends - sizes / 2) * num_shards // ends[-1]).astype(int)
    bar = tqdm(total=len(dataset), desc=f"writing {out}", unit="pairs", disable=None, delay=0.5)
    num_pairs = num_captions = num_bytes = 0
    for number in range(num_shards):
        path = out / f"shard-{number:06}.tar"
        with (
            replacing(path) as temporary,
            tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for index in order[shard_of == number].tolist():
                bar.update()
                try:
                    suffix, image = _image(dataset, index, shrink_to)
                except ImageError as error:
                    reason = SkipReason.of(error)
                    dataset.skips.add_damaged(reason, dataset.name(index), str(error))
                    dataset.skips.check_share(dataset.max_bad_share)
                    continue
                key = key_of(dataset.name(index))
                add_member(archive, key + suffix, image)
                add_member(archive, f"{key}.txt", _text(dataset, index))
                num_pairs += 1
                num_captions += len(dataset.captions(index))
        num_bytes += path.stat().st_size
    bar.close()
    return Written(num_shards, num_pairs, num_captions, num_bytes)


def key_of(name: str) -> str:
    """Return a pair's name without its suffix as a key: unique, with no dot in its last part.

    >>> key_of("a.b/IMG_0.5.jpg")
    'a.b/IMG_0%2E5'
    """
    folder, base = posixpath.split(posixpath.splitext(name)[0])
    return posixpath.join(folder, base.replace("%", "%25").replace(".", "%2E"))


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file without times or owners."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _tar_bytes(dataset: Pairs, index: int) -> int:
    """Return what a pair takes in a shard, unless its name needs a header of its own."""
    parts = (dataset.num_bytes(index), len(_text(dataset, index)))
    return sum(BLOCK + -(-num_bytes // BLOCK) * BLOCK for num_bytes in parts)


def _text(dataset: Pairs, index: int) -> bytes:
    return "".join(f"{caption}\n" for caption in dataset.captions(index)).encode()


def _image(dataset: Pairs, index: int, shrink_to: int | None) -> tuple[str, bytes]:
    """Return suffix and bytes of an image file. Raises `ImageError`."""
    name, data = dataset.name(index), dataset.image_bytes(index)
    suffix = posixpath.splitext(name)[1].lower()
    if suffix not in IMAGE_SUFFIXES:  # rows of Parquet files need no names
        what = f"{dataset.channel}/{printable(name)}"
        suffix = f".{image_format(data, what=what)}"
        if suffix not in IMAGE_SUFFIXES:
            suffix, data = ".png", _png(decode_image(data, what=what))
    if shrink_to is None:
        return suffix, data
    image = decode_image(
        data,
        what=f"{dataset.channel}/{printable(name)}",
        min_side=2 * shrink_to,  # a JPEG is decoded at no less than twice the side it gets
        max_pixels=MAX_PIXELS_TO_SHRINK,
    )
    scale = shrink_to / min(image.size)
    if scale >= 1:
        return suffix, data
    width, height = (max(shrink_to, round(scale * side)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if suffix in (".jpg", ".jpeg"):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)
        return suffix, file.getvalue()
    return ".png", _png(image)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
