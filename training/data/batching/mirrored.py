"""Which pictures of a small data set may be mirrored in training: where the caption stays true.

    mirrorable(preloaded)   # one answer for each pair

A caption that names a side is never shown with a mirrored picture. Nor is one whose picture
becomes another caption's when it is mirrored: four o'clock becomes eight o'clock. Where that
happens to most pictures, as it does to turned shapes, none is mirrored.
Letters: M pairs, S image size.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.batching.nearest import nearest
from training.data.batching.preload import Preloaded
from training.stopping import NEVER, Stop

MOST_PAIRS = 5_000  # each is compared with all others; more pictures need no mirroring
COMPARED_SIZE = 32  # pixels, of the pictures that are compared
LEAST_SHARE = 0.25
"""Of the pictures that mirroring changes; where fewer may be mirrored, sides matter in the set."""

_SIDES = re.compile(
    r"\b(left|right|east|west|(anti|counter)?-?clockwise|mirrored|reversed|backwards?)"
    r"(wards?|ern|most|-?(facing|pointing|hand|handed|side|sided))?\b",
    re.IGNORECASE,
)


def names_a_side(caption: str) -> bool:
    """Return whether a caption may be wrong for the mirrored picture, by its (English) words."""
    return _SIDES.search(caption) is not None


def mirrorable(dataset: Preloaded, stop: Stop = NEVER) -> Tensor:
    """Return which pictures may be mirrored, bool [M].

    One may where no caption of it names a side, and where the mirrored picture is still nearer to
    the picture itself than to that of any other caption. None may of more than `MOST_PAIRS`, or
    where fewer than `LEAST_SHARE` could of those that it changes. Raises Stopped.
    """
    num_pairs = len(dataset)
    if num_pairs > MOST_PAIRS:
        return torch.zeros(num_pairs, dtype=torch.bool)
    pictures = _small(dataset.images)
    turned = pictures.flip(-1)
    numbers, distances = nearest(turned, num_pairs, lambda rows: pictures[list(rows)], stop)
    off = (turned.double() - pictures.double()).square().flatten(1).sum(dim=1)
    is_own = (off <= distances).tolist()
    allowed = [
        not any(names_a_side(caption) for caption in dataset.captions(index))
        and (own or not {*dataset.captions(number)}.isdisjoint(dataset.captions(index)))
        for index, (own, number) in enumerate(zip(is_own, numbers.tolist(), strict=True))
    ]
    may, changes = torch.tensor(allowed), off > 0
    if (may & changes).sum() < LEAST_SHARE * changes.sum():
        return torch.zeros_like(may)
    return may


def _small(images: Tensor) -> Tensor:
    """Shrink uint8 images [M, 3, S, S] to at most COMPARED_SIZE; in whole numbers, for equality."""
    if images.shape[-1] <= COMPARED_SIZE:
        return images
    parts = [
        F.adaptive_avg_pool2d(chunk.float(), COMPARED_SIZE).round().to(torch.uint8)
        for chunk in torch.split(images, 256)
    ]
    return torch.cat(parts)
