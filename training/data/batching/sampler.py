"""The pairs in the batch of a step, as a pure function of the seed and the step.

So the step is all that a resumed job needs, and any worker can compute any step. The numbers come
straight from the Philox bit generator, whose stream numpy promises never to change (its
`permutation` may): a job resumed with a newer image sees the same order.

Letters: M pairs, B pairs of one rank in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Last = Literal["drop", "keep"]
_ORDER, _CAPTION, _GROUPS, _STARTS, _MIRROR = 0, 1, 2, 3, 4  # separate streams of one seed
UNMIRRORED_EPOCHS = 5  # pictures that have hardly been repeated need no variants
LANES = 16  # groups that are read side by side


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The order of M pairs for one rank.

    batch_size: pairs in a full batch, all ranks together; a multiple of world_size.
    shuffle: whether every epoch has an order of its own; otherwise the pairs come by number.
    last: what happens to the pairs that do not fill a batch. `drop` leaves them out of this epoch
        (others in the next one) and fills the only batch of a smaller set by repeating pairs;
        `keep` makes a shorter batch, for validation by one rank.
    part: number of the part of a data set that these pairs are; each part has another order.
    groups: sizes of runs of adjacent numbers, M in all, that are quick to read only from front to
        back: the shards of a channel that is fetched while it is read. See `permutation`.
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
        """Return the epoch, from 0, of a step, from 0."""
        return step // self.num_per_epoch

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the numbers of all pairs, [M], in the order of an epoch.

        Without groups all orders are equally likely. With groups, `LANES` of them, in another order
        each epoch, are read side by side, each from a random pair to its end and then from its
        beginning. The order within a group never changes, so the pairs of a group should not be
        sorted.
        """
        if not self.shuffle:
            return np.arange(self.num_pairs)
        keys = self._random(epoch, _ORDER)
        if self.groups is None:
            return np.argsort(keys, kind="stable")
        ends = np.cumsum(self.groups, dtype=np.int64)
        starts = self._random(epoch, _STARTS)
        order = np.argsort(self._random(epoch, _GROUPS)[: len(self.groups)], kind="stable")
        lanes: list[list[NDArray[np.int64]]] = [[] for _ in range(min(LANES, len(order)))]
        for turn, group in enumerate(order.tolist()):
            size = self.groups[group]
            numbers = np.arange(ends[group] - size, ends[group])
            rolled = np.roll(numbers, -int(starts[group] % np.uint64(max(1, size))))
            lanes[turn % len(lanes)].append(rolled)
        # Each lane has places in the epoch at random, which its pairs take in their order.
        lane_ends = np.cumsum([sum(map(len, lane)) for lane in lanes])
        places = [np.sort(part) for part in np.split(keys, lane_ends[:-1])]
        numbers = np.concatenate([part for lane in lanes for part in lane])
        return numbers[np.argsort(np.concatenate(places), kind="stable")]

    def caption_numbers(self, epoch: int) -> NDArray[np.uint64]:
        """Return a random number for each pair, [M]: modulo its captions, the one of this epoch."""
        return self._random(epoch, _CAPTION)

    def are_mirrored(self, epoch: int) -> NDArray[np.bool_]:
        """Return for each pair, [M], whether its picture is mirrored in an epoch.

        Half of them are, from epoch `UNMIRRORED_EPOCHS` on.
        """
        if epoch < UNMIRRORED_EPOCHS:
            return np.zeros(self.num_pairs, dtype=np.bool_)
        mirrored: NDArray[np.bool_] = self._random(epoch, _MIRROR) >> np.uint64(63) == 1
        return mirrored

    def indices(self, step: int, permutation: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pairs [B] of this rank in a step, given its epoch's permutation."""
        start = step % self.num_per_epoch * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        if self.last == "keep":
            positions = positions[positions < self.num_pairs]
        share = self.batch_size // self.world_size
        own = positions[self.rank * share : (self.rank + 1) * share]
        return permutation[own % self.num_pairs]

    def _random(self, epoch: int, stream: int) -> NDArray[np.uint64]:
        parts = [self.part] if self.part else []
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch, stream, *parts]))
        return bits.random_raw(self.num_pairs)
