"""A channel of which each host has another part (S3DistributionType `ShardedByS3Key`).

A host reads its own part and no other's; what must be alike on all hosts is agreed upon:

- An epoch is as many steps as the pairs of all parts together fill whole batches. In every step
  each host draws equally many pairs, from its own part, which it goes round at its own pace: one
  with fewer pairs begins again sooner. So no rank ever runs out, and all make equally many steps.
- The tokenizer is learned from the words of all parts.
- The fingerprint of the data is the sum of the parts', and so that of the whole channel.
- `max_bad_share` is a share of the whole channel. Hosts tell one another what they had to leave
  out when they have opened it, when they have decoded it, and once an epoch.

A part may have several devices, whose ranks are adjacent and share its pairs out.

Letters: H hosts, and so parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

from dalle.preprocess.tokenizer import CaptionTokenizer
from dalle.types import TokenizerKind
from training.data.pairs import Dataset, PartSkips, Skips, Whole, joined
from training.distributed.process_group import Ranks
from training.stopping import Stopped

T = TypeVar("T")


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """What each rank's own work gives, once all have done it.

    Raises Stopped on every rank when it does on one: none may wait for another that has left.
    """
    result: list[T] = []
    with suppress(Stopped):
        result.append(work())
    if ranks.any(not result):
        raise Stopped
    return result[0]


class Part:
    """One host's part among those of all hosts. Every rank calls the same methods in one order.

    number: of this part, from 0. siblings: the ranks that share it, of one host's devices.
    """

    def __init__(self, ranks: Ranks, num_parts: int) -> None:
        self._ranks = ranks
        self.num_parts = num_parts
        self.siblings = ranks.parted(num_parts)
        self.number = ranks.rank // self.siblings.size

    def settle(self, skips: Skips, max_bad_share: float) -> None:
        """Tell one another what was left out. Raises DataError, everywhere, when it is too much."""
        # The devices of a host may have met different images: whoever met the most speaks.
        own = [PartSkips(**each) for each in self._ranks.each(asdict(skips.of_part()))]
        parts = [
            min(own[first : first + self.siblings.size], key=lambda part: part.num_good)
            for first in range(0, len(own), self.siblings.size)
        ]
        skips.elsewhere = [part for number, part in enumerate(parts) if number != self.number]
        skips.check_share(max_bad_share)

    def whole(self, dataset: Dataset) -> Whole:
        """Of the data sets that the hosts give."""
        parts = [Whole(**each) for each in self._each_part(asdict(Whole.of(dataset)))]
        return Whole(
            sum(part.num_pairs for part in parts),
            sum(part.num_captions for part in parts),
            joined(part.fingerprint for part in parts),
        )

    def tokenizer(
        self, captions: Iterable[str], *, kind: TokenizerKind, vocab_size: int, text_length: int
    ) -> CaptionTokenizer:
        """What `CaptionTokenizer.train` would learn from the captions of all parts. Or Stopped."""
        words = agreed(self._ranks, lambda: CaptionTokenizer.count_words(captions, kind))
        counts: Counter[str] = Counter()
        for part in self._each_part(words):
            counts.update(part)
        return CaptionTokenizer.of_words(
            counts, kind=kind, vocab_size=vocab_size, text_length=text_length
        )

    def _each_part(self, value: Any) -> list[Any]:
        """Every part's value; its first rank speaks for it."""
        speaks = self.siblings.is_first
        return self._ranks.each(value if speaks else None)[:: self.siblings.size]
