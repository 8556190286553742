"""The discrete VAE: image <-> image tokens. Trained first; frozen for everything after it.

Letters: B batch, M codebooks, V codebook size, G grid size, N = G·G positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.encoders import blocks, build_encoder
from dalle.models.quantiser import GumbelQuantiser, Quantiser, VectorQuantiser
from dalle.models.reduction import ONE_RANK, Ranks
from dalle.types import QUANTISERS, RECONSTRUCTIONS, QuantiserKind, ReconstructionKind


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Everything that rebuilds a `DiscreteVAE`."""

    image_size: int = 256
    """Side of the square image, in pixels."""
    patch_size: int = 1
    """Side of the pixel square that the first layer takes as one position."""
    num_downsamples: int = 3
    """How often the side is halved after the first layer."""
    width: int = 128
    """Channels of every feature map."""
    num_blocks: int = 2
    """Residual blocks after the first layer and after each halving; as many in the decoder."""
    encoder_kernel_size: int = 3
    """3 lets a code depend on its surroundings; 1 makes it a function of its own patch alone,
    so that the same patch is always the same token (easier for the transformer to predict)."""
    decoder_kernel_size: int = 3
    """3 lets the decoder paint with the neighbouring tokens in view."""
    codebook_size: int = 8192
    """V: how many codes there are to choose from."""
    num_codebooks: int = 1
    """M: codes per position; V to the power M patches can be told apart."""
    code_width: int = 64
    """Width of one code's embedding."""
    colour_split: bool = False
    """The first codebook sees a patch's two end colours, the others the pattern between them, so
    that a pattern has the same tokens in every colour. For drawings, logos and other pictures of
    few colours; needs num_codebooks > 1, patch_size > 1 and num_downsamples = 0."""
    ground_split: bool = False
    """Instead of colour_split: the last codebook sees a patch's colours, the others only which
    pixels are drawn, that is differ from the picture's ground (the median of its border). Then a
    pattern has the same tokens in stripes as in one colour. For drawings on an even ground."""
    quantiser: QuantiserKind = "gumbel"
    """The relaxation of the DALL-E paper, or nearest neighbour with straight-through gradient."""
    reconstruction: ReconstructionKind = "mse"
    """bce suits flat graphics with hard edges, l1 and mse photographs."""
    kl_weight: float = 0.0
    """Weight of KL(q(code | image) || uniform), gumbel only, per code in nats."""
    commitment_weight: float = 0.25
    """Weight of the encoder's distance to its chosen code, vq only."""

    def __post_init__(self) -> None:
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size must be a multiple of patch_size · 2^num_downsamples = {self.stride}, "
                f"got {self.image_size}"
            )
        for name, known in (("quantiser", QUANTISERS), ("reconstruction", RECONSTRUCTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("encoder_kernel_size", "decoder_kernel_size"):
            if getattr(self, name) not in (1, 3):
                raise ValueError(f"{name} must be 1 or 3, got {getattr(self, name)}")

        if self.colour_split and self.ground_split:
            raise ValueError("colour_split and ground_split exclude each other; set one of them")
        for name in ("colour_split", "ground_split"):
            if getattr(self, name) and (
                self.num_codebooks < 2 or self.patch_size < 2 or self.num_downsamples
            ):
                raise ValueError(
                    f"{name} needs num_codebooks > 1, patch_size > 1 and num_downsamples = 0, got "
                    f"{self.num_codebooks}, {self.patch_size} and {self.num_downsamples}"
                )

    @property
    def stride(self) -> int:
        """Pixels between two positions of the token grid."""
        return self.patch_size * int(2**self.num_downsamples)

    @property
    def grid_size(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.stride

    @property
    def num_positions(self) -> int:
        """N: positions of the token grid."""
        return self.grid_size**2


@dataclass(frozen=True)
class DVAELoss:
    """Scalars of one training step."""

    total: Tensor
    reconstruction: Tensor
    quantiser: Tensor
    """The quantiser's own terms: KL divergence or commitment."""


class DiscreteVAE(nn.Module):
    """Encoder, quantiser, decoder. Takes and gives images in [0, 1]; centres them by itself."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = config.patch_size, config.width
        self.encoder = build_encoder(config)
        self.quantiser = self._build_quantiser()
        code_channels = config.num_codebooks * config.code_width
        self.decoder = nn.Sequential(
            nn.Conv2d(code_channels, width, kernel_size=1),
            *blocks(config, config.decoder_kernel_size),
        )
        for _ in range(config.num_downsamples):
            self.decoder.append(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2))
            self.decoder.extend(blocks(config, config.decoder_kernel_size))
        self.decoder.extend([nn.Conv2d(width, 3 * patch**2, kernel_size=1), nn.PixelShuffle(patch)])
        # Feature maps then stay in the layout that PositionNorm wants.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _build_quantiser(self) -> Quantiser:
        config = self.config
        sizes = (config.width, config.num_codebooks, config.codebook_size, config.code_width)
        if config.quantiser == "gumbel":
            return GumbelQuantiser(*sizes, kl_weight=config.kl_weight)
        return VectorQuantiser(*sizes, commitment_weight=config.commitment_weight)

    def muon_parameters(self) -> list[nn.Parameter]:
        """None: trained by AdamW alone."""
        return []

    def loss(self, images: Tensor, progress: float, ranks: Ranks = ONE_RANK) -> DVAELoss:
        """images: [B, 3, S, S] in [0, 1]; progress: share of the training done, in [0, 1]."""
        quantised = self.quantiser(self.encoder(images), progress, ranks)
        logits = self.decoder(quantised.embeddings)
        reconstruction = self._reconstruction_loss(logits, images)
        return DVAELoss(reconstruction + quantised.loss, reconstruction, quantised.loss)

    def reconstruction_loss(self, images: Tensor) -> Tensor:
        """How far images [B, 3, S, S] in [0, 1] are from what their tokens decode to, scalar."""
        image_tokens = self.encode(images)
        embeddings = self.quantiser.embed(image_tokens, self.config.grid_size)
        return self._reconstruction_loss(self.decoder(embeddings), images)

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
        logits: Tensor = self.decoder(self.quantiser.embed(image_tokens, self.config.grid_size))
        return logits.sigmoid()
