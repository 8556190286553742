"""Reductions over the ranks that train one model, as the model's loss uses them.

Each rank computes the loss of its share of the batch; the mean over ranks is the loss of the whole
batch if all shares count equally. Losses that look beyond their share (CLIP's contrast, the vq
codebook, means over unequal numbers of tokens) use these reductions. Knows no process group.

Letters: R ranks, B pairs of one rank.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class Ranks:
    """All ranks of the training; this class is a single one, a process group overrides it.

    Every rank must make the same calls in the same order, and each call waits for all ranks.
    """

    @property
    def size(self) -> int:
        """R"""
        return 1

    def gather(self, rows: Tensor) -> Tensor:
        """[B, ...] of each rank -> [R * B, ...] of all, in rank order; differentiable.

        The gradient of a rank's rows is the sum over the losses of all ranks.
        """
        return rows

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over ranks, bit-equal on each; not differentiable."""
        return value

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with those of the first rank."""


ONE_RANK = Ranks()
