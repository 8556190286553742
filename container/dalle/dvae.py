"""The discrete VAE: image <-> image tokens. Trained first; frozen for everything after it.

Letters: B batch, M codebooks, V codebook size, G grid size, N = G·G positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.quantiser import GumbelQuantiser, Quantiser, VectorQuantiser

QuantiserKind = Literal["gumbel", "vq"]
QUANTISERS: tuple[QuantiserKind, ...] = get_args(QuantiserKind)
ReconstructionKind = Literal["bce", "l1", "mse"]
RECONSTRUCTIONS: tuple[ReconstructionKind, ...] = get_args(ReconstructionKind)


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

        if self.colour_split and (
            self.num_codebooks < 2 or self.patch_size < 2 or self.num_downsamples
        ):
            raise ValueError(
                "colour_split needs num_codebooks > 1, patch_size > 1 and num_downsamples = 0, got "
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


class PositionNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position apart; [B, C, H, W] -> the same.

    Not GroupNorm: statistics over all positions would let the rest of the image into a code that
    is to be a function of its own patch.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Feature maps are kept channels-last, so that this moves no data.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + a pointwise network of its norm and its neighbours'; [B, C, H, W] -> the same.

    The neighbours come in by a depthwise convolution, as in ConvNeXt (Liu et al. 2022): at equal
    width it costs an eighth of a dense one, and on a CPU that decides how wide one can be.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = PositionNorm(width)
        self.spatial = (
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
            if kernel_size > 1
            else nn.Identity()
        )
        self.expand = nn.Conv2d(width, width, kernel_size=1)
        self.contract = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.contract(F.relu(self.expand(self.spatial(self.norm(x)))))
        return x + added


class JointEncoder(nn.Module):
    """Images -> one feature map, which every codebook sees."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        width, kernel_size = config.width, config.encoder_kernel_size
        self.num_codebooks = config.num_codebooks
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(3 * config.patch_size**2, width, kernel_size=1),
            *_blocks(config, kernel_size),
        )
        for _ in range(config.num_downsamples):
            self.layers.append(nn.Conv2d(width, width, kernel_size=2, stride=2))
            self.layers.extend(_blocks(config, kernel_size))

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [0, 1] -> M of [B, C, G, G]"""
        return [self.layers(images * 2 - 1)] * self.num_codebooks


class SplitEncoder(nn.Module):
    """Images -> a feature map of the patches' end colours, and one of their patterns.

    The parting is that of block texture compression (S3TC, Iourcha et al. 1999): a patch is two
    end colours and, for each pixel, where it lies between them. The end colours are those of its
    darkest and its lightest pixel.
    """

    luminance: Tensor

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch_size, self.num_codebooks = config.patch_size, config.num_codebooks
        kernel_size = config.encoder_kernel_size
        self.colour_layers = nn.Sequential(
            nn.Conv2d(6, config.width, kernel_size=1), *_blocks(config, kernel_size)
        )
        self.pattern_layers = nn.Sequential(
            nn.Conv2d(config.patch_size**2, config.width, kernel_size=1),
            *_blocks(config, kernel_size),
        )
        weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
        self.register_buffer("luminance", weights, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, S, S] in [0, 1] -> M of [B, C, G, G], the first of the colours"""
        unshuffled = F.pixel_unshuffle(images, self.patch_size)
        B, _, G, _ = unshuffled.shape
        patches = unshuffled.reshape(B, 3, -1, G, G)
        light = torch.einsum("bcpij,c->bpij", patches, self.luminance)
        darkest, lightest = light.argmin(dim=1, keepdim=True), light.argmax(dim=1, keepdim=True)
        low, high = light.gather(1, darkest), light.gather(1, lightest)
        # A flat patch has no pattern: all zeros, and not noise blown up.
        pattern = (light - low) / (high - low).clamp_min(1 / 64)
        ends = [
            patches.gather(2, index[:, None].expand(-1, 3, -1, -1, -1)).squeeze(2)
            for index in (darkest, lightest)
        ]
        colour_map = self.colour_layers(torch.cat(ends, dim=1) * 2 - 1)
        pattern_map = self.pattern_layers(pattern * 2 - 1)
        return [colour_map, *[pattern_map] * (self.num_codebooks - 1)]


class DiscreteVAE(nn.Module):
    """Encoder, quantiser, decoder. Takes and gives images in [0, 1]; centres them by itself."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        patch, width = config.patch_size, config.width
        self.encoder = SplitEncoder(config) if config.colour_split else JointEncoder(config)
        self.quantiser = self._build_quantiser()
        code_channels = config.num_codebooks * config.code_width
        self.decoder = nn.Sequential(
            nn.Conv2d(code_channels, width, kernel_size=1),
            *_blocks(config, config.decoder_kernel_size),
        )
        for _ in range(config.num_downsamples):
            self.decoder.append(nn.ConvTranspose2d(width, width, kernel_size=2, stride=2))
            self.decoder.extend(_blocks(config, config.decoder_kernel_size))
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

    def loss(self, images: Tensor, progress: float) -> DVAELoss:
        """images: [B, 3, S, S] in [0, 1]; progress: share of the training done, in [0, 1]."""
        quantised = self.quantiser(self.encoder(images), progress)
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


def _blocks(config: DVAEConfig, kernel_size: int) -> list[nn.Module]:
    return [ResidualBlock(config.width, kernel_size) for _ in range(config.num_blocks)]
