"""What a data set is, what was left out of it and why. Knows nothing of where pairs come from.

A pair is an image with one or more captions. A source of pairs (an image-text folder today)
implements `Dataset`; batches, reports and evaluation see nothing else of it.

Letters: M pairs in a data set.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from dalle.errors import DataError
from dalle.preprocess.images import ImageError, ImageFault, Pixels

log = logging.getLogger(__name__)

EXAMPLES_PER_REASON = 3
DEFAULT_MAX_BAD_SHARE = 0.05


class SkipReason(StrEnum):
    """Why something in a channel is not a pair; the texts are shown in logs and reports."""

    CAPTION_WITHOUT_IMAGE = "caption without image"
    IMAGE_WITHOUT_CAPTION = "image without caption"
    SECOND_IMAGE = "second image of one name"
    EMPTY_IMAGE = ImageFault.EMPTY.value
    NOT_AN_IMAGE = ImageFault.FOREIGN.value
    GIANT_IMAGE = ImageFault.GIANT.value
    DAMAGED_IMAGE = ImageFault.DAMAGED.value
    NOT_UTF8 = "caption file not UTF-8"
    NOT_JSON = "caption file not JSON"
    NO_CAPTION_KEY = "JSON without the caption key"
    EMPTY_CAPTION = "caption file without text"
    GIANT_CAPTION = "caption file over 1 MiB"
    OUTSIDE = "link that leaves the channel"
    OUTSIDE_NAME = "member whose name leaves its shard"
    NOT_A_FILE = "member that is a link or a device"
    DAMAGED_SHARD = "pair lost in a damaged shard"
    UNREADABLE = ImageFault.UNREADABLE.value
    IGNORED = "ignored file"  # hidden, foreign or a folder marker: nobody's mistake, never bad

    @staticmethod
    def of(error: ImageError) -> SkipReason:
        return SkipReason(error.fault.value)


class Skips:
    """Counts what was left out of one channel, by reason, and keeps a few names of each.

    The first few of each reason are logged as warnings, the others only counted.
    counts: all reasons seen, `IGNORED` included. examples: at most `EXAMPLES_PER_REASON` a reason.
    num_pairs: pairs found, before any image was decoded.
    elsewhere: what is known of the parts of the channel that other hosts have (see `parts`). It
        counts in shares and summaries; counts, examples and num_pairs are of this host's part.
    """

    def __init__(self, channel: str) -> None:
        self.channel = channel
        self.counts: Counter[SkipReason] = Counter()
        self.examples: dict[SkipReason, list[str]] = {}
        self.num_pairs = 0
        self.elsewhere: Sequence[PartSkips] = ()
        self._damaged: set[str] = set()

    @property
    def num_bad(self) -> int:
        """How many were meant to be pairs, but are none."""
        counts = self._all_counts()
        return counts.total() - counts[SkipReason.IGNORED]

    @property
    def num_damaged(self) -> int:
        """How many of them were only found out when their image was decoded."""
        return len(self._damaged)

    @property
    def num_good(self) -> int:
        """Pairs of the whole channel that are usable, as far as is known."""
        return self.num_pairs - self.num_damaged + sum(part.num_good for part in self.elsewhere)

    def add(self, reason: SkipReason, name: str, detail: str = "", count: int = 1) -> None:
        """Count one. detail: the full message, when the reason alone does not say enough.

        count: how many pairs one name stands for.
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
            log.warning("%s: skipped %s", self.channel, printable(message))

    def add_damaged(self, reason: SkipReason, name: str, detail: str) -> None:
        """Count an image that failed when it was decoded, once however often it is met."""
        if name not in self._damaged:
            self._damaged.add(name)
            self.add(reason, name, detail)

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
        """`2 truncated or damaged image (a.png, b.png), 1 caption without image (c.txt)`."""
        sentences = []
        for reason, count in self._all_counts().most_common():
            if reason is not SkipReason.IGNORED:
                names = self._all_examples(reason)
                more = ", …" if count > len(names) else ""
                sentences.append(f"{count:,} {reason} ({', '.join(names)}{more})")
        return ", ".join(sentences)

    def as_dict(self) -> dict[str, int]:
        """Reason -> count, most frequent first, for manifests and reports."""
        return {reason.value: count for reason, count in self._all_counts().most_common()}

    def of_part(self) -> PartSkips:
        """What other hosts are to know of this one's part."""
        counts = {reason.value: count for reason, count in self.counts.items()}
        examples = {reason.value: names for reason, names in self.examples.items()}
        return PartSkips(self.num_pairs - self.num_damaged, counts, examples)

    def restore(self, part: PartSkips) -> None:
        """Take over what another process has counted, before anything was decoded."""
        self.counts.update({SkipReason(reason): count for reason, count in part.counts.items()})
        for reason, names in part.examples.items():
            self.examples[SkipReason(reason)] = list(names)

    def _all_counts(self) -> Counter[SkipReason]:
        counts = Counter(self.counts)
        for part in self.elsewhere:
            counts.update({SkipReason(reason): count for reason, count in part.counts.items()})
        return counts

    def _all_examples(self, reason: SkipReason) -> list[str]:
        names = list(self.examples.get(reason, ()))
        for part in self.elsewhere:
            names += part.examples.get(reason.value, ())
        return names[:EXAMPLES_PER_REASON]


@dataclass(frozen=True)
class PartSkips:
    """What was left out of one host's part of a channel; plain values, to be sent.

    num_good: its usable pairs, as far as is known. counts, examples: by the reason's text.
    """

    num_good: int
    counts: Mapping[str, int]
    examples: Mapping[str, Sequence[str]]


def printable(name: str) -> str:
    """A file's name for people; bytes of it that are no UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class Dataset(Protocol):
    """M image-caption pairs, by number. Holds still: the same number is always the same pair.

    channel: the name that messages use. image_size: side of the square images, in pixels.
    fingerprint: 64 hexadecimal digits, see `fingerprint`. skips: what was left out, so far.
    max_bad_share: how much of it may turn out to be bad before work stops with a `DataError`.
    groups: see `Order`; None where pairs are as quickly read in any order.
    """

    @property
    def channel(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def skips(self) -> Skips: ...
    @property
    def max_bad_share(self) -> float: ...
    @property
    def groups(self) -> tuple[int, ...] | None: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The pair's name for people, such as a file's path within the channel."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The pair's captions, at least one, none of them empty."""
        ...

    def image(self, index: int) -> Pixels:
        """The pair's image as uint8 [image_size, image_size, 3]. Raises `ImageError`."""
        ...


@dataclass(frozen=True)
class Whole:
    """A data set, or all hosts' parts of one together, in three numbers.

    num_pairs: usable ones, as far as is known.
    """

    num_pairs: int
    num_captions: int
    fingerprint: str

    @classmethod
    def of(cls, dataset: Dataset) -> Whole:
        """Of a data set that is no part."""
        num_captions = sum(len(dataset.captions(index)) for index in range(len(dataset)))
        return cls(len(dataset), num_captions, dataset.fingerprint)


def fingerprint(pairs: Iterable[tuple[str, int, tuple[str, ...]]]) -> str:
    """Identify a data set cheaply by the (name, image bytes' count, captions) of its pairs.

    The sum of their sha256, modulo 2**256: the parts of a data set add up to the whole, see
    `joined`. Image contents are not read: an image replaced by another of exactly the same length
    in bytes is not noticed. Order, folder location, times and owners make no difference.
    """
    total = 0
    for name, num_bytes, captions in pairs:
        digest = hashlib.sha256()
        # Lengths first, so that no two different pairs join to the same text.
        for text in (name, str(num_bytes), *captions):
            encoded = text.encode("utf-8", "surrogateescape")
            digest.update(b"%d:" % len(encoded) + encoded)
        total += int.from_bytes(digest.digest())
    return _hexadecimal(total)


def joined(fingerprints: Iterable[str]) -> str:
    """The fingerprint of a data set from those of its parts, in any order."""
    return _hexadecimal(sum(int(part, 16) for part in fingerprints))


def _hexadecimal(total: int) -> str:
    return f"{total % (1 << 256):064x}"
