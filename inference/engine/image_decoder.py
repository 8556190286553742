"""Image tokens to pixels: finished pictures, and what is drawn of those that are not.

Letters: K candidates, n positions drawn, N positions, M codes per position, S image size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dalle.models.dvae import DiscreteVAE
from dalle.preprocess.images import Pixels
from inference.api.rendering import Preview

_UNDRAWN = 128 / 255  # grey, for the rows that are not drawn yet


def to_pixels(images: Tensor) -> list[Pixels]:
    """Images [K, 3, S, S] in [0, 1] -> K arrays [S, S, 3] of uint8."""
    rounded = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(np.ascontiguousarray(rounded.permute(0, 2, 3, 1).cpu().numpy()))


def partial_images(dvae: DiscreteVAE, image_tokens: Tensor) -> Tensor:
    """Whole rows of tokens [K, n, M] -> pictures [K, 3, S, S] in [0, 1], grey where nothing is
    drawn."""
    config = dvae.config
    K, n, M = image_tokens.shape
    whole = image_tokens.new_zeros(K, config.num_positions, M)
    whole[:, :n] = image_tokens
    images = dvae.decode(whole)
    images[:, :, n // config.grid_size * config.image_size // config.grid_size :] = _UNDRAWN
    return images


class Previews:
    """Hands on candidates while they are drawn. Called with their tokens after every position.

    first: the number of the first candidate. every_rows: rows of the grid between two previews;
    None for none. hand_on: called with each preview. seconds: what all this has taken so far.
    """

    def __init__(
        self,
        dvae: DiscreteVAE,
        first: int,
        every_rows: int | None,
        hand_on: Callable[[Preview], None],
    ) -> None:
        self.seconds = 0.0
        self._dvae = dvae
        self._first = first
        self._every_rows = every_rows
        self._hand_on = hand_on

    @property
    def most(self) -> int:
        """How often at most each candidate is decoded for a preview; never when it is finished."""
        return (self._dvae.config.grid_size - 1) // self._every_rows if self._every_rows else 0

    def __call__(self, image_tokens: Tensor) -> None:
        """image_tokens: [K, n, M], not changed."""
        config = self._dvae.config
        rows, left_over = divmod(image_tokens.shape[1], config.grid_size)
        if not self._every_rows or left_over or rows % self._every_rows:
            return
        if rows == config.grid_size:
            return
        began = time.monotonic()
        for row, pixels in enumerate(to_pixels(partial_images(self._dvae, image_tokens))):
            self._hand_on(Preview(self._first + row, rows, pixels))
        self.seconds += time.monotonic() - began
