"""What several configs share: fields, sizes that follow from them, and the bounds of every number.

No torch. Letters: T text length, N positions of the image grid, V codebook size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

# Least and greatest value of each number, in every config that has it. The greatest are far beyond
# any model here; a file with a greater one is wrong, and must not be built to find out.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "image_size": (1, 4096),
    "patch_size": (1, 256),
    "num_downsamples": (0, 10),
    "num_blocks": (0, 1_000),
    "codebook_size": (1, 1 << 20),
    "num_codebooks": (1, 64),
    "code_width": (1, 65_536),
    "kl_weight": (0, 1e6),
    "commitment_weight": (0, 1e6),
    "width": (1, 65_536),
    "text_vocab_size": (1, 1 << 24),
    "text_length": (1, 65_536),
    "grid_size": (1, 1_024),
    "num_layers": (1, 1_000),
    "num_heads": (1, 1_024),
    "conv_kernel_size": (1, 1_023),
    "feed_forward_ratio": (1, 64),
    "layer_scale": (0, 1e6),
    "text_loss_weight": (0, 1e6),
    "dropout": (0, 1),
    "caption_dropout": (0, 1),
    "word_dropout": (0, 1),
    "token_noise": (0, 1),
    "embed_size": (1, 65_536),
    "vision_layers": (1, 1_000),
    "vision_width": (1, 65_536),
    "text_width": (1, 65_536),
    "text_heads": (1, 1_024),
    "text_layers": (1, 1_000),
    "vision_heads": (1, 1_024),
    "vision_feed_forward_width": (1, 1 << 20),
    "text_feed_forward_width": (1, 1 << 20),
    "image_mean": (0, 1),
    "image_std": (0.001, 1_000),
    "likelihood_weight": (0, 1e6),
    "decoder_input_width": (1, 65_536),
    "latent_channels": (1, 65_536),
    "channel_multipliers": (1, 64),
    "attention_levels": (0, 10),
}


class Bounded:
    """Base of the configs: every number within its bounds, and no other fields in a file."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = BOUNDS

    def __post_init__(self) -> None:
        for name, (least, greatest) in self.bounds.items():
            value = getattr(self, name, None)
            for number in value if isinstance(value, tuple) else (value,):
                # Written so that NaN is refused.
                if number is not None and not least <= number <= greatest:
                    raise ValueError(
                        f"{name} must be from {least:,} to {greatest:,}, got {number!r}"
                    )


class TokenGrid(Bounded):
    """Base of the image tokenizers' configs: the square grid of tokens of a square image."""

    image_size: int
    """Side of the square image, in pixels; a multiple of the stride."""

    @property
    def stride(self) -> int:
        """Pixels between two positions of the token grid."""
        raise NotImplementedError

    @cached_property
    def grid_size(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.stride

    @cached_property
    def num_positions(self) -> int:
        """N: positions of the token grid."""
        return self.grid_size**2


@dataclass(frozen=True, kw_only=True)
class SequenceFields(Bounded):
    """Base of the transformers' configs: a caption, then an image; the last group acts in training
    only."""

    text_vocab_size: int
    """Number of text token ids, padding (0) included."""
    text_length: int
    """T: text tokens per caption, padded."""
    grid_size: int
    """Side of the image-token grid; N = grid_size²."""
    codebook_size: int
    """V of the image tokenizer."""

    text_loss_weight: float = 1 / 7
    """Weight of the text tokens' loss beside the image tokens'."""
    dropout: float = 0.0
    """Share of channels dropped from the embeddings and from each branch."""
    caption_dropout: float = 0.0
    """Share of captions replaced by padding, so that guidance has an unconditional pass."""
    word_dropout: float = 0.0
    """Share of single text tokens that are hidden."""
    token_noise: float = 0.0
    """Share of input positions with random codes, so that sampling errors do less harm."""

    @cached_property
    def num_positions(self) -> int:
        """N = grid_size²"""
        return self.grid_size * self.grid_size

    @cached_property
    def length(self) -> int:
        """L: inputs of a whole sequence: BOS, the text and all image positions but the last."""
        return self.text_length + self.num_positions
