"""Configs of the published image tokenizers, and the `kind` by which `dvae/config.json` names one.

No torch. A file without a `kind` is of the dVAE that is trained here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from pydantic import TypeAdapter

from dalle.models.config_fields import TokenGrid
from dalle.models.configs import DVAEConfig, ImageTokenizerConfig
from dalle.types import VQGAN_QUANTISERS, ImageTokenizerKind, VQGANQuantiserKind

KIND = "kind"


@dataclass(frozen=True, kw_only=True)
class _Published(TokenGrid):
    """Base: one code per position."""

    num_codebooks: ClassVar[int] = 1

    image_size: int
    """Side of the square image, in pixels; a multiple of the stride."""
    codebook_size: int
    """V: number of codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size must be a multiple of {self.stride}, the pixels per code of this "
                f"image tokenizer, got {self.image_size}"
            )


@dataclass(frozen=True, kw_only=True)
class DallePytorchConfig(_Published):
    """Fields that rebuild a `DallePytorchVAE`."""

    kind: ClassVar[ImageTokenizerKind] = "dalle_pytorch"

    num_downsamples: int
    """How often the side is halved."""
    width: int
    """Channels of every feature map."""
    num_blocks: int
    """Residual blocks of the encoder; as many in the decoder."""
    code_width: int
    """Width of one code's embedding."""
    is_normalised: bool = True
    """Whether the graph computes with images in [-1, 1]; before 0.2.5 they were in [0, 1]."""

    @property
    def stride(self) -> int:
        """Pixels between two positions of the token grid."""
        return 1 << self.num_downsamples


@dataclass(frozen=True, kw_only=True)
class OpenAIConfig(_Published):
    """Fields that rebuild an `OpenAIDVAE`."""

    kind: ClassVar[ImageTokenizerKind] = "openai"

    width: int
    """Channels of the first group of the encoder and of the last one of the decoder."""
    decoder_input_width: int
    """Channels of the decoder's first feature map."""
    num_blocks: int
    """Residual blocks in each of the four groups."""

    @property
    def stride(self) -> int:
        """Pixels between two positions of the token grid."""
        return 8


@dataclass(frozen=True, kw_only=True)
class VQGANConfig(_Published):
    """Fields that rebuild a `VQGAN`."""

    kind: ClassVar[ImageTokenizerKind] = "vqgan"

    width: int
    """Channels at full resolution, before the multipliers."""
    channel_multipliers: tuple[int, ...]
    """Channels at each level, in widths; the side is halved between two levels."""
    num_blocks: int
    """Residual blocks at each level of the encoder; the decoder has one more."""
    attention_levels: tuple[int, ...]
    """Levels, counted from 0, whose blocks are followed by attention."""
    latent_channels: int
    """Channels that the encoder ends with and the decoder begins with."""
    code_width: int
    """Width of one code's embedding."""
    quantiser: VQGANQuantiserKind
    """nearest: nearest code. cosine: nearest code by angle. gumbel: code with the largest logit."""

    def __post_init__(self) -> None:
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers must have one number for each level, got none")
        super().__post_init__()
        if self.quantiser not in VQGAN_QUANTISERS:
            raise ValueError(f"quantiser must be one of {VQGAN_QUANTISERS}, got {self.quantiser!r}")
        if self.quantiser == "gumbel" and self.code_width != self.latent_channels:
            raise ValueError(
                f"code_width must be latent_channels = {self.latent_channels} with "
                f"quantiser=gumbel, got {self.code_width}"
            )

    @property
    def stride(self) -> int:
        """Pixels between two positions of the token grid."""
        return 1 << (len(self.channel_multipliers) - 1)


_CONFIGS: dict[ImageTokenizerKind, type] = {
    each.kind: each for each in (DVAEConfig, DallePytorchConfig, OpenAIConfig, VQGANConfig)
}


def parse_config(content: object) -> ImageTokenizerConfig:
    """Return the config of `dvae/config.json`. Raises ValueError naming the field at fault."""
    if not isinstance(content, Mapping):
        raise ValueError("the config is not a JSON object")
    fields = dict(content)
    kind = fields.pop(KIND, DVAEConfig.kind)
    if not isinstance(kind, str) or kind not in _CONFIGS:
        raise ValueError(f"{KIND} must be one of {', '.join(_CONFIGS)}, got {str(kind)[:60]!r}")
    config: ImageTokenizerConfig = TypeAdapter(_CONFIGS[kind]).validate_python(fields)
    return config


def config_content(config: ImageTokenizerConfig) -> dict[str, Any]:
    """Return the content of `dvae/config.json`; without `kind` for the dVAE that is trained here,
    so that earlier versions read it."""
    fields = asdict(config)  # type: ignore[call-overload]
    return fields if config.kind == DVAEConfig.kind else {KIND: config.kind, **fields}
