"""A channel of which each host has another part (S3DistributionType `ShardedByS3Key`).

A host reads its own part only. What must be equal on all hosts is exchanged:

- An epoch has as many steps as all parts' pairs together fill whole batches. In every step each
  host takes equally many pairs from its part, and begins the part again when it is through: sooner
  with fewer pairs. So no rank runs out, and all make equally many steps.
- The tokenizer is trained on the captions of all parts.
- The fingerprint of the data is the sum of the parts' fingerprints, which is that of the channel.
- `max_bad_share` is a share of the whole channel. Hosts exchange their skips after opening the
  channel, after decoding it, and once an epoch.

The devices of a host share its part; their ranks are adjacent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

from dalle.preprocess.tokenizer import CaptionTokenizer
from dalle.types import TokenizerKind
from training.data.pairs import Dataset, Totals, add_fingerprints
from training.data.skips import PartSkips, Skips
from training.distributed.process_group import ProcessGroup
from training.stopping import Stopped

T = TypeVar("T")


def on_all_ranks(ranks: ProcessGroup, work: Callable[[], T]) -> T:
    """Run `work` on every rank and return this rank's result once all have finished.

    Raises Stopped on every rank when `work` does on one, so that no rank waits for one that left.
    """
    result: list[T] = []
    with suppress(Stopped):
        result.append(work())
    if ranks.any(not result):
        raise Stopped
    return result[0]


class HostPart:
    """This host's part of a channel. Every rank calls the same methods in the same order.

    number: of this part, from 0. host_ranks: the ranks of this host's devices.
    """

    def __init__(self, ranks: ProcessGroup, num_parts: int) -> None:
        self._ranks = ranks
        self.num_parts = num_parts
        self.host_ranks = ranks.parted(num_parts)
        self.number = ranks.rank // self.host_ranks.size

    def share_skips(self, skips: Skips, max_bad_share: float) -> None:
        """Exchange the skips of all parts. Raises DataError on every rank when they are too many.

        The devices of a host may have met different bad images: the one that met most counts.
        """
        every_rank = [PartSkips(**each) for each in self._ranks.each(asdict(skips.of_part()))]
        size = self.host_ranks.size
        parts = [
            min(every_rank[first : first + size], key=lambda part: part.num_good)
            for first in range(0, len(every_rank), size)
        ]
        skips.other_parts = [part for number, part in enumerate(parts) if number != self.number]
        skips.check_share(max_bad_share)

    def totals(self, dataset: Dataset) -> Totals:
        """Return the totals of all hosts' data sets, of which this is one."""
        parts = [Totals(**each) for each in self._each_part(asdict(Totals.of(dataset)))]
        return Totals(
            sum(part.num_pairs for part in parts),
            sum(part.num_captions for part in parts),
            add_fingerprints(part.fingerprint for part in parts),
        )

    def tokenizer(
        self, captions: Iterable[str], *, kind: TokenizerKind, vocab_size: int, text_length: int
    ) -> CaptionTokenizer:
        """Return what `CaptionTokenizer.train` makes of all parts' captions. Raises Stopped."""
        words = on_all_ranks(self._ranks, lambda: CaptionTokenizer.count_words(captions, kind))
        counts: Counter[str] = Counter()
        for part in self._each_part(words):
            counts.update(part)
        return CaptionTokenizer.of_words(
            counts, kind=kind, vocab_size=vocab_size, text_length=text_length
        )

    def _each_part(self, value: Any) -> list[Any]:
        """Return the value of each part's first rank."""
        return self._ranks.each(value if self.host_ranks.is_first else None)[
            :: self.host_ranks.size
        ]
