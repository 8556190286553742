"""RecordIO, the format in which SageMaker streams an augmented manifest.

Each part of a record is a magic number, a word with its kind (whole, first, middle, last) and its
length, its bytes, and zeros up to a multiple of four (MXNet's dmlc-core, `recordio.h`). A record
that contains the magic number is written in several parts, split at it and without it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dalle.errors import DataError
from training.data.pipe.stream import Stream

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_RECORD_BYTES = 512 << 20
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)


@dataclass(frozen=True)
class Record:
    """offset: of its magic number in the stream."""

    offset: int
    data: bytes


def read_records(stream: Stream) -> Iterator[Record]:
    """Read all records of a stream. Raises DataError, with the offset, where there is none."""
    parts: list[bytes] = []
    begin = 0
    while True:
        offset = stream.tell()
        header = stream.read(8)
        if not header and not parts:
            return
        if len(header) < 8:
            raise _cut_off(stream)
        magic, word = struct.unpack("<II", header)
        kind, length = word >> 29, word & ((1 << 29) - 1)
        if magic != MAGIC:
            raise DataError(
                f"{stream.name}: no RecordIO record begins at byte {offset:,}: found "
                f"{header[:4]!r}, not {MAGIC_BYTES!r}"
            )
        if (kind in (_WHOLE, _FIRST)) == bool(parts) or kind > _LAST:
            raise DataError(f"{stream.name}: a RecordIO record is out of order at byte {offset:,}")
        data = stream.read(length + -length % 4)
        if len(data) < length + -length % 4:
            raise _cut_off(stream)
        if not parts:
            begin = offset
        parts.append(data[:length])
        if sum(map(len, parts)) > MAX_RECORD_BYTES:
            raise DataError(
                f"{stream.name}: the record at byte {begin:,} has more than "
                f"{MAX_RECORD_BYTES:,} bytes; one image, or one caption, is expected"
            )
        if kind in (_WHOLE, _LAST):
            yield Record(begin, MAGIC_BYTES.join(parts))
            parts = []


def _cut_off(stream: Stream) -> DataError:
    return DataError(
        f"{stream.name} ended at byte {stream.tell():,}, in the middle of a record: the channel is "
        "not complete"
    )
