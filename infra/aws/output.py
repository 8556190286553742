"""A command's output: lines and tables, or one JSON object with `--json`; and files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from dalle.errors import UserError
from dalle.platform.disk import write_atomically
from infra.aws.request import Request, printable

BARS = "▁▂▃▄▅▆▇█"


class Output:
    """The output of one command.

    as_json: lines go to stderr, and `finish` prints one JSON object on stdout.
    dry_run: every request is printed as it would be sent, and lines are not.
    """

    def __init__(self, *, as_json: bool = False, dry_run: bool = False) -> None:
        self.as_json = as_json
        self.dry_run = dry_run
        self._requests: list[dict[str, Any]] = []

    @property
    def _lines(self) -> TextIO:
        # Looked up each time, because tests replace the streams.
        return sys.stderr if self.as_json else sys.stdout

    def line(self, text: str = "") -> None:
        """Print a line, except in a dry run, in which nothing happens."""
        if not self.dry_run:
            print(text, file=self._lines, flush=True)

    def item(self, what: str, state: str) -> None:
        """Print a resource and its state, aligned with the others."""
        self.line(f"{what:<44}  {state}")

    def table(self, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table."""
        for line in aligned([heading, *rows]):
            self.line(line)

    def request(self, request: Request) -> None:
        """Print a request that a dry run does not send."""
        self._requests.append(request.as_json())
        if not self.as_json:
            print(json.dumps(request.as_json(), indent=2, ensure_ascii=False), flush=True)

    def finish(self, **result: Any) -> int:
        """Print the result as JSON where it is requested; return the exit code of success, 0."""
        if self.as_json:
            if self.dry_run:
                result = {"dry_run": True, "requests": self._requests}
            print(json.dumps(printable(result), indent=2, ensure_ascii=False), flush=True)
        return 0


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; its directory is created if needed. Raises UserError."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, each column as wide as its widest cell."""
    table = [list(row) for row in rows]
    if not table:
        return []
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Return the course of a number as one block a value: the lowest value is the lowest block.

    More values than `width` are thinned evenly; the last one is always shown.
    """
    if not values:
        return ""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def count_words(number: int, noun: str) -> str:
    """Return a number with its noun: 1 image, 2 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_words(num_bytes: float) -> str:
    """Return a number of bytes in the largest unit that leaves 1 or more."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("the loop ends at GB")


def span_words(seconds: float) -> str:
    """Return a duration in its two largest units."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
