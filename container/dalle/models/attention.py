"""Self-attention over text and image tokens: its four kinds of mask and its key-value cache.

The sequence of inputs is BOS, T text tokens, then the image tokens in raster order:

    index      0    1 … T    T+1 … T+N-1
    input     BOS   text     image tokens 0 … N-2
    predicts  text …         image position n at index T+n

Letters: B batch, H heads, D head width, L sequence length = T + N, G grid size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.types import AttentionKind


def visibility(kind: AttentionKind, text_length: int, grid_size: int, kernel_size: int) -> Tensor:
    """Return the attention mask: bool [L, L], row = query, column = key, True = visible.

    Every kind is causal, and image tokens see BOS and the whole text. Of the earlier image tokens
    they see
    full: all · axial_row: those in the same row · axial_col: those in the same column ·
    conv_like: those in a window of `kernel_size` columns, centred on the query, and as many rows,
    the last of them the query's (the causal half of a convolution's window).
    """
    length = text_length + grid_size**2
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if kind == "full":
        return causal
    first = text_length + 1
    position = torch.arange(length - first)
    row, column = position // grid_size, position % grid_size
    rows_above = row[:, None] - row[None, :]
    columns_apart = (column[:, None] - column[None, :]).abs()
    seen = {
        "axial_row": rows_above == 0,
        "axial_col": columns_apart == 0,
        "conv_like": (rows_above < kernel_size) & (columns_apart <= kernel_size // 2),
    }[kind]
    visible = causal.clone()
    visible[first:, first:] &= seen
    return visible


class KeyValueCache:
    """Keys and values of a batch's inputs so far, in one preallocated pair of tensors per layer.

    One stacked tensor for all layers would be several times slower per step on a CPU.
    """

    def __init__(self, num_layers: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        """shape: [B, H, length, D]; like: a tensor of the device and dtype to use."""
        self.keys = [like.new_zeros(shape) for _ in range(num_layers)]
        self.values = [like.new_zeros(shape) for _ in range(num_layers)]
        self.filled = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, n, D] behind `filled`; return all so far, [B, H, ., D].

        The model advances `filled` once a step, after every layer has stored its keys and values.
        """
        end = self.filled + keys.shape[2]
        self.keys[layer][:, :, self.filled : end] = keys
        self.values[layer][:, :, self.filled : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def copy_from(self, prefix: KeyValueCache) -> None:
        """Copy the content of a cache of one row into every row of this one."""
        self.filled = prefix.filled
        for own, other in zip(self.keys + self.values, prefix.keys + prefix.values, strict=True):
            own[:, :, : prefix.filled] = other[:, :, : prefix.filled]


class SelfAttention(nn.Module):
    """Multi-head attention of one kind; x [B, n, width] -> the same shape."""

    visible: Tensor | None

    def __init__(
        self, width: int, num_heads: int, *, visible: Tensor | None, qk_norm: bool
    ) -> None:
        """visible: bool [L, L], or None for plain causal attention."""
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.qk_norm = qk_norm
        self.register_buffer("visible", visible, persistent=False)

    def forward(self, x: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        """x: the inputs after those in the cache; without a cache, the whole sequence."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.num_heads, self.head_width))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, n, D]
        if self.qk_norm:
            # layer_norm is one kernel; rms_norm is five, a quarter of a decoding step on a CPU.
            query = F.layer_norm(query, (self.head_width,))
            key = F.layer_norm(key, (self.head_width,))
        start = 0
        if cache is not None:
            start = cache.filled
            key, value = cache.append(layer, key, value)
        n, seen = query.shape[2], key.shape[2]
        mask = None if self.visible is None else self.visible[start : start + n, :seen]
        if mask is None and start > 0 and n > 1:
            mask = torch.ones(n, seen, dtype=torch.bool, device=x.device).tril(start)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and n > 1
        )
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected
