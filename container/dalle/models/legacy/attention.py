"""Attention of DALLE-pytorch's transformers: what a query sees, and the inputs of one call.

Letters: B sequences, n inputs of one call, R = B or 1 where all sequences are at the same input,
L inputs of a whole sequence, T text length, G grid size, W width, H heads, D head width, r rotated
channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.layers import KeyValueCache, visibility
from dalle.models.legacy.config import (
    SPARSE_BLOCK,
    LegacyAttentionKind,
    LegacyTransformerConfig,
)
from dalle.types import AttentionKind

_CONV_KERNEL = 5


def legacy_visibility(
    kind: LegacyAttentionKind, config: LegacyTransformerConfig, layout: Tensor | None = None
) -> Tensor:
    """Return the attention mask: bool [L, L], row = query, column = key, True = visible.

    As `dalle.models.layers.visibility`, with three kinds more: conv_centred: a window of 5 by 5
    around the query, as far as it is before it · conv_up_left: a window of 5 by 5 that ends at the
    query · sparse: the blocks of `layout`, [blocks, blocks].
    """
    T, G = config.text_length, config.grid_size
    plain: AttentionKind = kind if kind in ("axial_row", "axial_col") else "full"
    visible = visibility(plain, T, G, _CONV_KERNEL)
    length = len(visible)
    if kind == "sparse":
        assert layout is not None, "the sparse kind has a layout"
        for axis in (0, 1):
            layout = layout.repeat_interleave(SPARSE_BLOCK, dim=axis)
        visible &= layout[:length, :length]
    elif kind in ("conv_centred", "conv_up_left"):
        position = torch.arange(length - T - 1)
        row, column = position // G, position % G
        up, left = row[:, None] - row, column[:, None] - column
        if kind == "conv_centred":
            seen = (up <= _CONV_KERNEL // 2) & (left.abs() <= _CONV_KERNEL // 2)
        else:
            seen = (up < _CONV_KERNEL) & (left >= 0) & (left < _CONV_KERNEL)
        visible[T + 1 :, T + 1 :] &= seen
    return visible


class LegacyCache(KeyValueCache):
    """Keys and values of B sequences, the channels that token shift reads, and hidden padding."""

    def __init__(self, config: LegacyTransformerConfig, num_rows: int, like: Tensor) -> None:
        shape = (num_rows, config.num_heads, config.length, config.head_width)
        super().__init__(config.num_layers, shape, like)
        before = (num_rows, config.length, config.width // 2)
        num_branches = 2 * config.num_layers if config.token_shift else 0
        self.before = [like.new_zeros(before) for _ in range(num_branches)]
        self.is_hidden: Tensor | None = None
        if config.hides_padding:
            self.is_hidden = like.new_zeros(num_rows, config.length, dtype=torch.bool)

    def tensors(self) -> list[Tensor]:
        """Return all tensors; sequences are their first dimension."""
        hidden = [] if self.is_hidden is None else [self.is_hidden]
        return [*self.keys, *self.values, *self.before, *hidden]


@dataclass
class Inputs:
    """The inputs of one call: their places in the sequence, and what came before them."""

    config: LegacyTransformerConfig
    numbers: Tensor
    """Number of each input in its sequence, [R, n]."""
    num_keys: int
    """Inputs up to the last of them."""
    visible: dict[str, Tensor]
    """Mask [L, L] of each kind."""
    angles: Tensor | None
    """[L, r], or None."""
    cache: LegacyCache | None = None
    """None: the inputs are whole sequences from the beginning."""
    rows: Tensor | None = None
    """Sequences of the cache, [B]."""
    block: slice | None = None
    """The same where they lie side by side: their keys are then read where they are."""
    is_hidden: Tensor | None = None
    """Keys that are hidden, [B, L], or None."""
    _masks: dict[str, Tensor] = field(default_factory=dict)

    def mask(self, kind: LegacyAttentionKind) -> Tensor:
        """Return the mask of a kind, [R or B, 1, n, keys]: bool, or what is added to the scores."""
        if kind not in self._masks:
            self._masks[kind] = self._mask(kind)
        return self._masks[kind]

    def _mask(self, kind: LegacyAttentionKind) -> Tensor:
        visible = self.visible[kind][self.numbers][:, None, :, : self.num_keys]
        if self.is_hidden is None:
            return visible
        hidden = self.is_hidden[:, None, None, : self.num_keys]
        if kind == "sparse":
            # DeepSpeed added the mask, a number of 0 or 1, to the scores.
            return hidden.float().masked_fill(~visible, -torch.inf)
        if kind != "full":
            hidden = hidden & (self.numbers > self.config.text_length)[:, None, :, None]
        return visible & ~hidden

    def rotated(self, x: Tensor) -> Tensor:
        """Rotate pairs of the first channels of queries, keys or values [B, H, n, D]."""
        if self.angles is None:
            return x
        angles = self.angles[self.numbers][:, None]
        r = angles.shape[-1]
        turned, rest = x[..., :r], x[..., r:]
        first, second = turned.reshape(*turned.shape[:-1], r // 2, 2).unbind(-1)
        quarter = torch.stack([-second, first], dim=-1).flatten(-2)
        return torch.cat([turned * angles.cos() + quarter * angles.sin(), rest], dim=-1)

    def with_earlier(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [B, H, n, D]; return those of all inputs so far."""
        if self.cache is None or self.rows is None:
            return key, value
        found = []
        for table, new in ((self.cache.keys[layer], key), (self.cache.values[layer], value)):
            table[self.rows[:, None], :, self.numbers] = new.transpose(1, 2)
            found.append(table[self.block or self.rows, :, : self.num_keys])
        return found[0], found[1]

    def shifted(self, x: Tensor, branch: int) -> Tensor:
        """Return x [B, n, W] with half of its channels from other inputs of its sequence.

        Of text the first half is the input's before. In the image the first quarter is that of the
        position above and the second quarter of the one to the left; beyond the edge it is 0.
        """
        G, first = self.config.grid_size, self.config.text_length + 1
        half = x.shape[-1] // 2
        moved = x[..., :half]
        if self.cache is None or self.rows is None:
            n = x.shape[1]
            left = F.pad(moved, (0, 0, 1, 0))[:, :n]
            above = F.pad(moved, (0, 0, G, 0))[:, :n]
        else:
            table, rows = self.cache.before[branch], self.rows[:, None]
            table[rows, self.numbers] = moved
            left = table[rows, (self.numbers - 1).clamp(min=0)]
            above = table[rows, (self.numbers - G).clamp(min=0)]
        place = self.numbers - first
        is_image = (place >= 0)[..., None]
        is_edge = (self.numbers == 0) | ((place >= 0) & (place % G == 0))
        left = left.masked_fill(is_edge[..., None], 0)
        above = above.masked_fill((place < G)[..., None], 0)
        above, beside = above[..., : half // 2], left[..., half // 2 :]
        shifted = torch.where(is_image, torch.cat([above, beside], dim=-1), left)
        return torch.cat([shifted, x[..., half:]], dim=-1)


class LegacyAttention(nn.Module):
    """Multi-head attention of one kind; [B, n, W] -> the same shape."""

    def __init__(self, config: LegacyTransformerConfig, layer: int) -> None:
        super().__init__()
        inner = config.num_heads * config.head_width
        self._kind, self._layer = config.kind_of_layer(layer), layer
        self._heads = (3, config.num_heads, config.head_width)
        self.to_qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.width)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """x: of the inputs, which are kept in their cache."""
        query, key, value = (
            inputs.rotated(each)
            for each in self.to_qkv(x).unflatten(-1, self._heads).permute(2, 0, 3, 1, 4)
        )
        key, value = inputs.with_earlier(self._layer, key, value)
        mask = inputs.mask(self._kind)
        if mask.is_floating_point():
            mask = mask.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected
