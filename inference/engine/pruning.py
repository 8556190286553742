"""Dropping the worse half of a request's candidates before they are drawn to the end.

Candidates begin in groups, by number, and so are equally far. At given rows of the grid a group's
partial pictures are decoded, scored as finished ones are, and the worse half is dropped. Groups and
what is decoded together are the same whatever the load, and so are the survivors.

Letters: K candidates of a group, n positions drawn, N positions, M codes per position, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle.models.clip import Clip
from dalle.models.dvae import DiscreteVAE
from inference.engine.image_decoder import partial_images

GROUP = 8  # candidates that are compared with one another


@dataclass(frozen=True, slots=True)
class Pruning:
    """What a server does about pruning. prune_at: shares of the picture, of requests that say
    nothing; most_together: candidates that it draws together, which bounds a group."""

    prune_at: tuple[float, ...] = ()
    most_together: int = GROUP

    @property
    def group(self) -> int:
        return min(GROUP, self.most_together)


def prune_rows(shares: Sequence[float], grid_size: int, primed_rows: int = 0) -> tuple[int, ...]:
    """The rows of the grid after which to prune, rising: none at the ends or among primed ones."""
    rows = {round(share * grid_size) for share in shares}
    return tuple(sorted(row for row in rows if primed_rows < row < grid_size))


def survivors(num_candidates: int, group: int, prunings: int) -> int:
    """How many of the candidates are drawn to the end."""

    def of_group(size: int) -> int:
        for _ in range(prunings):
            size = kept(size)
        return size

    whole, rest = divmod(num_candidates, group)
    return whole * of_group(group) + of_group(rest)


def kept(size: int) -> int:
    """How many of a group of `size` go on: the better half, the middle one with them."""
    return (size + 1) // 2


def worse_half(numbers: Sequence[int], merits: Tensor) -> list[int]:
    """The numbers of a group to be dropped; of equal merits [K] the higher number."""
    order = sorted(zip(numbers, merits.tolist(), strict=True), key=lambda each: (-each[1], each[0]))
    return [number for number, _ in order[kept(len(order)) :]]


def partial_merits(
    dvae: DiscreteVAE,
    clip: Clip | None,
    caption_embedding: Tensor | None,
    image_tokens: Tensor,
    log_likelihood: Tensor,
) -> Tensor:
    """What the candidates of a group are compared by, [K]: as finished ones, by what is drawn.

    caption_embedding: [1, E], where there is a CLIP; image_tokens: [K, n, M], whole rows;
    log_likelihood: [K], of those, in nats.
    """
    if clip is None or caption_embedding is None:
        return log_likelihood
    features = clip.encode_image(partial_images(dvae, image_tokens))
    cosines = (features * caption_embedding).sum(dim=1)
    return clip.merit(cosines, log_likelihood.to(cosines))


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two scores [K] of the same things, equal ones sharing a mean rank; nan
    where all of one are equal."""
    first, second = _ranks(one), _ranks(other)
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def _ranks(scores: Tensor) -> Tensor:
    """[K] -> mean ranks [K], counted from 0."""
    below = (scores[None] < scores[:, None]).sum(dim=1)
    equal = (scores[None] == scores[:, None]).sum(dim=1)
    return below.double() + (equal - 1) / 2
