"""What every image tokenizer can do, whichever graph it has: images <-> image tokens.

The plan, the token cache, the transformer's sizes, the report and `serve` ask nothing else.
Letters: B batch, M codebooks, V codebook size, N positions of the grid, S image size.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from dalle.models.configs import ImageTokenizerConfig

_UNFINISHED = 128 / 255  # grey


class ImageTokenizer(nn.Module):
    """Base of the image tokenizers. Images are in [0, 1] here, whatever the graph computes with."""

    config: ImageTokenizerConfig

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> image tokens [B, N, M] int64 in [0, V)."""

    @abstractmethod
    def decode(self, image_tokens: Tensor) -> Tensor:
        """image tokens [B, N, M] in [0, V) -> images [B, 3, S, S] in [0, 1]."""

    def on_grid(self, vectors: Tensor) -> Tensor:
        """One vector for each position, [B, N, C] -> a feature map [B, C, grid, grid]."""
        B, _, C = vectors.shape
        grid_size = self.config.grid_size
        return vectors.transpose(1, 2).reshape(B, C, grid_size, grid_size)

    def decode_rows(self, image_tokens: Tensor) -> Tensor:
        """Whole rows of tokens [B, n, M], n <= N -> images [B, 3, S, S], grey below these rows."""
        config = self.config
        B, n, M = image_tokens.shape
        whole = image_tokens.new_zeros(B, config.num_positions, M)
        whole[:, :n] = image_tokens
        images = self.decode(whole)
        images[:, :, n // config.grid_size * config.stride :] = _UNFINISHED
        return images
