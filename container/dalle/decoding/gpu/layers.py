"""Layers of a model that launch the kernels of `dalle.decoding.gpu.kernels`.

Letters: S slots, W width, F inner width, K inputs and N outputs of a matrix.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn

from dalle.decoding.gpu.kernels import activate, normalise
from dalle.decoding.model_parts import BlockParts, earlier_table
from dalle.models.layers import FeedForward
from dalle.models.transformer import CodeHead

_INNER = 1024  # channels of one program of `activate`

Room = tuple[Tensor, Tensor]
"""Memory for a feed-forward layer's channels before and after its activation."""


class Linear:
    """A linear layer in the model's memory; the kernel after it adds the bias."""

    def __init__(self, linear: nn.Linear, gain: Tensor | None = None) -> None:
        """gain: [N], of the branch whose last layer this is."""
        weight = linear.weight.detach()
        self.transposed = weight.t()  # [K, N]
        self.bias = weight.new_zeros(0) if linear.bias is None else linear.bias.detach()
        self.gain = gain

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Compute out [S, N] from x [S, K], without the bias."""
        torch.mm(x, self.transposed, out=out)


class Norm:
    """A norm of the residual stream."""

    def __init__(self, norm: nn.Module) -> None:
        assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
        assert norm.eps is not None
        self.epsilon = norm.eps
        self.gain = norm.weight.detach()  # [W]
        self.kind, self.bias = "rms", self.gain
        if isinstance(norm, nn.LayerNorm):
            self.kind, self.bias = "layer", norm.bias.detach()

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Normalise x [S, W] into out [S, W]."""
        _normalise(x, None, None, self, out)


def add(x: Tensor, added: Tensor, linear: Linear, norm: Norm | None, out: Tensor) -> None:
    """x [S, W] += gain · (added [S, W] + bias) of a linear layer; then out = norm(x)."""
    _normalise(x, added, linear, norm, out)


def _normalise(
    x: Tensor, added: Tensor | None, linear: Linear | None, norm: Norm | None, out: Tensor
) -> None:
    S, W = x.shape
    gain = None if linear is None else linear.gain
    normalise[S,](
        x,
        x if added is None else added,
        x if linear is None else linear.bias,
        x if gain is None else gain,
        x if norm is None else norm.gain,
        x if norm is None else norm.bias,
        out,
        W=W,
        EPSILON=0.0 if norm is None else norm.epsilon,
        ADDS=added is not None,
        GAIN=gain is not None,
        NORM="none" if norm is None else norm.kind,
        BLOCK_W=triton.next_power_of_2(W),
    )


class GpuFeedForward:
    """A feed-forward layer, without the addition to the residual stream."""

    def __init__(self, feed_forward: FeedForward, gain: Tensor | None = None) -> None:
        self.expand, self.kind = Linear(feed_forward.expand), feed_forward.kind
        self.contract = Linear(feed_forward.contract, gain)

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels before and after the activation."""
        return self.expand.transposed.shape[1], self.contract.transposed.shape[0]

    def new_room(self, num_slots: int) -> Room:
        """Allocate memory for a number of slots."""
        before, after = (self.expand.bias.new_zeros(num_slots, size) for size in self.sizes)
        return before, after

    def __call__(self, x: Tensor, room: Room, out: Tensor) -> None:
        """Compute out [S, W] from x [S, W], without the last bias."""
        expanded, inner = room
        self.expand(x, expanded)
        S, F = inner.shape
        activate[S, triton.cdiv(F, _INNER)](
            expanded, self.expand.bias, inner, F=F, KIND=self.kind, BLOCK=_INNER
        )
        self.contract(inner, out)


class GpuBlock:
    """A block of the transformer."""

    def __init__(self, block: BlockParts) -> None:
        self.attention_norm = Norm(block.attention_norm)
        self.qkv = Linear(block.attention.to_qkv)
        self.out = Linear(block.attention.to_out, block.attention_gain)
        self.feed_forward_norm = Norm(block.feed_forward_norm)
        self.feed_forward = GpuFeedForward(block.feed_forward, block.feed_forward_gain)


class GpuHead:
    """The head of one code of a position."""

    def __init__(self, head: CodeHead) -> None:
        self.earlier = earlier_table(head)  # [m * V, W]: embeddings of the codes before
        self.norm = Norm(head.norm)
        self.mix = None if head.mix is None else GpuFeedForward(head.mix)
        self.to_logits = Linear(head.to_logits)
