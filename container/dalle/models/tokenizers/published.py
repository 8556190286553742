"""Base of the image tokenizers that others published: never trained here, and computed exactly.

Letters: B batch, M codebooks, V codebook size, N positions of the grid, S image size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dalle.models.image_tokenizer import ImageTokenizer


class PublishedTokenizer(ImageTokenizer):
    """Encodes and decodes in float32 whatever surrounds it.

    Rounded to fewer digits, as autocast and the TF32 convolutions of GPUs do, some images would
    have other tokens.
    """

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> image tokens [B, N, M] int64 in [0, V)."""
        with _in_float32(images.device):
            return self._encode(images)

    def decode(self, image_tokens: Tensor) -> Tensor:
        """image tokens [B, N, M] in [0, V) -> images [B, 3, S, S] in [0, 1]."""
        with _in_float32(image_tokens.device):
            return self._decode(image_tokens)

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, image_tokens: Tensor) -> Tensor: ...


@contextmanager
def _in_float32(device: torch.device) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
