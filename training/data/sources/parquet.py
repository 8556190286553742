"""Parquet files with images in a column: Hugging Face's data sets, img2dataset's output.

An image is a struct with `bytes` (and `path`), or a binary value. Captions are read when the
channel is opened; of the images one row group at a time, and the last ones are kept. So a channel
whose images do not fit into the cache is read group by group (`groups`), as shards in FastFile.
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
from typing import Any

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
_ROWS = 1024  # captions read at once


@dataclass(frozen=True, slots=True)
class ParquetImage(File):
    """An image in a Parquet file. name: `file.parquet/row`, with the suffix of its path if it has
    one. num_bytes: the mean of its row group, since sizes stand beside the bytes.
    """

    file: int
    group: int
    row: int
    """Within the group."""


@dataclass
class _Opened:
    """Open files and row groups of one process: neither survives a fork."""

    process: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    files: dict[int, pq.ParquetFile] = field(default_factory=dict)
    groups: OrderedDict[tuple[int, int], pa.Array] = field(default_factory=OrderedDict)


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
        self._leaf = ""  # path of the images' bytes, the same in all files
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
        with opened.lock:
            images = self._group(opened, image.file, image.group)
        value = images[image.row]
        return bytes(value.as_buffer()) if value.is_valid else b""

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
        leaf = image_leaf(parquet.schema_arrow, where)
        if self._leaf not in ("", leaf):
            raise DataError(
                f"{where} has its images in {leaf}, the files before it in {self._leaf}; all "
                "Parquet files of a channel need the same columns"
            )
        self._leaf = leaf
        image_name = leaf.partition(".")[0]
        captions: str | None = None
        schema = parquet.schema_arrow
        texts = [column.name for column in schema if _is_text(column.type)]
        path = f"{image_name}.path" if _has_field(schema, image_name, "path") else ""
        first_row = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            num_bytes = _column_bytes(parquet, group, leaf)
            text_bytes = sum(_column_bytes(parquet, group, name) for name in texts)
            if num_bytes > MAX_GROUP_BYTES or text_bytes > MAX_TEXT_BYTES:
                detail = (
                    f"{file.name}: row group {group} has {num_bytes:,} bytes of images and "
                    f"{text_bytes:,} of text, over {MAX_GROUP_BYTES:,} or {MAX_TEXT_BYTES:,}; "
                    "write the file with smaller row groups"
                )
                skips.add(SkipReason.GIANT_ROW, file.name, detail, count=num_rows)
                first_row += num_rows
                continue
            if captions is None:
                row = next(rows_of_file(parquet, [group], texts), {})
                captions = caption_column(where, row, self._caption_key)
            wanted = [captions, *([path] if path else [])]
            wanted += [STATUS_COLUMN] if STATUS_COLUMN in schema.names else []
            size = num_bytes // max(1, num_rows)
            for index, row in enumerate(rows_of_file(parquet, [group], wanted)):
                place = f"{file.name}/{first_row + index:06}"
                if row.get(STATUS_COLUMN) not in (None, "success"):
                    detail = f"{place}: {STATUS_COLUMN} {row[STATUS_COLUMN]!r:.80}"
                    skips.add(SkipReason.NO_IMAGE, place, detail)
                    continue
                found = captions_of_value(row.get(captions), captions, place, skips)
                if found:
                    name = place + _suffix(row, image_name, image_name if not path else "path")
                    yield ParquetImage(name, size, number, group, index), found
            first_row += num_rows

    def _file(self, opened: _Opened, number: int) -> pq.ParquetFile:
        if number not in opened.files:
            path = self._root / self._files[number].name
            # Arrow's threads do not survive a fork, and workers are forked.
            opened.files[number] = pq.ParquetFile(path, pre_buffer=False)
        return opened.files[number]

    def _group(self, opened: _Opened, number: int, group: int) -> pa.Array:
        """Return the images of a row group, and keep them as long as there is room."""
        if (images := opened.groups.get((number, group))) is None:
            try:
                table = self._file(opened, number).read_row_group(
                    group, columns=[self._leaf], use_threads=False
                )
            except pa.ArrowException as error:
                raise OSError(None, str(error).partition("\n")[0]) from error
            column = table.column(0).combine_chunks()
            images = column.field("bytes") if pa.types.is_struct(column.type) else column
            opened.groups[number, group] = images
            while len(opened.groups) > 1 and _num_bytes(opened.groups) > CACHED_BYTES:
                opened.groups.popitem(last=False)
        opened.groups.move_to_end((number, group))
        return images


def has_images(path: Path) -> bool:
    """Whether a Parquet file has a column of image bytes; False for one that cannot be read."""
    try:
        return bool(_image_leaves(pq.read_schema(path)))
    except (pa.ArrowException, OSError):
        return False


def image_leaf(schema: pa.Schema, where: str) -> str:
    """Return the column, or column and field, of the images' bytes. Raises DataError."""
    leaves = _image_leaves(schema)
    usual = [leaf for leaf in leaves if leaf.partition(".")[0].lower() in IMAGE_COLUMNS]
    candidates = usual or leaves
    if len(candidates) == 1:
        return candidates[0]
    found = (
        f"several columns of bytes: {', '.join(candidates)}" if candidates else "no image column"
    )
    raise DataError(f"{where} has {found}; one must be called {' or '.join(IMAGE_COLUMNS[:2])}")


def rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet table without images. Raises OSError."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as parquet:
            yield from rows_of_file(
                parquet, range(parquet.num_row_groups), parquet.schema_arrow.names
            )
    except pa.ArrowException as error:
        raise OSError(str(error).partition("\n")[0]) from error


def rows_of_file(
    parquet: pq.ParquetFile, groups: Iterable[int], columns: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of some row groups, a few at a time."""
    batches = parquet.iter_batches(_ROWS, list(groups), list(columns), use_threads=False)
    for batch in batches:
        yield from batch.to_pylist()


def _image_leaves(schema: pa.Schema) -> list[str]:
    leaves = []
    for column in schema:
        if _is_binary(column.type):
            leaves.append(column.name)
        elif _has_field(schema, column.name, "bytes"):
            leaves.append(f"{column.name}.bytes")
    return leaves


def _has_field(schema: pa.Schema, column: str, name: str) -> bool:
    kind = schema.field(column).type
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
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
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


def _suffix(row: Mapping[str, Any], image: str, source: str) -> str:
    """Return the image's suffix by its path, or by the name of its column; empty for neither."""
    path = (row.get(image) or {}).get("path") if source == "path" else f"image.{image}"
    suffix = posixpath.splitext(path or "")[1].lower()
    return suffix if suffix in IMAGE_SUFFIXES else ""


def _num_bytes(groups: Mapping[Any, pa.Array]) -> int:
    return sum(images.nbytes for images in groups.values())
