"""Discrete VAE: images <-> image tokens. Trained first and frozen for the other two stages.

Letters: B batch, M codebooks, V codebook size, G grid size, N = G·G positions, S image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.configs import DVAEConfig as DVAEConfig
from dalle.models.encoders import build_encoder
from dalle.models.image_tokenizer import ImageTokenizer
from dalle.models.layers import embed_codes, residual_blocks
from dalle.models.quantiser import build_quantiser
from dalle.models.reduction import ONE_RANK, Ranks


@dataclass(frozen=True)
class DVAELoss:
    """Scalars of one training step."""

    total: Tensor
    reconstruction: Tensor
    quantiser: Tensor
    """The quantiser's own terms: KL divergence or commitment."""


class DiscreteVAE(ImageTokenizer):
    """Encoder, quantiser and decoder between images in [0, 1] and image tokens."""

    config: DVAEConfig

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = config.patch_size, config.width
        self.encoder = build_encoder(config)
        self.quantiser = build_quantiser(config)
        code_channels = config.num_codebooks * config.code_width
        self.decoder = nn.Sequential(
            nn.Conv2d(code_channels, width, kernel_size=1),
            *residual_blocks(config, config.decoder_kernel_size),
        )
        for _ in range(config.num_downsamples):
            self.decoder.append(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2))
            self.decoder.extend(residual_blocks(config, config.decoder_kernel_size))
        self.decoder.extend([nn.Conv2d(width, 3 * patch**2, kernel_size=1), nn.PixelShuffle(patch)])
        # PositionNorm is fastest in this layout.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def muon_parameters(self) -> list[nn.Parameter]:
        """Return no parameters: AdamW trains all of them."""
        return []

    def loss(self, images: Tensor, progress: float, ranks: Ranks = ONE_RANK) -> DVAELoss:
        """Return the losses of a training step.

        images: [B, 3, S, S] in [0, 1]; progress: share of the training that is done, in [0, 1].
        """
        quantised = self.quantiser(self.encoder(images), progress, ranks)
        logits = self.decoder(quantised.embeddings)
        reconstruction = self._reconstruction_loss(logits, images)
        return DVAELoss(reconstruction + quantised.loss, reconstruction, quantised.loss)

    def reconstruction_loss(self, images: Tensor) -> Tensor:
        """Return the scalar loss of reconstructing images [B, 3, S, S] in [0, 1]."""
        return self._reconstruction_loss(self._logits(self.encode(images)), images)

    def _reconstruction_loss(self, logits: Tensor, images: Tensor) -> Tensor:
        match self.config.reconstruction:
            case "bce":
                return F.binary_cross_entropy_with_logits(logits, images)
            case "l1":
                return F.l1_loss(logits.sigmoid(), images)
            case "mse":
                return F.mse_loss(logits.sigmoid(), images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [0, 1] -> image tokens [B, N, M] int64 in [0, V)."""
        return self.quantiser.tokens(self.encoder(images))

    @torch.no_grad()
    def decode(self, image_tokens: Tensor) -> Tensor:
        """image tokens [B, N, M] in [0, V) -> images [B, 3, S, S] in [0, 1]."""
        return self._logits(image_tokens).sigmoid()

    def _logits(self, image_tokens: Tensor) -> Tensor:
        """image tokens [B, N, M] -> [B, 3, S, S]"""
        logits: Tensor = self.decoder(embed_codes(self.quantiser.codebook, image_tokens))
        return logits
