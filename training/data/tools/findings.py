"""Findings of `python -m training.data doctor`, as a verdict, a table, JSON and HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from dalle.pages.environment import page_environment
from training.data.skips import SkipReason

EXAMPLES = 5


@dataclass(frozen=True)
class Doubles:
    """Images that equal another one, pixel by pixel as the models see them, and a few names."""

    count: int = 0
    names: Sequence[str] = ()

    @classmethod
    def of(cls, names: Sequence[str]) -> Doubles:
        return cls(len(names), names[:EXAMPLES])


@dataclass(frozen=True)
class LongCaptions:
    """Captions of more text tokens than `text_length`, and a few of their names.

    how: what a job does about them: fail, cut or skip. unchecked: why captions were not checked.
    """

    text_length: int
    how: str
    unchecked: str | None = None
    count: int = 0
    names: Sequence[str] = ()


@dataclass(frozen=True)
class ChannelFindings:
    """Findings of one channel. refusal: why it cannot be read at all; num_bytes: of its images.

    fault: why training would refuse it, though it can be read.
    matches: pairs by the way their names match, where that is not the usual one.
    """

    channel: str
    directory: str
    refusal: str | None = None
    fault: str | None = None
    layout: str = ""
    num_pairs: int = 0
    num_captions: int = 0
    num_bytes: int = 0
    num_bad: int = 0
    fingerprint: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    matches: Mapping[str, int] = field(default_factory=dict)
    doubles: Doubles = Doubles()

    def problems(self, max_bad_share: float) -> Iterator[str]:
        """Yield what would stop a job, or make its model worse."""
        if self.refusal is not None:
            yield self.refusal
            return
        if self.fault is not None:
            yield self.fault
        total = self.num_pairs + self.num_bad
        if self.num_bad > max_bad_share * total:
            yield (
                f"{self.channel}: {self.num_bad:,} of {total:,} pairs cannot be used, more than "
                f"max_bad_share {max_bad_share:g} allows: a job would fail"
            )
        elif self.num_pairs == 0:
            yield f"{self.channel}: not one image can be decoded: a job would fail"
        if self.doubles.count > max_bad_share * total:
            yield (
                f"{self.channel}: {self.doubles.count:,} of {self.num_pairs:,} pictures are there "
                "more than once; give a picture all its captions in one text file"
            )


@dataclass(frozen=True)
class Findings:
    """Findings of all channels.

    leaks: held-out images that are trained on. num_shared_captions: held-out captions that are.
    """

    channels: Sequence[ChannelFindings]
    leaks: Doubles
    num_shared_captions: int
    long_captions: LongCaptions
    max_bad_share: float

    @property
    def problems(self) -> list[str]:
        """What makes the channels unfit for training; empty when they are fit."""
        found = [each for one in self.channels for each in one.problems(self.max_bad_share)]
        if self.long_captions.count and self.long_captions.how == "fail":
            found.append(
                f"{self.long_captions.count:,} captions are longer than text_length "
                f"{self.long_captions.text_length} text tokens: a job would fail; shorten them, or "
                "raise text_length, or set long_captions to cut or skip"
            )
        held_out = self.channels[-1].num_pairs
        if self.leaks.count > self.max_bad_share * held_out:
            found.append(
                f"{self.leaks.count:,} of {held_out:,} pictures of validation are trained on too: "
                "its losses would be too good to be true; take them out of one of the two"
            )
        return found

    def as_json(self) -> str:
        """Return one object."""
        content = {"is_fine": not self.problems, "problems": self.problems, **asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False)

    def as_text(self) -> str:
        """Return a table for a terminal, and the problems below it."""
        rows = [("", *(each.channel for each in self.channels))]
        rows += [(name, *values) for name, values in self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        for heading, names in self._examples():
            lines += ["", f"{heading}:", *(f"  {name}" for name in names)]
        lines.append("")
        lines += [f"problem: {each}" for each in self.problems] or ["fit for training"]
        return "\n".join(lines)

    def as_html(self) -> str:
        """Return a page without references to other files."""
        return (
            page_environment("training.report")
            .get_template("channels.html")
            .render(
                title="Channel check",
                time=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
                channels=self.channels,
                problems=self.problems,
                rows=list(self._rows()),
                examples=list(self._examples()),
            )
        )

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the rows of the table: a name, and a value for each channel."""
        yield "layout", [each.layout or "unreadable" for each in self.channels]
        yield "pairs", [f"{each.num_pairs:,}" for each in self.channels]
        yield "captions", [f"{each.num_captions:,}" for each in self.channels]
        yield "size of the images", [_size(each.num_bytes) for each in self.channels]
        reasons = list(dict.fromkeys(reason for each in self.channels for reason in each.skipped))
        for reason in reasons:
            yield reason, [f"{each.skipped.get(reason, 0):,}" for each in self.channels]
        for match in dict.fromkeys(match for each in self.channels for match in each.matches):
            yield match, [f"{each.matches.get(match, 0):,}" for each in self.channels]
        yield "same picture again", [f"{each.doubles.count:,}" for each in self.channels]
        if len(self.channels) > 1:
            yield "picture trained on too", ["", f"{self.leaks.count:,}"]
            yield "caption trained on too", ["", f"{self.num_shared_captions:,}"]
        blanks = [""] * (len(self.channels) - 1)
        unchecked = self.long_captions.unchecked
        number = f"{self.long_captions.count:,}" if unchecked is None else "not checked"
        yield f"captions over {self.long_captions.text_length} tokens", [number, *blanks]

    def _examples(self) -> Iterator[tuple[str, list[str]]]:
        """Yield headings with some names."""
        if self.long_captions.unchecked is not None:
            yield "length of captions not checked", [self.long_captions.unchecked]
        for each in self.channels:
            for reason, names in each.examples.items():
                if reason != SkipReason.IGNORED:
                    yield f"{each.channel}, {reason}", _some(names, each.skipped[reason])
            if each.doubles.count:
                heading = f"{each.channel}, same picture again"
                yield heading, _some(each.doubles.names, each.doubles.count)
        if self.leaks.count:
            yield "validation, picture trained on too", _some(self.leaks.names, self.leaks.count)
        if self.long_captions.count:
            yield "captions too long", _some(self.long_captions.names, self.long_captions.count)


def _size(num_bytes: int) -> str:
    """
    >>> _size(38_400)
    '38.4 kB'
    """
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes} bytes"


def _some(names: Sequence[str], count: int) -> list[str]:
    return [*names, *(["…"] if count > len(names) else [])]
