"""What a command prints: lines and tables for people, or one JSON object with `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from infra.aws.request import Call, printable

BARS = "▁▂▃▄▅▆▇█"


class Console:
    """as_json: people's lines go to stderr, and `finish` prints the object on stdout.

    dry_run: every request is printed as it would be sent.
    """

    def __init__(self, *, as_json: bool = False, dry_run: bool = False) -> None:
        self.as_json = as_json
        self.dry_run = dry_run
        self._requests: list[dict[str, Any]] = []

    @property
    def _people(self) -> TextIO:
        # Looked up each time, so that a stream that somebody has replaced is the one written to.
        return sys.stderr if self.as_json else sys.stdout

    def say(self, text: str = "") -> None:
        """A line for people. A dry run is silent: nothing has happened that could be told."""
        if not self.dry_run:
            print(text, file=self._people, flush=True)

    def item(self, what: str, state: str) -> None:
        """A thing and what became of it, aligned with the others."""
        self.say(f"{what:<44}  {state}")

    def table(self, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        for line in aligned([heading, *rows]):
            self.say(line)

    def request(self, call: Call) -> None:
        """A request that a dry run does not send."""
        self._requests.append(call.as_json())
        if not self.as_json:
            print(json.dumps(call.as_json(), indent=2, ensure_ascii=False), flush=True)

    def finish(self, **result: Any) -> int:
        """The end of a command that worked: its exit code, 0."""
        if self.as_json:
            if self.dry_run:
                result = {"dry_run": True, "requests": self._requests}
            print(json.dumps(printable(result), indent=2, ensure_ascii=False), flush=True)
        return 0


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    table = [list(row) for row in rows]
    if not table:
        return []
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The course of a number, a block a step: the lowest value is the lowest block.

    More values than `width` are thinned evenly; the last one always shows.
    """
    if not values:
        return ""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def count_words(number: int, noun: str) -> str:
    """A number of things: 1 image, 2 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_words(num_bytes: float) -> str:
    """A number of bytes in the unit that reads best."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("the loop ends at GB")


def span_words(seconds: float) -> str:
    """A length of time in its two largest units."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
