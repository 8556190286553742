"""The pairs in the stream of a channel in Pipe mode, in one of two formats:

- tar shards, one after another (S3Prefix or ManifestFile);
- RecordIO records (AugmentedManifestFile with RecordWrapperType RecordIO): one record for each of
  the AttributeNames of a sample, the image first, then captions.

The first bytes tell which. Knows nothing of where images are stored.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, pairwise
from typing import IO, cast

from dalle.errors import DataError
from dalle.platform.tar import TAR_ERRORS
from training.data.pipe.recordio import MAGIC_BYTES, Record, read_records
from training.data.pipe.stream import Stream
from training.data.skips import SkipReason, Skips
from training.data.sources.captions import (
    DEFAULT_CAPTION_KEY,
    MAX_CAPTION_BYTES,
    Captions,
    captions_of_attribute,
)
from training.data.sources.index import MAX_IMAGE_BYTES
from training.data.sources.tar import TarIndex, TarMember, read_member
from training.stopping import Stop

MAX_ATTRIBUTES = 16  # the platform's limit
NUM_PROBED_SAMPLES = 32  # from which the number of attributes is found
NOWHERE = -1  # offset of an image that is too large to be stored
USTAR_OFFSET = 257  # of "ustar" in a tar header

PairStream = Iterator[tuple[TarMember, Captions]]
Store = Callable[[bytes], int]
"""An image's bytes -> the offset at which they are stored."""


def read_pairs(
    stream: Stream, store: Store, caption_key: str | None, skips: Skips, stop: Stop
) -> PairStream:
    """Read the pairs of a stream, in its order; what is not a pair is counted in `skips`.

    caption_key: see `ShardReader`.
    Raises DataError, with the byte, for a stream in another format or an incomplete one; Stopped.
    """
    head = stream.read(tarfile.BLOCKSIZE)
    stream.seek(0)
    if head.startswith(MAGIC_BYTES):
        return _pairs_of_records(stream, store, caption_key or DEFAULT_CAPTION_KEY, skips)
    if _is_header(head) or not head.strip(b"\0"):
        return _pairs_of_shards(stream, store, caption_key, skips, stop)
    hint = "give tar shards, or an augmented manifest with RecordWrapperType RecordIO"
    if head.startswith(b"\x1f\x8b"):
        hint = "it is compressed: set the channel's CompressionType to Gzip"
    raise DataError(f"{stream.name}: no tar member begins at byte 0, but {head[:16]!r}; {hint}")


def _pairs_of_shards(
    stream: Stream, store: Store, caption_key: str | None, skips: Skips, stop: Stop
) -> PairStream:
    def store_member(info: tarfile.TarInfo, file: IO[bytes]) -> int:
        return store(read_member(info, file)) if info.size <= MAX_IMAGE_BYTES else NOWHERE

    number = 0
    while _skip_padding(stream):
        index = TarIndex(number, "", caption_key, skips, store_member)
        try:
            damage = index.read(cast(IO[bytes], stream), stop)
        except TAR_ERRORS as error:
            if stream.is_at_end:
                raise DataError(
                    f"{stream.name} ended at byte {stream.tell():,}, in the middle of a shard "
                    f"({error}): the channel is not complete"
                ) from error
            damage = f"is damaged before byte {stream.tell():,} ({error})"
        yield from index.pairs()
        number += 1
        if damage is not None:
            _seek_header(stream)
            detail = f"{stream.name} {damage}; going on at byte {stream.tell():,}"
            skips.add(SkipReason.DAMAGED_SHARD, f"byte {stream.tell():,}", detail)


def _skip_padding(stream: Stream) -> bool:
    """Skip the zeros at a shard's end; return whether anything follows them."""
    while block := stream.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            stream.seek(stream.tell() - len(block))
            return True
    return False


def _seek_header(stream: Stream) -> None:
    """Go forward to the next tar header, at whatever byte, or to the end."""
    while window := stream.read(2 * tarfile.BLOCKSIZE):
        begin = stream.tell() - len(window)
        for found in re.finditer(b"ustar", window):
            start = found.start() - USTAR_OFFSET
            if start >= 0 and _is_header(window[start:][: tarfile.BLOCKSIZE]):
                stream.seek(begin + start)
                return
        if len(window) == 2 * tarfile.BLOCKSIZE:
            stream.seek(begin + tarfile.BLOCKSIZE)


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _pairs_of_records(stream: Stream, store: Store, caption_key: str, skips: Skips) -> PairStream:
    records = read_records(stream)
    first, sample_size = _probe(records, stream)
    records, number = chain(first, records), 0
    while sample := list(islice(records, sample_size)):
        number += 1
        image, *attributes = sample
        name = f"sample {number} at byte {image.offset:,}"
        if len(sample) < sample_size:
            raise DataError(
                f"{stream.name} ended at byte {stream.tell():,}, in the middle of a sample of "
                f"{sample_size} attributes: the channel is not complete"
            )
        captions = _captions(attributes, caption_key, name, skips)
        if captions is None:
            skips.add(SkipReason.IMAGE_WITHOUT_CAPTION, name)
        elif not image.data:
            skips.add(SkipReason.EMPTY_IMAGE, name)
        elif captions:
            is_small = len(image.data) <= MAX_IMAGE_BYTES
            offset = store(image.data) if is_small else NOWHERE
            yield TarMember(name, len(image.data), 0, offset), captions


def _captions(
    attributes: Iterable[Record], caption_key: str, name: str, skips: Skips
) -> Captions | None:
    """Return the captions of a sample; None when no attribute holds captions."""
    captions: Captions | None = None
    for attribute in attributes:
        found: Captions | None = ()
        if len(attribute.data) > MAX_CAPTION_BYTES:
            skips.add(SkipReason.GIANT_CAPTION, name)
        else:
            found = captions_of_attribute(attribute.data, caption_key, name, skips)
        if found is not None:
            captions = (captions or ()) + found
    return captions


def _probe(records: Iterator[Record], stream: Stream) -> tuple[list[Record], int]:
    """Return the first records, and how many make up a sample, which the platform does not say.

    That is the least distance between two images, since some images may be damaged.
    Raises DataError when the records are not images followed by captions.
    """
    first: list[Record] = []
    images: list[int] = []
    for record in records:
        if _is_image(record.data):
            images.append(len(first))
        first.append(record)
        if len(images) > NUM_PROBED_SAMPLES or len(first) > NUM_PROBED_SAMPLES * MAX_ATTRIBUTES:
            break
    sample_size = min((b - a for a, b in pairwise(images)), default=len(first))
    if not images or sample_size < 2 or images[0] % sample_size:
        raise DataError(
            f"{stream.name}: the records must be an image (png, jpg or webp) and its captions, in "
            f"turns, but of the first {len(first)} these are images: "
            f"{', '.join(map(str, images[:8])) or 'none'} (from 0); set "
            "the channel's AttributeNames to the image's attribute and then the captions'"
        )
    return first, sample_size


def _is_image(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
