"""The pairs in the stream of a channel in Pipe mode. Two kinds are told apart by their first bytes:

- tar shards, one after another (S3Prefix or ManifestFile);
- RecordIO records (AugmentedManifestFile with RecordWrapperType RecordIO): of each sample one
  record for each of the AttributeNames, the image first, then captions.

Knows nothing of what becomes of an image.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import IO, cast

from dalle.errors import DataError
from training.data.pairs import SkipReason, Skips
from training.data.pipe.recordio import MAGIC_BYTES, Record, records
from training.data.pipe.stream import Stream
from training.data.sources.captions import (
    DEFAULT_CAPTION_KEY,
    MAX_CAPTION_BYTES,
    Captions,
    captions_of_attribute,
)
from training.data.sources.index import MAX_IMAGE_BYTES
from training.data.sources.tar import DAMAGES, Member, PairIndex, content_of
from training.stopping import Stop

MAX_ATTRIBUTES = 16  # the platform's limit
FRAMED_FROM = 32  # samples by which the number of attributes is told
NOWHERE = -1  # where an image is that is too large to be used
HEADER_MAGIC_PLACE = 257  # of "ustar" in a tar header

Found = Iterator[tuple[Member, Captions]]
Keep = Callable[[bytes], int]


def pairs_of(
    stream: Stream, keep: Keep, caption_key: str | None, skips: Skips, stop: Stop
) -> Found:
    """The pairs of a stream, in the order in which they come; what is none is counted.

    keep: takes an image's bytes and says where they are. caption_key: see `shards_of`.
    Raises DataError, with the byte, for a stream that is of neither kind or not complete; Stopped.
    """
    head = stream.read(tarfile.BLOCKSIZE)
    stream.seek(0)
    if head.startswith(MAGIC_BYTES):
        return _pairs_of_records(stream, keep, caption_key or DEFAULT_CAPTION_KEY, skips)
    if _is_header(head) or not head.strip(b"\0"):
        return _pairs_of_shards(stream, keep, caption_key, skips, stop)
    hint = "give tar shards, or an augmented manifest with RecordWrapperType RecordIO"
    if head.startswith(b"\x1f\x8b"):
        hint = "it is compressed: set the channel's CompressionType to Gzip"
    raise DataError(f"{stream.name}: no tar member begins at byte 0, but {head[:16]!r}; {hint}")


def _pairs_of_shards(
    stream: Stream, keep: Keep, caption_key: str | None, skips: Skips, stop: Stop
) -> Found:
    def keep_member(info: tarfile.TarInfo, file: IO[bytes]) -> int:
        return keep(content_of(info, file)) if info.size <= MAX_IMAGE_BYTES else NOWHERE

    number = 0
    while _to_next_shard(stream):
        index = PairIndex(number, "", caption_key, skips, keep_member)
        try:
            damage = index.read(cast(IO[bytes], stream), stop)
        except DAMAGES as error:
            if stream.is_at_end:
                raise DataError(
                    f"{stream.name} ended at byte {stream.tell():,}, in the midst of a shard "
                    f"({error}): the channel is not complete"
                ) from error
            damage = f"is damaged before byte {stream.tell():,} ({error})"
        yield from index.pairs()
        number += 1
        if damage is not None:
            _to_next_header(stream)
            detail = f"{stream.name} {damage}; going on at byte {stream.tell():,}"
            skips.add(SkipReason.DAMAGED_SHARD, f"byte {stream.tell():,}", detail)


def _to_next_shard(stream: Stream) -> bool:
    """Pass the zeros at a shard's end; whether there is anything behind them."""
    while block := stream.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            stream.seek(stream.tell() - len(block))
            return True
    return False


def _to_next_header(stream: Stream) -> None:
    """Go forward to where a tar header stands, at whatever byte, or to the end."""
    while window := stream.read(2 * tarfile.BLOCKSIZE):
        begin = stream.tell() - len(window)
        for found in re.finditer(b"ustar", window):
            place = found.start() - HEADER_MAGIC_PLACE
            if place >= 0 and _is_header(window[place:][: tarfile.BLOCKSIZE]):
                stream.seek(begin + place)
                return
        if len(window) == 2 * tarfile.BLOCKSIZE:
            stream.seek(begin + tarfile.BLOCKSIZE)


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _pairs_of_records(stream: Stream, keep: Keep, caption_key: str, skips: Skips) -> Found:
    found = records(stream)
    first, num_records = _framed(found, stream)
    samples = _batched(chain(first, found), num_records)
    for number, (image, *attributes) in enumerate(samples, 1):
        name = f"sample {number} at byte {image.offset:,}"
        if len(attributes) < num_records - 1:
            raise DataError(
                f"{stream.name} ended at byte {stream.tell():,}, in the midst of a sample of "
                f"{num_records} attributes: the channel is not complete"
            )
        captions = _captions(attributes, caption_key, name, skips)
        if captions is None:
            skips.add(SkipReason.IMAGE_WITHOUT_CAPTION, name)
        elif not image.data:
            skips.add(SkipReason.EMPTY_IMAGE, name)
        elif captions:
            is_small = len(image.data) <= MAX_IMAGE_BYTES
            offset = keep(image.data) if is_small else NOWHERE
            yield Member(name, len(image.data), 0, offset), captions


def _captions(
    attributes: Iterable[Record], caption_key: str, name: str, skips: Skips
) -> Captions | None:
    """Those of a sample; None when no attribute is a caption's."""
    captions: Captions | None = None
    for attribute in attributes:
        if len(attribute.data) > MAX_CAPTION_BYTES:
            skips.add(SkipReason.GIANT_CAPTION, name)
            found: Captions | None = ()
        else:
            found = captions_of_attribute(attribute.data, caption_key, name, skips)
        if found is not None:
            captions = (captions or ()) + found
    return captions


def _framed(found: Iterator[Record], stream: Stream) -> tuple[list[Record], int]:
    """The first records, and how many make up a sample: nobody tells the container.

    That is the least distance between two images, which may be damaged, among the first ones.
    Raises DataError when these are no images followed by captions.
    """
    first: list[Record] = []
    places: list[int] = []
    for record in found:
        if _looks_like_an_image(record.data):
            places.append(len(first))
        first.append(record)
        if len(places) > FRAMED_FROM or len(first) > FRAMED_FROM * MAX_ATTRIBUTES:
            break
    distances = [later - place for place, later in zip(places, places[1:], strict=False)]
    num_records = min(distances, default=len(first))
    if not places or num_records < 2 or places[0] % num_records:
        raise DataError(
            f"{stream.name}: the records must be an image (png, jpg or webp) and its captions, in "
            f"turns, but of the first {len(first)} these are images: "
            f"{', '.join(str(place) for place in places[:8]) or 'none'} (from 0); set "
            "the channel's AttributeNames to the image's attribute and then the captions'"
        )
    return first, num_records


def _looks_like_an_image(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


def _batched(items: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while batch := list(islice(items, size)):
        yield batch
