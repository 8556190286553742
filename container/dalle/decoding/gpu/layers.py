"""Launches the kernels of `dalle.decoding.gpu.kernels` for the layers of a model.

Letters: S slots, W width, F inner width, K inputs and N outputs of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor, nn

from dalle.decoding.gpu.kernels import activate, normalise
from dalle.decoding.step import earlier_table, gain_of
from dalle.models.attention import SelfAttention
from dalle.models.layers import FeedForward
from dalle.models.transformer import Block, CodeHead
from dalle.types import FeedForwardKind

_INNER = 1024  # channels of one program of `activate`

Room = tuple[Tensor, Tensor]
"""What a feed-forward layer has before and behind its activation."""


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer, which shares its memory; a bias is left to the kernel behind it."""

    transposed: Tensor  # [K, N]
    bias: Tensor  # [N]
    gain: Tensor | None  # [N], of the branch that it ends

    @classmethod
    def of(cls, linear: nn.Linear, gain: Tensor | None = None) -> Linear:
        weight = linear.weight.detach()
        bias = weight.new_zeros(0) if linear.bias is None else linear.bias.detach()
        return cls(weight.t(), bias, gain)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """[S, K] -> [S, N], without the bias."""
        torch.mm(x, self.transposed, out=out)


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of the residual stream."""

    kind: Literal["layer", "rms"]
    gain: Tensor  # [W]
    bias: Tensor  # [W], of "layer"
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
        """[S, W] -> the same."""
        _normalise(x, None, None, self, out)


def add(x: Tensor, added: Tensor, linear: Linear, norm: Norm | None, out: Tensor) -> None:
    """x [S, W] += what a layer gave [S, W], its bias and gain included; then out = norm(x)."""
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
class FusedFeedForward:
    """A feed-forward layer, up to the addition of what it gives."""

    expand: Linear
    kind: FeedForwardKind
    contract: Linear

    @classmethod
    def of(cls, feed_forward: nn.Module, gain: Tensor | None = None) -> FusedFeedForward:
        assert isinstance(feed_forward, FeedForward)
        return cls(
            Linear.of(feed_forward.expand),
            feed_forward.kind,
            Linear.of(feed_forward.contract, gain),
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels before and behind the activation."""
        return self.expand.transposed.shape[1], self.contract.transposed.shape[0]

    def new_room(self, num_slots: int) -> Room:
        """For as many slots."""
        before, behind = (self.expand.bias.new_zeros(num_slots, size) for size in self.sizes)
        return before, behind

    def __call__(self, x: Tensor, room: Room, out: Tensor) -> None:
        """[S, W] -> the same, without the last bias."""
        expanded, inner = room
        self.expand(x, expanded)
        S, F = inner.shape
        activate[S, triton.cdiv(F, _INNER)](
            expanded, self.expand.bias, inner, F=F, KIND=self.kind, BLOCK=_INNER
        )
        self.contract(inner, out)


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """A block of the transformer."""

    attention_norm: Norm
    qkv: Linear
    out: Linear
    feed_forward_norm: Norm
    feed_forward: FusedFeedForward

    @classmethod
    def of(cls, block: nn.Module) -> FusedBlock:
        assert isinstance(block, Block)
        attention = block.attention.function
        assert isinstance(attention, SelfAttention)
        return cls(
            Norm.of(block.attention.norm),
            Linear.of(attention.to_qkv),
            Linear.of(attention.to_out, gain_of(block.attention)),
            Norm.of(block.feed_forward.norm),
            FusedFeedForward.of(block.feed_forward.function, gain_of(block.feed_forward)),
        )


@dataclass(frozen=True, eq=False)
class FusedHead:
    """A head of one of a position's codes."""

    earlier: Tensor  # [m * V, W]: embeddings of the codes before
    norm: Norm
    mix: FusedFeedForward | None
    to_logits: Linear

    @classmethod
    def of(cls, head: nn.Module) -> FusedHead:
        assert isinstance(head, CodeHead)
        return cls(
            earlier_table(head),
            Norm.of(head.norm),
            None if head.mix is None else FusedFeedForward.of(head.mix),
            Linear.of(head.to_logits),
        )
