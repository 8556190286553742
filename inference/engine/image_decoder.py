"""Image tokens to pixels: finished images, and previews of unfinished ones.

Letters: K candidates, n positions sampled, N positions, M codes per position, S image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dalle.models.dvae import DiscreteVAE
from dalle.preprocess.images import Pixels
from inference.api.rendering import Preview

_UNFINISHED = 128 / 255  # grey, for the rows that are not sampled yet


def to_pixels(images: Tensor) -> list[Pixels]:
    """Convert images [K, 3, S, S] in [0, 1] to K arrays [S, S, 3] of uint8."""
    rounded = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(np.ascontiguousarray(rounded.permute(0, 2, 3, 1).cpu().numpy()))


def max_previews(grid_size: int, every_rows: int | None) -> int:
    """Return how many previews a candidate has at most; there is none of a finished image."""
    return (grid_size - 1) // every_rows if every_rows else 0


def is_preview_position(position: int, grid_size: int, every_rows: int) -> bool:
    """Return whether a preview is made once so many positions of a candidate are sampled."""
    rows, rest = divmod(position, grid_size)
    return not rest and not rows % every_rows and 0 < rows < grid_size


def decode_previews(
    dvae: DiscreteVAE, candidates: Sequence[tuple[int, Tensor]], every_rows: int
) -> Iterator[Preview]:
    """Decode the candidates that are at a preview position, equally far ones together.

    candidates: number and sampled tokens [n, M] of each, not modified.
    """
    grid_size = dvae.config.grid_size
    by_length: dict[int, list[tuple[int, Tensor]]] = {}
    for number, tokens in candidates:
        if is_preview_position(len(tokens), grid_size, every_rows):
            by_length.setdefault(len(tokens), []).append((number, tokens))
    for length, group in by_length.items():
        images = _partial_images(dvae, torch.stack([tokens for _, tokens in group]))
        for (number, _), pixels in zip(group, to_pixels(images), strict=True):
            yield Preview(number, length // grid_size, pixels)


def _partial_images(dvae: DiscreteVAE, image_tokens: Tensor) -> Tensor:
    """Decode whole rows of tokens [K, n, M] to images [K, 3, S, S] in [0, 1], grey below them."""
    config = dvae.config
    K, n, M = image_tokens.shape
    whole = image_tokens.new_zeros(K, config.num_positions, M)
    whole[:, :n] = image_tokens
    images = dvae.decode(whole)
    images[:, :, n // config.grid_size * config.image_size // config.grid_size :] = _UNFINISHED
    return images
