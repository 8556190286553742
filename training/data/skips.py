"""Pairs that are left out of a data set: how many, for which reason, and which.

Knows names and reasons; nothing of where pairs come from.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dalle.errors import DataError
from dalle.preprocess.images import ImageError, ImageFault

log = logging.getLogger(__name__)

EXAMPLES_PER_REASON = 3


class SkipReason(StrEnum):
    """Why something in a channel is not a pair; the texts are shown in logs and reports."""

    CAPTION_WITHOUT_IMAGE = "caption without image"
    IMAGE_WITHOUT_CAPTION = "image without caption"
    SECOND_IMAGE = "second image of one name"
    SECOND_CAPTION = "second caption file of one name"
    REPLACED = "member that a later one of its name replaces"
    EMPTY_IMAGE = ImageFault.EMPTY.value
    NOT_AN_IMAGE = ImageFault.FOREIGN.value
    GIANT_IMAGE = ImageFault.GIANT.value
    DAMAGED_IMAGE = ImageFault.DAMAGED.value
    NOT_UTF8 = "caption file not UTF-8"
    NUL_IN_CAPTION = "caption with NUL bytes"
    NOT_JSON = "caption file not JSON"
    NO_CAPTION_KEY = "JSON without the caption key"
    EMPTY_CAPTION = "caption file without text"
    LONG_CAPTION = "caption over text_length"  # where the author has these skipped: not bad
    CUT_CAPTION = "caption cut to text_length"  # the pair is used
    GIANT_CAPTION = "caption over 1 MiB"
    NO_IMAGE = "row without image"
    BAD_ROW = "row that cannot be read"
    GIANT_ROW = "row over 1 MiB"
    ADDRESS = "address in place of a file"
    OUTSIDE = "link that leaves the channel"
    OUTSIDE_PATH = "path that leaves the channel"
    OUTSIDE_NAME = "member whose name leaves its shard"
    NOT_A_FILE = "member that is a link or a device"
    DAMAGED_SHARD = "pair lost in a damaged shard"
    UNREADABLE = ImageFault.UNREADABLE.value
    IGNORED = "ignored file"  # hidden, of another type, or a folder marker: never counted as bad
    UNLISTED = "image that no table names"  # a table may choose among images: never counted as bad
    FURTHER = "further file of a pair"  # a mask, 1.mask.png beside 1.png: never counted as bad

    @staticmethod
    def of(error: ImageError) -> SkipReason:
        return SkipReason(error.fault.value)


NOT_BAD = frozenset(
    {
        SkipReason.IGNORED,
        SkipReason.UNLISTED,
        SkipReason.FURTHER,
        SkipReason.LONG_CAPTION,
        SkipReason.CUT_CAPTION,
    }
)


class Match(StrEnum):
    """A way in which names pair that not every program shares; the texts are shown in reports."""

    LAST_DOT = "paired at the last dot of a name with several"
    UNICODE = "paired across Unicode forms of a name"


@dataclass(frozen=True)
class PartSkips:
    """The skips of one host's part of a channel, as plain values that can be sent.

    num_good: its usable pairs, as far as is known. counts, examples: by the reason's text.
    """

    num_good: int
    counts: Mapping[str, int]
    examples: Mapping[str, Sequence[str]]


class Skips:
    """Counts of what was left out of one channel, by reason, with a few names for each.

    The first few of each reason are logged as warnings, the others only counted.
    counts: all reasons seen, `IGNORED` included. examples: at most `EXAMPLES_PER_REASON` a reason.
    num_pairs: pairs found, before any image was decoded.
    matches: pairs whose names say less than usual that they belong together.
    other_parts: skips of the other hosts' parts of the channel (see `training.data.sharded`). They
        count in shares and summaries; counts, examples and num_pairs are of this host's part.
    """

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.counts: Counter[SkipReason] = Counter()
        self.examples: dict[SkipReason, list[str]] = {}
        self.num_pairs = 0
        self.matches: Counter[Match] = Counter()
        self.other_parts: Sequence[PartSkips] = ()
        self._damaged: set[str] = set()

    @property
    def num_bad(self) -> int:
        """Things that should have been pairs and are not."""
        counts = self._all_counts()
        return counts.total() - sum(counts[reason] for reason in NOT_BAD)

    @property
    def num_good(self) -> int:
        """Usable pairs of the whole channel, as far as is known."""
        return self._num_good_here + sum(part.num_good for part in self.other_parts)

    @property
    def _num_good_here(self) -> int:
        return self.num_pairs - len(self._damaged)

    def add(self, reason: SkipReason, name: str, detail: str = "", count: int = 1) -> None:
        """Count one name, which stands for `count` pairs.

        detail: the full message, when the reason alone does not say enough.
        """
        self.counts[reason] += count
        examples = self.examples.setdefault(reason, [])
        if len(examples) == EXAMPLES_PER_REASON:
            return
        examples.append(printable(name))
        if reason is SkipReason.IGNORED:
            log.debug("%s: ignored %s", self.channel, printable(name))
        else:
            message = detail or f"{name}: {reason}"
            verb = "" if reason is SkipReason.CUT_CAPTION else "skipped "
            log.warning("%s: %s%s", self.channel, verb, printable(message))

    def add_damaged(self, reason: SkipReason, name: str, detail: str) -> None:
        """Count a pair whose image could not be decoded, once however often it is met."""
        if name not in self._damaged:
            self._damaged.add(name)
            self.add(reason, name, detail)

    def note(self, match: Match, image: str, text: str) -> None:
        """Count a pair by the way its names match; the first ones are logged."""
        self.matches[match] += 1
        if self.matches[match] <= EXAMPLES_PER_REASON:
            log.info("%s: %s: %s, %s", self.channel, match, printable(image), printable(text))

    def check_share(self, max_bad_share: float) -> None:
        """Raise `DataError` when more than `max_bad_share` (0 to 1) of the pairs are bad."""
        total = self.num_good + self.num_bad
        if total and self.num_bad > max_bad_share * total:
            raise DataError(
                f"{self.channel}: {self.num_bad:,} of {total:,} pairs cannot be used, more than "
                f"max_bad_share {max_bad_share:g} allows: {self.describe()}",
                field="max_bad_share",
            )

    def describe(self) -> str:
        """Return `2 truncated or damaged image (a.png, b.png), 1 caption without image (c.txt)`."""
        sentences = []
        for reason, count in self._all_counts().most_common():
            if reason is not SkipReason.IGNORED:
                names = list(self.examples.get(reason, ()))
                for part in self.other_parts:
                    names += part.examples.get(reason.value, ())
                names = names[:EXAMPLES_PER_REASON]
                more = ["…"] if count > len(names) else []
                sentences.append(f"{count:,} {reason} ({', '.join(names + more)})")
        return ", ".join(sentences)

    def as_dict(self) -> dict[str, int]:
        """Return reason -> count, most frequent first, for manifests and reports."""
        return {reason.value: count for reason, count in self._all_counts().most_common()}

    def of_part(self) -> PartSkips:
        """Return the skips of this host's part, to be sent."""
        counts = {reason.value: count for reason, count in self.counts.items()}
        examples = {reason.value: names for reason, names in self.examples.items()}
        return PartSkips(self._num_good_here, counts, examples)

    def restore(self, part: PartSkips) -> None:
        """Add what another process has counted before anything was decoded."""
        self.counts.update({SkipReason(reason): count for reason, count in part.counts.items()})
        for reason, names in part.examples.items():
            self.examples[SkipReason(reason)] = list(names)

    def _all_counts(self) -> Counter[SkipReason]:
        counts = Counter(self.counts)
        for part in self.other_parts:
            counts.update({SkipReason(reason): count for reason, count in part.counts.items()})
        return counts


def printable(name: str) -> str:
    """Return a file's name with bytes that are not UTF-8 written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
