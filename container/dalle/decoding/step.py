"""One decoding step of a transformer for many sequences, each at a position of its own.

The arithmetic of `dalle.models.transformer` with fewer kernels; slots and random numbers are those
of `dalle.decoding.engine`, keys and values of a cache.

Letters: B rows, C candidates, M codes, V codebook size, W width, N positions, H heads, D head width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.decoding.input_batch import Batch, SlotState
from dalle.decoding.quantised import Matrix, matrix
from dalle.models.attention import KeyValueCache, SelfAttention
from dalle.models.layers import FeedForward, LayerScale
from dalle.models.transformer import Block, Branch, CodeHead, Dalle
from dalle.types import Precision

Function = Callable[[Tensor], Tensor]

QK_EPSILON = 1e-5  # of `F.layer_norm`, which the model calls


class Attends(Protocol):
    """A cache that has been told of the step's rows."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values and attend: all [B, H, D] -> [B, H * D]."""
        ...


class SlotStep(Protocol):
    """A decoding step together with the keys and values of all its slots: see
    `dalle.decoding.select`."""

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        ...

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        """Take in the codes [B, M] of the slots' [B] positions [B]: states [B, W].

        The very same array of slots again means that the step goes on where the last one was: then
        every position must be one more, and no slot may have been loaded in between.
        """
        ...

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """As `DecodeStep.code_logits`."""
        ...

    def pack(self, prefix: KeyValueCache) -> Sequence[Any]:
        """What `load` writes for sequences that begin as a cache of one row does, by layer."""
        ...

    def load(self, slots: Tensor, packed: Sequence[Any]) -> None:
        """Begin the same sequence in each of the slots [B]."""
        ...


class DrawingStep(SlotStep, Protocol):
    """A step that draws what it is told, row by row."""

    def draw(self, hidden: Tensor, uniforms: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Draw the candidates' codes [C, M] of what the rows' hidden [B, W] predict, and their
        log p [C], by uniforms [C, M]: as `Batch.draw`."""
        ...


@runtime_checkable
class MovingStep(SlotStep, Protocol):
    """A step that moves an engine's candidates on where they are kept."""

    def move(self, batch: Batch, state: SlotState) -> None:
        """Draw the codes of each candidate's position, keep them and add up their log p, and take
        them in: hidden is what predicts the next position then, if there is one.

        The same state every time; the very same batch again means that it goes on where the last
        one was.
        """
        ...


EngineStep = DrawingStep | MovingStep


class DecodeStep:
    """A model's decoding step, weights in the precision asked for. fp32 shares their memory."""

    def __init__(self, model: Dalle, precision: Precision = "fp32") -> None:
        config = model.config
        self.num_codebooks = config.num_codebooks
        self._blocks = [_Block.of(block, precision) for block in model.blocks]
        self._heads = [_Head.of(head, precision) for head in model.code_heads]
        self._heads_shape = (3, config.num_heads, config.head_width)
        # One table, so that an input is one sum of rows.
        codes, position = input_tables(model)
        self._inputs = torch.cat([codes, position])
        V, M = config.codebook_size, config.num_codebooks
        self._first_rows = torch.arange(M + 1, device=position.device) * V

    def __call__(self, codes: Tensor, positions: Tensor, cache: Attends) -> Tensor:
        """Take in the codes [B, M] of each row's position [B].

        Returns the states [B, W] that predict the next.
        """
        rows = torch.cat([codes, positions[:, None]], dim=1).add_(self._first_rows)
        x = self._inputs.index_select(0, rows.view(-1)).view(*rows.shape, -1).sum(dim=1)
        head = self._heads_shape[2:]
        for layer, block in enumerate(self._blocks):
            qkv = block.qkv(block.attention_norm(x)).view(-1, *self._heads_shape)
            query_key = qkv.narrow(1, 0, 2)
            if block.qk_norm:
                query_key = torch.native_layer_norm(query_key, head, None, None, QK_EPSILON)[0]
            query, key = query_key.unbind(1)
            attended = block.out(cache.attend(layer, query, key, qkv.select(1, 2)))
            x = _add(x, attended, block.out_gain)
            added = block.contract(block.activate(block.expand(block.feed_forward_norm(x))))
            x = _add(x, added, block.contract_gain)
        return x

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        """Logits [B, V] of code m of the position that hidden [B, W] predicts, given those before.

        codes: [B, >= m]
        """
        head = self._heads[m]
        if head.expand is not None and head.contract is not None:
            known = F.embedding_bag(codes[:, :m] + head.first_rows, head.earlier, mode="sum")
            hidden = hidden + known
            hidden = hidden + head.contract(head.activate(head.expand(head.norm(hidden))))
        return head.to_logits(head.norm(hidden))


@dataclass(frozen=True)
class _Block:
    attention_norm: Function
    qkv: Matrix
    qk_norm: bool
    out: Matrix
    out_gain: Tensor | None
    feed_forward_norm: Function
    expand: Matrix
    activate: Function
    contract: Matrix
    contract_gain: Tensor | None

    @classmethod
    def of(cls, block: nn.Module, precision: Precision) -> _Block:
        assert isinstance(block, Block)
        attention, feed_forward = block.attention.function, block.feed_forward.function
        assert isinstance(attention, SelfAttention)
        assert isinstance(feed_forward, FeedForward)
        return cls(
            attention_norm=_norm(block.attention.norm),
            qkv=matrix(attention.to_qkv, precision),
            qk_norm=attention.qk_norm,
            out=matrix(attention.to_out, precision),
            out_gain=gain_of(block.attention),
            feed_forward_norm=_norm(block.feed_forward.norm),
            expand=matrix(feed_forward.expand, precision),
            activate=_activation(feed_forward),
            contract=matrix(feed_forward.contract, precision),
            contract_gain=gain_of(block.feed_forward),
        )


@dataclass(frozen=True)
class _Head:
    earlier: Tensor  # [m * V, W]: embeddings of the codes before
    first_rows: Tensor  # [m]
    norm: Function
    expand: Matrix | None
    activate: Function
    contract: Matrix | None
    to_logits: Matrix

    @classmethod
    def of(cls, head: nn.Module, precision: Precision) -> _Head:
        assert isinstance(head, CodeHead)
        weight = head.to_logits.weight
        return cls(
            earlier=earlier_table(head),
            first_rows=torch.arange(len(head.earlier), device=weight.device) * len(weight),
            norm=_norm(head.norm),
            expand=None if head.mix is None else matrix(head.mix.expand, precision),
            activate=F.relu if head.mix is None else _activation(head.mix),
            contract=None if head.mix is None else matrix(head.mix.contract, precision),
            to_logits=matrix(head.to_logits, precision),
        )


def input_tables(model: Dalle) -> tuple[Tensor, Tensor]:
    """Embeddings of every code of every codebook [M * V, W], and of every position [N, W]: an
    input of the image is a sum of M rows and one."""
    position = (model.row_position + model.column_position).flatten(0, 1).detach().clone()
    if model.config.target_position:
        target = (model.target_row_position + model.target_column_position).flatten(0, 1)
        position[:-1] += target[1:].detach()
    codes = [each.get_parameter("weight").detach() for each in model.code_embeddings]
    return torch.cat(codes), position


def earlier_table(head: CodeHead) -> Tensor:
    """Embeddings of every code of the codebooks before a head's own, [m * V, W]."""
    tables = [each.get_parameter("weight").detach() for each in head.earlier]
    return torch.cat(tables) if tables else head.to_logits.weight.new_zeros(0, 0)


def _norm(norm: nn.Module) -> Function:
    """As the module, whose call takes as long again as its kernel for so few rows."""
    if not isinstance(norm, nn.LayerNorm):
        return norm
    shape, weight, bias, epsilon = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.native_layer_norm(x, shape, weight, bias, epsilon)[0]


def _activation(feed_forward: FeedForward) -> Function:
    def geglu(x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(x)

    match feed_forward.kind:
        case "gelu":
            return F.gelu
        case "relu2":
            return lambda x: x.relu_().square_()
        case "geglu":
            return geglu


def _add(x: Tensor, branch: Tensor, gain: Tensor | None) -> Tensor:
    """x + branch · gain, in x's memory."""
    return x.add_(branch) if gain is None else x.addcmul_(branch, gain)


def gain_of(branch: Branch) -> Tensor | None:
    """What a branch multiplies its channels by, [W]."""
    return branch.scale.gain.detach() if isinstance(branch.scale, LayerScale) else None
