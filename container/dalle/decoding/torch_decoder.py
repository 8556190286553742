"""The model's arithmetic for one position of many sequences, by torch's kernels.

The same numbers as `dalle.models.transformer` with fewer kernels. Knows no slots and no sampling:
keys and values are those of a cache that is passed in.

Letters: B rows, M codes, V codebook size, W width, N positions, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.decoding.quantised import Matrix, matrix
from dalle.decoding.step import (
    QK_EPSILON,
    BlockParts,
    blocks_of,
    earlier_table,
    heads_of,
    input_tables,
)
from dalle.models.layers import FeedForward
from dalle.models.transformer import CodeHead, Dalle
from dalle.types import Precision

Function = Callable[[Tensor], Tensor]


class Cache(Protocol):
    """Keys and values; the rows of the current step are set before the call."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values and attend: all [B, H, D] -> [B, H * D]."""
        ...


class TorchDecoder:
    """A model's layers and heads for one position, weights in the given precision.

    fp32 shares the model's memory.
    """

    def __init__(self, model: Dalle, precision: Precision = "fp32") -> None:
        config = model.config
        self._blocks = [_Block(block, precision) for block in blocks_of(model)]
        self._heads = [_Head(head, precision) for head in heads_of(model)]
        self._heads_shape = (3, config.num_heads, config.head_width)
        # One table, so that an input is one sum of rows.
        codes, position = input_tables(model)
        self._inputs = torch.cat([codes, position])
        V, M = config.codebook_size, config.num_codebooks
        self._first_rows = torch.arange(M + 1, device=position.device) * V

    def __call__(self, codes: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Run the layers on the codes [B, M] of each row's position [B].

        Returns the states [B, W] that predict the next position.
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
        """As `Step.code_logits`."""
        head = self._heads[m]
        if head.mix is not None:
            expand, activate, contract = head.mix
            known = F.embedding_bag(codes[:, :m] + head.first_rows, head.earlier, mode="sum")
            hidden = hidden + known
            hidden = hidden + contract(activate(expand(head.norm(hidden))))
        return head.to_logits(head.norm(hidden))


class _Block:
    """A block of the transformer as functions of its parts."""

    def __init__(self, block: BlockParts, precision: Precision) -> None:
        self.attention_norm = _norm(block.attention_norm)
        self.qkv = matrix(block.attention.to_qkv, precision)
        self.qk_norm = block.attention.qk_norm
        self.out = matrix(block.attention.to_out, precision)
        self.out_gain = block.attention_gain
        self.feed_forward_norm = _norm(block.feed_forward_norm)
        self.expand = matrix(block.feed_forward.expand, precision)
        self.activate = _activation(block.feed_forward)
        self.contract = matrix(block.feed_forward.contract, precision)
        self.contract_gain = block.feed_forward_gain


class _Head:
    """The head of one code as functions of its parts."""

    def __init__(self, head: CodeHead, precision: Precision) -> None:
        weight = head.to_logits.weight
        self.earlier = earlier_table(head)
        self.first_rows = torch.arange(len(head.earlier), device=weight.device) * len(weight)
        self.norm = _norm(head.norm)
        self.mix: tuple[Matrix, Function, Matrix] | None = None
        if head.mix is not None:
            expand, contract = (
                matrix(each, precision) for each in (head.mix.expand, head.mix.contract)
            )
            self.mix = expand, _activation(head.mix), contract
        self.to_logits = matrix(head.to_logits, precision)


def _norm(norm: nn.Module) -> Function:
    """The module's function without its call, which for few rows takes as long as the kernel."""
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
