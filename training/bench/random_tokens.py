"""The stage whose steps benchmarks of training measure: a transformer on random tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle.models.transformer import Dalle, TransformerConfig


class RandomTokens:
    """An untrained transformer, and the same random tokens in every step.

    Letters: B pairs, T text length, N positions, M codebooks.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, device: torch.device) -> None:
        """Make the model on the CPU, and text tokens [B, T] and image tokens [B, N, M]."""
        torch.manual_seed(0)
        self.model = Dalle(config)
        shape = (batch_size, config.text_length)
        self.text_tokens = torch.randint(1, config.text_vocab_size, shape, device=device)
        places = (batch_size, config.num_positions, config.num_codebooks)
        self.image_tokens = torch.randint(config.codebook_size, places, device=device)

    def loss(self, batch: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(self.text_tokens, self.image_tokens).total, {}
