"""Layers of the transformer, chosen by its config.

Letters: B batch, n inputs of one call, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.types import FeedForwardKind, NormKind


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
