"""Layers of the models: attention with its masks and cache, feed-forward, residual blocks.

The sequence of a transformer's inputs is BOS, T text tokens, then the image tokens in raster order:

    index      0    1 … T    T+1 … T+N-1
    input     BOS   text     image tokens 0 … N-2
    predicts  text …         image position n at index T+n

Letters: B batch, n inputs of one call, W width, H heads, D head width, L sequence length = T + N,
G grid size, M codebooks, V codebook size, E code width; of feature maps C channels, H and W sides.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.configs import DVAEConfig
from dalle.types import AttentionKind, FeedForwardKind, NormKind


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


def build_norm(kind: NormKind, width: int) -> nn.Module:
    """Return a normalisation over the last dimension with learned gains."""
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=1e-6)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them; [B, n, W] -> the same shape.

    gelu: as in GPT. geglu: half of the inner channels gate the other half (Shazeer 2020).
    relu2: squared ReLU (So et al. 2021), the cheapest.
    """

    def __init__(self, width: int, ratio: int, kind: FeedForwardKind) -> None:
        super().__init__()
        self.kind = kind
        inner = ratio * width
        self.expand = nn.Linear(width, 2 * inner if kind == "geglu" else inner)
        self.contract = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        match self.kind:
            case "gelu":
                x = F.gelu(x)
            case "geglu":
                x, gate = x.chunk(2, dim=-1)
                x = x * F.gelu(gate)
            case "relu2":
                x = F.relu(x)
                x = x * x  # autocast would compute and keep `square` in fp32 on a GPU
        contracted: Tensor = self.contract(x)
        return contracted


class ChannelDropout(nn.Module):
    """Dropout of whole channels, the same at all positions of a sample (Gal & Ghahramani 2016).

    Regularises as well here as independent dropout, whose random numbers cost a quarter of a
    training step on a CPU; these cost nothing measurable.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, n, W]"""
        if not self.training or self.share == 0.0:
            return x
        keep = 1.0 - self.share
        kept = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) < keep
        return x * kept.to(x.dtype).div_(keep)


class LayerScale(nn.Module):
    """A learned gain per channel (Touvron et al. 2021) with one start value."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class PositionNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position; [B, C, H, W] -> the same shape.

    Not GroupNorm: with statistics over all positions a code would depend on the whole image, not
    on one patch.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Feature maps are channels-last, so the permutations move no data.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Norm, depthwise convolution and pointwise network around a residual connection.

    [B, C, H, W] -> the same shape. Depthwise as in ConvNeXt (Liu et al. 2022): at equal width it
    costs an eighth of a dense convolution, which on a CPU decides how wide a block can be.
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


def residual_blocks(config: DVAEConfig, kernel_size: int) -> list[nn.Module]:
    """Return the config's number of residual blocks."""
    return [ResidualBlock(config.width, kernel_size) for _ in range(config.num_blocks)]


def embed_codes(codebooks: Tensor, image_tokens: Tensor) -> Tensor:
    """Codebooks [M, V, E], image tokens [B, G·G, M] -> feature map [B, M·E, G, G]."""
    chosen = [F.embedding(image_tokens[..., m], book) for m, book in enumerate(codebooks)]
    joined = torch.cat(chosen, dim=-1).mT
    grid_size = math.isqrt(joined.shape[-1])
    return joined.reshape(*joined.shape[:2], grid_size, grid_size)
