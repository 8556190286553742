"""Config of a transformer of DALLE-pytorch: what it does, whichever version did it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from dalle.models.config_fields import BOUNDS, SequenceFields

KIND = "dalle_pytorch"
"""The `kind` in transformer/config.json; the transformer that is trained here has none."""

LegacyAttentionKind = Literal[
    "full", "axial_row", "axial_col", "conv_centred", "conv_up_left", "sparse"
]
LEGACY_ATTENTION_KINDS: tuple[LegacyAttentionKind, ...] = get_args(LegacyAttentionKind)

LegacyNormKind = Literal["layer", "rms", "length"]
LEGACY_NORMS: tuple[LegacyNormKind, ...] = get_args(LegacyNormKind)

SPARSE_BLOCK = 16
"""Inputs along the side of a block of the sparse kind."""


@dataclass(frozen=True, kw_only=True)
class LegacyTransformerConfig(SequenceFields):
    """Fields that rebuild a `LegacyTransformer`.

    text_vocab_size is without the ids of padding by position.
    """

    kind: ClassVar[str] = KIND
    num_codebooks: ClassVar[int] = 1
    # Published models have grids of up to 64 and captions of up to 1,024. A file with two short
    # tables of positions can claim any grid, whose own table and masks have its side to the second
    # and to the fourth power.
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        **BOUNDS,
        "grid_size": (1, 128),
        "text_length": (1, 4_096),
        "head_width": (1, 4_096),
    }

    width: int
    """W: channels of the residual stream."""
    num_layers: int
    """Blocks, each of attention and feed-forward."""
    num_heads: int
    """Attention heads."""
    head_width: int
    """Channels of one attention head; any number, whatever the width."""
    attention_kinds: tuple[LegacyAttentionKind, ...] = ("full",)
    """One per layer; the list repeats when there are more layers."""
    feed_forward_ratio: int = 4
    """Inner width of the feed-forward branch, as a multiple of width."""
    norm: LegacyNormKind = "layer"
    """length: divided by the length of the vector, with one gain for all channels."""
    sandwich_norm: bool = False
    """A second norm after each branch."""
    token_shift: bool = False
    """A branch reads a part of its channels from the input before, or above in the image."""
    rotary_width: int = 0
    """Channels of each head that are rotated by their position; even."""
    reversible: bool = False
    """Two residual streams: left += attention(right), right += feed_forward(left)."""
    divide_by_max: bool = False
    """The last hidden state is divided by its greatest channel before the heads' norm."""
    padding_by_position: bool = False
    """Each text position has a padding id of its own, in the model alone."""
    hides_padding: bool = False
    """Keys of padding are hidden: from every query in full layers, from the image's in others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = self.attention_kinds
        if not kinds or set(kinds) - set(LEGACY_ATTENTION_KINDS):
            raise ValueError(f"attention_kinds must be of {LEGACY_ATTENTION_KINDS}, got {kinds}")
        if self.norm not in LEGACY_NORMS:
            raise ValueError(f"norm must be of {LEGACY_NORMS}, got {self.norm!r}")
        if self.rotary_width % 2 or not 0 <= self.rotary_width <= self.head_width:
            raise ValueError(
                f"rotary_width must be even and at most head_width = {self.head_width}, got "
                f"{self.rotary_width}"
            )
        if self.token_shift and self.width % 4:
            raise ValueError(f"width must be a multiple of 4 with token_shift, got {self.width}")

    @cached_property
    def num_sparse_blocks(self) -> int:
        """Blocks along one side of the sparse kind's layout."""
        return -(-self.length // SPARSE_BLOCK)

    def kind_of_layer(self, layer: int) -> LegacyAttentionKind:
        """Return the attention kind of a layer, counted from 0."""
        return self.attention_kinds[layer % len(self.attention_kinds)]


def is_legacy(content: object) -> bool:
    """Return whether the content of a transformer/config.json is of a `LegacyTransformer`."""
    return isinstance(content, Mapping) and content.get("kind") == KIND


def legacy_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the config with the kind before them."""
    return {"kind": KIND, **content}
