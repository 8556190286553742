"""Which pairs make up the batch of a step: a pure function of the seed and the step.

So a resumed job needs to know nothing but its step, and any worker can work on any step. The
numbers come straight from the Philox bit generator, whose stream numpy promises never to change
(its `permutation` may): a job resumed with a newer image still sees the same order.

Letters: M pairs, B pairs of one rank in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Last = Literal["drop", "keep"]
_ORDER, _CAPTION, _GROUPS, _STARTS = 0, 1, 2, 3  # separate streams of one seed
LANES = 16  # groups that are read side by side


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of M pairs for one rank.

    batch_size: pairs in a whole batch, all ranks together; a multiple of world_size.
    shuffle: whether every epoch has its own order; otherwise the pairs come by number.
    last: what happens to the pairs that do not fill a batch. `drop` leaves them out of this epoch
        (others in the next one) and fills the only batch of a smaller set by going round again;
        `keep` makes a shorter batch, for validation by one rank.
    part: which of several parts of a data set these pairs are, each with an order of its own.
    groups: pairs in each run of adjacent numbers that is quickly read from front to back only, M in
        all: the shards of a channel that is fetched while it is read. See `permutation`.
    """

    num_pairs: int
    batch_size: int
    seed: int
    shuffle: bool = True
    last: Last = "drop"
    rank: int = 0
    world_size: int = 1
    groups: tuple[int, ...] | None = None
    part: int = 0

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, got {self.num_pairs}")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size must be a positive multiple of world_size {self.world_size}, "
                f"got {self.batch_size}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be 0 to {self.world_size - 1}, got {self.rank}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.last == "keep" and self.world_size > 1:
            raise ValueError("last='keep' gives ranks unequal batches; use it with world_size 1")
        if self.groups is not None and sum(self.groups) != self.num_pairs:
            raise ValueError(f"groups must have {self.num_pairs} pairs, got {sum(self.groups)}")

    @property
    def num_per_epoch(self) -> int:
        """Batches in an epoch, the same on every rank, at least 1."""
        if self.last == "keep":
            return -(-self.num_pairs // self.batch_size)
        return max(1, self.num_pairs // self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that step (from 0) belongs to."""
        return step // self.num_per_epoch

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The numbers of all pairs, [M], in the order of an epoch.

        Any order, each as likely as the others; with groups one in which `LANES` of them, drawn
        anew each epoch, are under way at a time, each of them read once from a random pair of it
        to its end and then from its beginning. Their own order never changes, so that the pairs
        of a group should not be sorted.
        """
        if not self.shuffle:
            return np.arange(self.num_pairs)
        draws = self._random(epoch, _ORDER)
        if self.groups is None:
            return np.argsort(draws, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.groups)]).astype(np.int64)
        turns = self._random(epoch, _STARTS)
        order = np.argsort(self._random(epoch, _GROUPS)[: len(self.groups)], kind="stable")
        lanes: list[list[NDArray[np.int64]]] = [[] for _ in range(min(LANES, len(order)))]
        for place, group in enumerate(order.tolist()):
            numbers = np.arange(starts[group], starts[group + 1])
            turned = np.roll(numbers, -int(turns[group] % np.uint64(max(1, len(numbers)))))
            lanes[place % len(lanes)].append(turned)
        # Each lane takes places at random, and its pairs take those in turn.
        places: list[NDArray[np.uint64]] = []
        taken = 0
        for lane in lanes:
            size = sum(map(len, lane))
            places.append(np.sort(draws[taken : taken + size]))
            taken += size
        numbers = np.concatenate([part for lane in lanes for part in lane])
        return numbers[np.argsort(np.concatenate(places), kind="stable")]

    def caption_draws(self, epoch: int) -> NDArray[np.uint64]:
        """A random number for each pair, [M]: modulo its captions, the one of this epoch."""
        return self._random(epoch, _CAPTION)

    def indices(self, step: int, permutation: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pairs [B] of this rank in a step, given its epoch's permutation."""
        start = step % self.num_per_epoch * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        if self.last == "keep":
            positions = positions[positions < self.num_pairs]
        share = self.batch_size // self.world_size
        mine = positions[self.rank * share : (self.rank + 1) * share]
        return permutation[mine % self.num_pairs]

    def _random(self, epoch: int, stream: int) -> NDArray[np.uint64]:
        parts = [self.part] if self.part else []
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch, stream, *parts]))
        return bits.random_raw(self.num_pairs)
