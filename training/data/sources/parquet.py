"""Parquet files with images in a column: Hugging Face's data sets, img2dataset's output.

An image is a struct with `bytes` (and `path`), or a binary value. Captions are read when the
channel is opened. A row group can only be read from front to back: each one in use has a stream,
which goes on where it was, and the last images that were read are kept. So a channel whose images
do not fit into the cache is read group by group (`groups`), as shards in FastFile.
"""

from __future__ import annotations

import os
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dalle.errors import DataError
from training.data.skips import SkipReason, Skips, printable
from training.data.sources.captions import Captions, captions_of_value
from training.data.sources.columns import caption_column
from training.data.sources.files import File
from training.data.sources.index import IMAGE_SUFFIXES, Reader
from training.stopping import Stop, unless_stopped

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
STATUS_COLUMN = "status"  # img2dataset's; "success" where there is an image
CACHED_BYTES = 512 << 20
MAX_GROUP_BYTES = 2 << 30
MAX_TEXT_BYTES = 512 << 20  # of a row group's captions
MAX_ROWS_PER_BYTE = 16  # of a table: a run of equal values takes no bytes, whatever its length
_ROWS = 1024  # captions read at once
_IMAGES = 16  # images read at once: a dictionary may make them larger than the footer says
_STREAMS = 20  # open at once: the 16 that `Sampler` reads side by side, and some that are done
_BUFFER_BYTES = 1 << 20  # of each stream; without one, Arrow holds its whole row group
_NOT_UNICODE = "\udcff"  # what stands for a text that is not UTF-8


@dataclass(frozen=True, slots=True)
class ParquetImage(File):
    """An image in a Parquet file. name: `file.parquet/row`, with the suffix of its path if it has
    one. num_bytes: the mean of its row group, since sizes stand beside the bytes.
    """

    file: int
    group: int
    row: int
    """Within the group."""


class ImageColumn(NamedTuple):
    """Where the images' bytes are. is_struct: whether in a field `bytes` of the column."""

    name: str
    is_struct: bool

    @property
    def path(self) -> str:
        """The column of bytes as Parquet names it."""
        return f"{self.name}.bytes" if self.is_struct else self.name


class _Stream:
    """The images of a row group from front to back. number: of the batch that was read last."""

    def __init__(self, batches: Iterator[pa.Array]) -> None:
        self._batches = batches
        self.number = -1
        self.batch: pa.Array | None = None

    def read(self) -> pa.Array:
        """Return the next `_IMAGES` images; fewer at the end."""
        self.batch = next(self._batches)
        self.number += 1
        return self.batch


Group = tuple[int, int]
"""File, row group."""


@dataclass
class _Opened:
    """Open files and images of one process: neither survives a fork. batches: by group, number."""

    process: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    files: dict[int, pq.ParquetFile] = field(default_factory=dict)
    streams: OrderedDict[Group, _Stream] = field(default_factory=OrderedDict)
    batches: OrderedDict[tuple[Group, int], pa.Array] = field(default_factory=OrderedDict)
    num_bytes: int = 0  # of the batches

    def keep(self, key: tuple[Group, int], batch: pa.Array) -> None:
        """Keep a batch, and the newest others for which there is room."""
        if (replaced := self.batches.pop(key, None)) is not None:
            self.num_bytes -= replaced.nbytes
        self.batches[key] = batch
        self.num_bytes += batch.nbytes
        while self.num_bytes > CACHED_BYTES and len(self.batches) > 1:
            self.num_bytes -= self.batches.popitem(last=False)[1].nbytes


class ParquetReader(Reader[ParquetImage]):
    """The rows of a channel's Parquet files, by file name and row."""

    def __init__(self, root: Path, files: Iterable[File], caption_key: str | None) -> None:
        """caption_key: the captions' column; None finds it."""
        files = list(files)
        self._root = root
        self._files = sorted(
            (file for file in files if file.suffix == ".parquet"), key=lambda file: file.name
        )
        self._others = [file for file in files if file.suffix != ".parquet"]
        self._caption_key = caption_key
        self._column: ImageColumn | None = None  # the same in all files
        self._opened = _Opened(os.getpid())
        self.layout = f"{len(self._files):,} Parquet files"

    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[ParquetImage, Captions]]:
        for file in self._others:
            skips.add(SkipReason.IGNORED, file.name)
        for number, file in enumerate(self._files):
            where = f"{skips.channel}/{printable(file.name)}"
            try:
                yield from unless_stopped(self._rows(number, file, where, skips), stop)
            except (pa.ArrowException, OSError) as error:
                # How many pairs a file without a footer has nobody can tell.
                message = str(error).partition("\n")[0]
                detail = f"{file.name}: not a whole Parquet file ({message}); copy it again"
                skips.add(SkipReason.DAMAGED_SHARD, file.name, detail)

    def read(self, image: ParquetImage) -> bytes:
        opened = self._opened
        if opened.process != os.getpid():
            opened = self._opened = _Opened(os.getpid())
        number, row = divmod(image.row, _IMAGES)
        with opened.lock:
            value = self._batch(opened, (image.file, image.group), number)[row]
        if isinstance(value, pa.DictionaryScalar):
            value = value.value
        return value.as_py() or b"" if value.is_valid else b""

    def groups(self, images: Sequence[ParquetImage]) -> tuple[int, ...] | None:
        """Return the number of pairs of each row group, unless all images fit into the cache."""
        if sum(image.num_bytes for image in images) <= CACHED_BYTES:
            return None
        runs = groupby(images, key=lambda image: (image.file, image.group))
        return tuple(sum(1 for _ in run) for _, run in runs)

    def _rows(
        self, number: int, file: File, where: str, skips: Skips
    ) -> Iterator[tuple[ParquetImage, Captions]]:
        parquet = self._file(self._opened, number)
        schema = parquet.schema_arrow
        column = image_column(schema, where)
        if self._column not in (None, column):
            raise DataError(
                f"{where} has its images in {column.path}, the files before it in "
                f"{self._column.path}; all Parquet files of a channel need the same columns"
            )
        self._column = column
        texts = [column.name for column in schema if _is_text(column.type)]
        captions = caption_column(where, dict.fromkeys(texts, "text"), self._caption_key)
        has_path = column.is_struct and _has_field(schema.field(column.name).type, "path")
        wanted = [captions, *([f"{column.name}.path"] if has_path else [])]
        wanted += [STATUS_COLUMN] if STATUS_COLUMN in schema.names else []
        first_row = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            if not num_rows:
                continue
            num_bytes = _column_bytes(parquet, group, column.path)
            text_bytes = sum(_column_bytes(parquet, group, name) for name in texts)
            if num_rows > file.num_bytes:
                detail = f"{file.name}: row group {group} has {num_rows:,} rows in too few bytes"
                skips.add(SkipReason.GIANT_ROW, file.name, detail, count=num_rows)
                first_row += num_rows
                continue
            if num_bytes > MAX_GROUP_BYTES or text_bytes > MAX_TEXT_BYTES:
                detail = (
                    f"{file.name}: row group {group} has {num_bytes:,} bytes of images and "
                    f"{text_bytes:,} of text, over {MAX_GROUP_BYTES:,} or {MAX_TEXT_BYTES:,}; "
                    "write the file with smaller row groups"
                )
                skips.add(SkipReason.GIANT_ROW, file.name, detail, count=num_rows)
                first_row += num_rows
                continue
            size = max(1, num_bytes // num_rows)
            for index, row in enumerate(rows_of_file(parquet, [group], wanted)):
                place = f"{file.name}/{first_row + index:06}"
                if row.get(STATUS_COLUMN) not in (None, "success"):
                    detail = f"{place}: {STATUS_COLUMN} {row[STATUS_COLUMN]!r:.80}"
                    skips.add(SkipReason.NO_IMAGE, place, detail)
                    continue
                found = captions_of_value(row.get(captions), captions, place, skips)
                text_bytes = text_bytes + sum(map(len, found))
                if text_bytes > 2 * MAX_TEXT_BYTES:
                    detail = f"{file.name}: row group {group} has over {MAX_TEXT_BYTES:,} of text"
                    skips.add(SkipReason.GIANT_ROW, place, detail, count=num_rows - index)
                    break
                if found:
                    name = place + _suffix(row, column, has_path)
                    yield ParquetImage(name, size, number, group, index), found
            first_row += num_rows

    def _file(self, opened: _Opened, number: int) -> pq.ParquetFile:
        if number not in opened.files:
            path = self._root / self._files[number].name
            # Arrow's threads do not survive a fork, and workers are forked.
            opened.files[number] = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        return opened.files[number]

    def _batch(self, opened: _Opened, group: Group, number: int) -> pa.Array:
        """Return a batch of a row group, and keep it as long as there is room."""
        if (kept := opened.batches.get((group, number))) is not None:
            opened.batches.move_to_end((group, number))
            return kept
        stream = opened.streams.pop(group, None)
        if stream is None or stream.number > number:
            stream = _Stream(self._images(opened, group))
        opened.streams[group] = stream
        if len(opened.streams) > _STREAMS:
            opened.streams.popitem(last=False)
        try:
            while stream.number < number:
                opened.keep((group, stream.number + 1), stream.read())
        except (pa.ArrowException, OSError, StopIteration) as error:
            del opened.streams[group]
            if isinstance(error, OSError):
                raise
            message = str(error).partition("\n")[0] or "it has fewer rows than its footer says"
            raise OSError(None, message) from error
        # The stream has its last batch, though reading others may have driven it out.
        return stream.batch

    def _images(self, opened: _Opened, group: Group) -> Iterator[pa.Array]:
        """Yield the images of a row group in batches. Raises OSError, ArrowException."""
        assert self._column is not None, "a file has been listed"
        file, number = group
        for batch in self._file(opened, file).iter_batches(
            _IMAGES, [number], [self._column.path], use_threads=False
        ):
            column = batch.column(0)
            images = column.field("bytes") if self._column.is_struct else column
            if images.nbytes > MAX_GROUP_BYTES:
                limit = f"{MAX_GROUP_BYTES:,} bytes"
                raise pa.ArrowInvalid(f"{_IMAGES} images have more than {limit}")
            yield images


def has_images(path: Path) -> bool | None:
    """Whether a Parquet file has a column of image bytes; None when it cannot be read."""
    try:
        return bool(_image_columns(pq.read_schema(path)))
    except (pa.ArrowException, OSError):
        return None


def image_column(schema: pa.Schema, where: str) -> ImageColumn:
    """Return the column of the images. Raises DataError."""
    _check_names(schema, where)
    columns = _image_columns(schema)
    candidates = [column for column in columns if column.name.lower() in IMAGE_COLUMNS] or columns
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(column.path for column in candidates)
    found = f"several columns of bytes: {names}" if candidates else "no image column"
    raise DataError(f"{where} has {found}; one must be called {' or '.join(IMAGE_COLUMNS[:2])}")


def _check_names(schema: pa.Schema, where: str) -> None:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise DataError(f"{where} has several columns called {name!r:.80}; rename them")


def rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet table without images. Raises OSError."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            if parquet.metadata.num_rows > MAX_ROWS_PER_BYTE * path.stat().st_size:
                raise OSError(f"{parquet.metadata.num_rows:,} rows in too few bytes")
            names = parquet.schema_arrow.names
            _check_names(parquet.schema_arrow, path.name)
            num_bytes = 0
            for row in rows_of_file(parquet, range(parquet.num_row_groups), names):
                num_bytes += sum(len(cell) for cell in row.values() if isinstance(cell, str))
                if num_bytes > MAX_TEXT_BYTES:
                    raise OSError(f"more than {MAX_TEXT_BYTES:,} bytes of text")
                yield row
    except pa.ArrowException as error:
        raise OSError(str(error).partition("\n")[0]) from error


def rows_of_file(
    parquet: pq.ParquetFile, groups: Iterable[int], columns: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of some row groups, one at a time: a dictionary may make texts large."""
    for group in groups:
        rows = max(1, parquet.metadata.row_group(group).num_rows)
        texts = sum(_column_bytes(parquet, group, name) for name in columns)
        # One value may be as large as all are in the file, and be repeated in each row.
        size = min(_ROWS, max(1, MAX_TEXT_BYTES // max(1, texts)), rows)
        for batch in parquet.iter_batches(size, [group], list(columns), use_threads=False):
            for index in range(batch.num_rows):
                yield {
                    name: _value(batch.column(number)[index])
                    for number, name in enumerate(batch.schema.names)
                }


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return _NOT_UNICODE
    except (ValueError, OverflowError):  # a time that Python's datetime has no year for
        return None


def _image_columns(schema: pa.Schema) -> list[ImageColumn]:
    return [
        ImageColumn(column.name, is_struct)
        for column in schema
        if (is_struct := _has_field(column.type, "bytes")) or _is_binary(column.type)
    ]


def _has_field(kind: pa.DataType, name: str) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index(name) >= 0)


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts or lists of texts."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_binary(kind.value_type)
    return bool(
        pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _column_bytes(parquet: pq.ParquetFile, group: int, name: str) -> int:
    """Return the uncompressed bytes of a column, or of a field of one, in a row group.

    As the footer states them.
    """
    row_group = parquet.metadata.row_group(group)
    columns = (row_group.column(number) for number in range(row_group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if f"{column.path_in_schema}.".startswith(f"{name}.")
    )


def _suffix(row: Mapping[str, Any], column: ImageColumn, has_path: bool) -> str:
    """Return the image's suffix by its path, or by the name of its column; empty for neither."""
    image = row.get(column.name)
    path = image.get("path") if has_path and isinstance(image, dict) else None
    name = path if isinstance(path, str) else "" if has_path else f"image.{column.name}"
    suffix = posixpath.splitext(name)[1].lower()
    return suffix if suffix in IMAGE_SUFFIXES else ""
