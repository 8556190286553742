"""Tables that name images and their captions: metadata.jsonl or metadata.csv beside images, lists.

    metadata.jsonl, .csv, .tsv or .parquet     one in any folder, for the images below that folder
    NAME.csv, .tsv, .jsonl or .lst             the only one of a channel without metadata files

A path is relative to the table's folder or to the channel. It is looked up among the channel's
files, so that none leads outside; an address is never fetched. Several rows of one image, and a
list in a cell, are several captions.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from dalle.errors import DataError
from training.data.skips import SkipReason, Skips, printable
from training.data.sources.captions import Captions, captions_of_value
from training.data.sources.columns import Columns
from training.data.sources.files import File
from training.data.sources.index import IMAGE_SUFFIXES, Reader, unicode_key
from training.stopping import Stop, unless_stopped

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".lst")
MAX_ROW_BYTES = 1 << 20
PROBED_ROWS = 32  # by which the columns are found

Row = Mapping[str, Any]


class Line(NamedTuple):
    """One row of a table. number: of its (last) line, from 1."""

    number: int
    row: Row


class TableReader(Reader[File]):
    """The images of a channel that its tables name, sorted by name without suffix."""

    def __init__(
        self, root: Path, files: Iterable[File], tables: Iterable[File], caption_key: str | None
    ) -> None:
        """tables: those of `files` to read. caption_key: the captions' column; None finds it."""
        self._root = root
        self._tables = list(tables)
        self._others = [file for file in files if file not in self._tables]
        self._caption_key = caption_key
        self.layout = " and ".join(sorted({posixpath.basename(file.name) for file in tables}))

    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[File, Captions]]:
        images = {file.name: file for file in self._others if file.suffix in IMAGE_SUFFIXES}
        for file in self._others:
            if file.name not in images:
                skips.add(SkipReason.IGNORED, file.name)
        by_name = {unicode_key(name): file for name, file in images.items()} | images
        captions: dict[str, list[str]] = {}
        for table in self._tables:
            for name, found in unless_stopped(self._rows(table, by_name, skips), stop):
                captions.setdefault(name, []).extend(found)
        for image in sorted(images.values(), key=lambda file: file.stem):
            if image.name not in captions:
                skips.add(SkipReason.UNLISTED, image.name)
            elif image.num_bytes == 0:
                skips.add(SkipReason.EMPTY_IMAGE, image.name)
            else:
                yield image, tuple(captions[image.name])

    def read(self, image: File) -> bytes:
        return (self._root / image.name).read_bytes()

    def _rows(
        self, table: File, images: Mapping[str, File], skips: Skips
    ) -> Iterator[tuple[str, Captions]]:
        """Yield the name and the captions of each row that names an image of the channel."""
        resolve = partial(_resolve, posixpath.dirname(table.name), images)
        lines = _lines(self._root / table.name, table, resolve, skips)
        if not (first := list(islice(lines, PROBED_ROWS))):
            return
        columns = Columns.of_table(
            f"{skips.channel}/{printable(table.name)}",
            [line.row for line in first],
            self._caption_key,
            is_image=lambda value: resolve(value) is not None,
        )
        for number, row in chain(first, lines):
            where = f"{table.name}:{number}"
            path, value = row.get(columns.image), row.get(columns.caption)
            name = resolve(path)
            if name is None:
                skips.add(*_why_not(path, where))
            elif found := captions_of_value(value, columns.caption, where, skips):
                yield name, found


def _resolve(folder: str, images: Mapping[str, File], path: object) -> str | None:
    """Return the name of the image that a path means; None when it is none of the channel's."""
    if not isinstance(path, str):
        return None
    path = path.replace("\\", "/")
    candidates = (posixpath.normpath(posixpath.join(folder, path)), posixpath.normpath(path))
    for name in candidates:
        if file := images.get(name) or images.get(unicode_key(name)):
            return file.name
    return None


def _why_not(path: object, where: str) -> tuple[SkipReason, str, str]:
    """Return the reason, name and message of a row without an image of the channel."""
    if not isinstance(path, str) or not path.strip():
        return SkipReason.NO_IMAGE, where, f"{where}: the row names no image, but {path!r:.80}"
    if "://" in path:
        detail = f"{where}: {path:.200} is an address; images are files of the channel"
        return SkipReason.ADDRESS, where, detail
    normal = posixpath.normpath(path.replace("\\", "/"))
    if normal.startswith(("/", "../")) or normal == ".." or normal[1:3] == ":/":
        return SkipReason.OUTSIDE_PATH, where, f"{where}: {path:.200} leads out of the channel"
    detail = f"{where}: there is no image {path:.200} in the channel"
    return SkipReason.CAPTION_WITHOUT_IMAGE, where, detail


def _lines(
    path: Path, table: File, resolve: Callable[[object], str | None], skips: Skips
) -> Iterator[Line]:
    """Yield the rows of a table of any kind. Raises DataError when it cannot be read on."""
    where = f"{skips.channel}/{printable(table.name)}"
    try:
        if table.suffix == ".parquet":
            from training.data.sources.parquet import rows_of  # pyarrow takes half a second

            yield from (Line(number, row) for number, row in enumerate(rows_of(path), 1))
        elif table.suffix == ".jsonl":
            yield from _lines_of_json(path, table.name, skips)
        else:
            yield from _lines_of_csv(path, table, where, resolve, skips)
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise DataError(f"{where} is not {encoding} ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error})") from error


def _lines_of_json(path: Path, name: str, skips: Skips) -> Iterator[Line]:
    with open_text(path) as file:
        for number, line in enumerate(bounded_lines(file), 1):
            where = f"{name}:{number}"
            if line is None:
                skips.add(SkipReason.GIANT_ROW, where)
            elif line.strip():
                try:
                    line.encode()  # one wrong byte costs its row alone
                    row = json.loads(line.removeprefix("\ufeff"))
                except (ValueError, RecursionError) as error:
                    skips.add(SkipReason.BAD_ROW, where, f"{where}: not JSON ({error})")
                    continue
                if isinstance(row, dict):
                    yield Line(number, row)
                else:
                    detail = f"{where}: a JSON object was expected, got {line[:40]!r}"
                    skips.add(SkipReason.BAD_ROW, where, detail)


def _lines_of_csv(
    path: Path, table: File, where: str, resolve: Callable[[object], str | None], skips: Skips
) -> Iterator[Line]:
    # Of the process, and 128 KiB unless set: a cell may be as long as a caption in a file may be.
    csv.field_size_limit(MAX_ROW_BYTES)
    with open_text(path) as file:
        delimiter = _delimiter(next(bounded_lines(file), "") or "", table.suffix)
    with open_text(path) as file:
        reader = csv.reader(_whole_lines(file, where), delimiter=delimiter, strict=True)
        names: list[str] | None = None
        try:
            for cells in reader:
                if names is None and not any(cell.strip() for cell in cells):
                    continue
                if names is None:
                    # A first row with an image of the channel is data: its columns are numbered.
                    if not any(resolve(cell) for cell in cells):
                        names = [cell.strip() for cell in cells]
                        _check_names(names, where)
                        continue
                    names = [str(number) for number in range(1, len(cells) + 1)]
                if len(cells) == len(names):
                    yield Line(reader.line_num, dict(zip(names, cells, strict=True)))
                elif cells:
                    row = f"{table.name}:{reader.line_num}"
                    detail = f"{row}: {len(cells)} columns, where the first row has {len(names)}"
                    skips.add(SkipReason.BAD_ROW, row, detail)
        except csv.Error as error:
            raise DataError(
                f"{where}: line {reader.line_num} cannot be read ({error}); a quotation mark may "
                "be missing there or above"
            ) from error


def _check_names(names: Sequence[str], where: str) -> None:
    """Raise DataError when two columns have one name."""
    for name, count in Counter(filter(None, names)).items():
        if count > 1:
            raise DataError(f"{where} has {count} columns called {name!r:.80}; rename them")


def _delimiter(first_line: str, suffix: str) -> str:
    """Return what parts the columns: a tab, a comma, or the semicolon of some spreadsheets."""
    if suffix != ".csv":
        return "\t"
    return ";" if first_line.count(";") > first_line.count(",") else ","


def _whole_lines(file: io.TextIOWrapper, where: str) -> Iterator[str]:
    """Yield lines. Raises DataError for one that is too long, or not of the file's encoding."""
    for number, line in enumerate(bounded_lines(file), 1):
        if line is None:
            raise DataError(f"{where}: line {number} has more than {MAX_ROW_BYTES:,} bytes")
        try:
            line.encode()
        except UnicodeEncodeError as error:
            encoding = file.encoding.removesuffix("-sig").upper()
            raise DataError(
                f"{where}: line {number} is not {encoding} from character {error.start + 1} on; "
                "save the table as UTF-8"
            ) from error
        yield line


def open_text(path: Path) -> io.TextIOWrapper:
    """Open UTF-8, or UTF-16 that begins with its mark, as Windows' programs write it.

    Wrong bytes become surrogates. Raises OSError.
    """
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    return path.open(encoding=encoding, errors="surrogateescape", newline="")


def bounded_lines(file: io.TextIOWrapper) -> Iterator[str | None]:
    """Yield a file's lines, whatever ends them: LF, CR and LF, or CR as in old spreadsheets.

    None is one of more than `MAX_ROW_BYTES`, which is not kept.
    """
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) <= MAX_ROW_BYTES:
            yield line
            continue
        while line and not line.endswith(("\n", "\r")):
            line = file.readline(MAX_ROW_BYTES)
        yield None
