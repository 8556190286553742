"""Config of the transformer: the fields of `transformer/config.json`. No torch.

Letters: T text length, N positions of the image grid, M codebooks (codes per position), V codebook
size, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle.types import (
    ATTENTION_KINDS,
    FEED_FORWARD_KINDS,
    AttentionKind,
    FeedForwardKind,
    NormKind,
)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Fields that rebuild a `Dalle`; the last group acts in training only."""

    text_vocab_size: int
    """Number of text token ids, padding (0) included."""
    text_length: int
    """T: text tokens per caption, padded."""
    grid_size: int
    """Side of the image-token grid; N = grid_size²."""
    codebook_size: int
    """V of the dVAE."""
    num_codebooks: int = 1
    """M of the dVAE."""

    width: int = 512
    """W: channels of the residual stream."""
    num_layers: int = 12
    """Blocks, each of attention and feed-forward."""
    num_heads: int = 8
    """Attention heads; width is a multiple of them."""
    attention_kinds: tuple[AttentionKind, ...] = ("full",)
    """One per layer; the list repeats when there are more layers."""
    conv_kernel_size: int = 5
    """Window of the conv_like kind."""
    qk_norm: bool = True
    """Normalise queries and keys before their product (Dehghani et al. 2023, §2)."""
    norm: NormKind = "layer"
    """Normalisation before each branch and before the heads."""
    feed_forward: FeedForwardKind = "relu2"
    """Activation of the feed-forward branch."""
    feed_forward_ratio: int = 4
    """Inner width of the feed-forward branch, as a multiple of width."""
    layer_scale: float | None = None
    """Start value of a learned gain per channel on each branch; None for no gain."""
    target_position: bool = True
    """Add to each input the embedding of the grid position that it predicts."""

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

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads = {self.num_heads}, got {self.width}"
            )
        if not self.attention_kinds or set(self.attention_kinds) - set(ATTENTION_KINDS):
            raise ValueError(
                f"attention_kinds must be of {ATTENTION_KINDS}, got {self.attention_kinds}"
            )
        if self.feed_forward not in FEED_FORWARD_KINDS:
            raise ValueError(
                f"feed_forward must be of {FEED_FORWARD_KINDS}, got {self.feed_forward!r}"
            )

    @property
    def num_positions(self) -> int:
        """N = grid_size²"""
        return self.grid_size * self.grid_size

    @property
    def length(self) -> int:
        """Inputs of a whole sequence: BOS, the text and all image positions but the last."""
        return self.text_length + self.num_positions

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    def kind_of_layer(self, layer: int) -> AttentionKind:
        """Return the attention kind of a layer, counted from 0."""
        return self.attention_kinds[layer % len(self.attention_kinds)]
