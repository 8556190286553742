"""The processes that train one model together, as the model's loss sees them.

Each rank computes the loss of its own share of a batch; their mean is the loss of the whole batch
as long as every share counts alike. What looks beyond its share asks here for the others': CLIP's
contrast, vq's codebook, a mean over a number of tokens that differs. Knows no process group.

Letters: R ranks, B pairs of one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The same calls in the same order on every rank; each waits for the others'."""

    @property
    def size(self) -> int:
        """R"""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """[B, ...] of each rank -> [R * B, ...] of all, by rank; differentiable.

        Its gradient is the sum of what all ranks' losses make of this rank's rows.
        """
        ...

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks, the same numbers on each; not differentiable."""
        ...

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Put the first rank's values into these tensors, in place."""
        ...


class OneRank:
    """A process that trains by itself."""

    @property
    def size(self) -> int:
        return 1

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def total(self, value: Tensor) -> Tensor:
        return value

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        pass


ONE_RANK: Ranks = OneRank()
