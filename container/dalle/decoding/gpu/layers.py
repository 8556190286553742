"""Layers of a model that launch the kernels of `dalle.decoding.gpu.kernels`.

Letters: S slots, W width, F inner width, K inputs and N outputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor, nn

from dalle.decoding.gpu.kernels import activate, normalise
from dalle.decoding.step import BlockParts, earlier_table
from dalle.models.layers import FeedForward
from dalle.models.transformer import CodeHead
from dalle.types import FeedForwardKind

_INNER = 1024  # channels of one program of `activate`

Room = tuple[Tensor, Tensor]
"""Memory for a feed-forward layer's channels before and after its activation."""


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer in the model's memory; the kernel after it adds the bias."""

    transposed: Tensor  # [K, N]
    bias: Tensor  # [N]
    gain: Tensor | None  # [N], of the branch whose last layer this is

    @classmethod
    def of(cls, linear: nn.Linear, gain: Tensor | None = None) -> Linear:
        weight = linear.weight.detach()
        bias = weight.new_zeros(0) if linear.bias is None else linear.bias.detach()
        return cls(weight.t(), bias, gain)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Compute out [S, N] from x [S, K], without the bias."""
        torch.mm(x, self.transposed, out=out)


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of the residual stream."""

    kind: Literal["layer", "rms"]
    gain: Tensor  # [W]
    bias: Tensor  # [W]; read for "layer" only
    epsilon: float

    @classmethod
    def of(cls, norm: nn.Module) -> Norm:
        if isinstance(norm, nn.LayerNorm):
            return cls("layer", norm.weight.detach(), norm.bias.detach(), norm.eps)
        assert isinstance(norm, nn.RMSNorm)
        assert norm.eps is not None
        gain = norm.weight.detach()
        return cls("rms", gain, gain, norm.eps)

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


@dataclass(frozen=True, eq=False)
class GpuFeedForward:
    """A feed-forward layer, without the addition to the residual stream."""

    expand: Linear
    kind: FeedForwardKind
    contract: Linear

    @classmethod
    def of(cls, feed_forward: FeedForward, gain: Tensor | None = None) -> GpuFeedForward:
        return cls(
            Linear.of(feed_forward.expand),
            feed_forward.kind,
            Linear.of(feed_forward.contract, gain),
        )

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


@dataclass(frozen=True, eq=False)
class GpuBlock:
    """A block of the transformer."""

    attention_norm: Norm
    qkv: Linear
    out: Linear
    feed_forward_norm: Norm
    feed_forward: GpuFeedForward

    @classmethod
    def of(cls, block: BlockParts) -> GpuBlock:
        return cls(
            Norm.of(block.attention_norm),
            Linear.of(block.attention.to_qkv),
            Linear.of(block.attention.to_out, block.attention_gain),
            Norm.of(block.feed_forward_norm),
            GpuFeedForward.of(block.feed_forward, block.feed_forward_gain),
        )


@dataclass(frozen=True, eq=False)
class GpuHead:
    """The head of one code of a position."""

    earlier: Tensor  # [m * V, W]: embeddings of the codes before
    norm: Norm
    mix: GpuFeedForward | None
    to_logits: Linear

    @classmethod
    def of(cls, head: CodeHead) -> GpuHead:
        return cls(
            earlier_table(head),
            Norm.of(head.norm),
            None if head.mix is None else GpuFeedForward.of(head.mix),
            Linear.of(head.to_logits),
        )
