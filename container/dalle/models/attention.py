"""Self-attention over text then image tokens, its four kinds, and the key-value cache.

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
    """Which inputs each index may look at: bool [L, L], row = query, True = seen.

    Text is causal in every kind, and an image token sees BOS and the whole text. Among image
    tokens, never the future, and of the past:
    full: everything · axial_row: its own row · axial_col: its own column ·
    conv_like: a window of `kernel_size` columns centred on its own and as many rows, the last of
    them its own (the causal half of a convolution's window).
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
    """Keys and values of the inputs seen so far, of one batch: static tensors, one pair a layer.

    One tensor a layer, not one for all: a stacked tensor is several times slower to step on a CPU.
    """

    def __init__(self, num_layers: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        """shape: [B, H, length, D]; like: a tensor of the device and dtype to use."""
        self.keys = [like.new_zeros(shape) for _ in range(num_layers)]
        self.values = [like.new_zeros(shape) for _ in range(num_layers)]
        self.filled = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, n, D] behind `filled`; returns all so far, [B, H, ., D].

        `filled` itself moves once a step, by the model, when every layer has stored its own.
        """
        end = self.filled + keys.shape[2]
        self.keys[layer][:, :, self.filled : end] = keys
        self.values[layer][:, :, self.filled : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def copy_from(self, prefix: KeyValueCache) -> None:
        """Begin with what a cache of one row holds, in every row of this one."""
        self.filled = prefix.filled
        for own, other in zip(self.keys + self.values, prefix.keys + prefix.values, strict=True):
            own[:, :, : prefix.filled] = other[:, :, : prefix.filled]


class SelfAttention(nn.Module):
    """Multi-head attention of one kind; x [B, n, width] -> the same."""

    visible: Tensor | None

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        visible: Tensor | None,
        qk_norm: bool,
    ) -> None:
        """visible: bool [L, L], or None for plain causal attention."""
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.qk_norm = qk_norm
        self.register_buffer("visible", visible, persistent=False)

    def forward(self, x: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        """With a cache, x are the inputs that follow what it holds; without, the whole sequence."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.num_heads, self.head_width))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, n, D]
        if self.qk_norm:
            # layer_norm is one kernel; rms_norm is five on a CPU, a quarter of a decoding step.
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
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and n > 1,
        )
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected
