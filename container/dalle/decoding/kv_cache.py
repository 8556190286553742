"""Keys and values of many half-drawn images at once, for a CPU. Knows no weights and no tokens.

A sequence in the making has a slot, and each slot is at an input of its own. A query reads the keys
and values that it sees and no others, whatever its neighbours see, as sums of a table's rows:

    values           a row is one input's value of one head        sum over inputs, weight = share
    keys, full       a row is one channel over a block of inputs   sum over channels, weight = query
    keys, sparse     a row is one input's key of one head          fetched, then multiplied

Letters: S slots, B busy slots (rows of a step), H heads, D head width, C inputs of a block,
n inputs that a query sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.decoding.row_tables import ByteRows, FloatRows, Rows
from dalle.models.attention import KeyValueCache, visibility
from dalle.models.transformer import TransformerConfig
from dalle.types import AttentionKind


@dataclass(frozen=True)
class KeyRange:
    """Least and greatest value of each key channel of a layer, [H, D] each; bytes span it."""

    least: Tensor
    greatest: Tensor


class SlotTables:
    """The keys and values of a decode engine. Each step: `plan` once, then `attend` layer by layer.

    key_ranges: one a layer makes keys and values bytes; None keeps float32.
    block_size: C; queries of the full kind read whole blocks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_slots: int,
        *,
        key_ranges: Sequence[KeyRange] | None = None,
        block_size: int | None = None,
    ) -> None:
        # A quarter of a short sequence; 64 of a long one, where a row is as long as a value.
        C = block_size or max(8, min(64, 1 << ((config.length // 4).bit_length() - 1)))
        self._plans: dict[AttentionKind, _FullPlan | _SparsePlan] = {}
        self._layers: list[_FullLayer | _SparseLayer] = []
        for layer in range(config.num_layers):
            kind = config.kind_of_layer(layer)
            key_range = None if key_ranges is None else key_ranges[layer]
            if kind == "full":
                full = self._plans.setdefault(kind, _FullPlan(config, C, key_range is not None))
                assert isinstance(full, _FullPlan)
                self._layers.append(_FullLayer(num_slots, full, key_range))
            else:
                sparse = self._plans.setdefault(kind, _SparsePlan(config, kind))
                assert isinstance(sparse, _SparsePlan)
                self._layers.append(_SparseLayer(num_slots, sparse, key_range is not None))

    @property
    def num_bytes(self) -> int:
        """Memory of all tables."""
        tables = [rows.table for layer in self._layers for rows in (layer.keys, layer.values)]
        return sum(table.numel() * table.element_size() for table in tables)

    def plan(self, slots: np.ndarray, inputs: np.ndarray) -> None:
        """Say which slots [B] the next step moves on, and the index of each one's new input [B].

        The very same array of slots again means that the step goes on where the last one was.
        """
        for plan in self._plans.values():
            plan.update(slots, inputs)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the busy slots' keys and values, then attend: all [B, H, D] -> [B, H * D]."""
        return self._layers[layer].attend(query, key, value)

    def pack(self, prefix: KeyValueCache) -> list[tuple[Tensor, Tensor]]:
        """What `load` writes for sequences that begin as a cache of one row does."""
        return [
            layer.pack(key[0, :, : prefix.filled], value[0, :, : prefix.filled])
            for layer, key, value in zip(self._layers, prefix.keys, prefix.values, strict=True)
        ]

    def load(self, slots: Tensor, packed: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin the same sequence in each of the slots [B]."""
        for layer, (key, value) in zip(self._layers, packed, strict=True):
            layer.load(slots, key, value)


class _FullPlan:
    """Where the rows of a step read and write in layers in which a query sees all before it.

    What depends on the blocks alone is kept from step to step: it changes when an input is the
    first of its block.
    """

    def __init__(self, config: TransformerConfig, block_size: int, as_bytes: bool) -> None:
        self.C, self.H, self.D = block_size, config.num_heads, config.head_width
        self.num_blocks = -(-config.length // block_size)
        self.stride = ByteRows.row_length(block_size) if as_bytes else block_size
        self._heads, self._channels = torch.arange(self.H), torch.arange(self.D) * self.stride
        self._slots: np.ndarray | None = None
        self._blocks = self._inputs = np.zeros(0, np.int64)
        self.value_rows = self.key_elements = torch.zeros(0, dtype=torch.int64)

    def update(self, slots: np.ndarray, inputs: np.ndarray) -> None:
        C, D = self.C, self.D
        blocks = inputs // C + 1
        if slots is self._slots and np.array_equal(blocks, self._blocks):
            self.mask.view(-1).index_fill_(0, self._mask_rows + torch.from_numpy(inputs), 0.0)
            if np.array_equal(inputs, self._inputs + 1):
                self._inputs = inputs
                self.value_rows.add_(1)
                self.key_elements.add_(1)
                return
        else:
            self._rebuild(slots, blocks, inputs)
        self._inputs = inputs
        index = torch.from_numpy(inputs)[:, None]
        head = self._first_heads + self._heads
        self.value_rows = (head * (self.num_blocks * C) + index).flatten()
        # As one line of elements, each table's row being `stride` long.
        first = (head * self.num_blocks + index // C) * (D * self.stride) + index % C
        self.key_elements = (first[..., None] + self._channels).flatten()

    def _rebuild(self, slots: np.ndarray, blocks: np.ndarray, inputs: np.ndarray) -> None:
        C, H, D = self.C, self.H, self.D
        B, most = len(slots), int(blocks.max())
        self._slots, self._blocks = slots, blocks
        self._mask_rows = torch.arange(B) * (most * C)
        self._first_heads = torch.from_numpy(slots)[:, None] * H
        first = (slots[:, None] * H + np.arange(H)) * self.num_blocks
        wanted = np.broadcast_to(np.arange(most) < blocks[:, None, None], (B, H, most))
        ids = (first[..., None] + np.arange(most))[wanted]
        # Rows at different blocks: each block's place among B * H * most, and its query's, B * H.
        self.is_ragged = not wanted.all()
        self.places = torch.from_numpy(np.flatnonzero(wanted))
        self.queries = self.places // most
        self.scores = torch.zeros(B * H * most, C)
        self.key_indices = _int32(ids[:, None] * D + np.arange(D))
        self.key_offsets = _int32(np.arange(len(ids) + 1) * D)
        self.value_indices = _int32(ids[:, None] * C + np.arange(C))
        self.value_offsets = _int32(np.append(0, np.repeat(blocks, H).cumsum()) * C)
        unseen = torch.from_numpy(np.arange(most * C) > inputs[:, None])
        self.mask = torch.zeros(B, 1, most * C).masked_fill_(unseen[:, None], -torch.inf)


class _FullLayer:
    """Keys and values of a layer in which a query sees all before it."""

    def __init__(self, num_slots: int, plan: _FullPlan, key_range: KeyRange | None) -> None:
        self.plan = plan
        H, C, D = plan.H, plan.C, plan.D
        self._key_shape = (num_slots, H, plan.num_blocks, D)
        self._value_shape = (num_slots, H, plan.num_blocks * C)
        Table = FloatRows if key_range is None else ByteRows
        num_heads = num_slots * H * plan.num_blocks
        self.keys: Rows = Table(num_heads * D, C)
        self.values: Rows = Table(num_heads * C, D)
        self._elements = self.keys.table.view(-1)
        self._encoding: tuple[Tensor, Tensor] | None = None
        if isinstance(self.keys, ByteRows):
            assert key_range is not None
            scale = ((key_range.greatest - key_range.least) / 255).clamp(min=1e-6)
            by_row = [
                each[None, :, None].expand(self._key_shape).flatten()
                for each in (scale, key_range.least)
            ]
            self.keys.set_scales(*by_row)
            # Rounded to the nearest: the byte is what is left of the point.
            self._encoding = 0.5 - key_range.least / scale, 1 / scale

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        plan = self.plan
        B, H, D = query.shape
        self._elements.scatter_(0, plan.key_elements, self._encode(key).reshape(-1))
        self.values.table.index_copy_(
            0, plan.value_rows, self.values.encode(value.reshape(B * H, D))
        )
        # Each block's query beside it.
        weights = query.reshape(B * H, D).index_select(0, plan.queries)
        scores = self.keys.sums(plan.key_indices, plan.key_offsets, weights.view(-1))
        if plan.is_ragged:
            scores = plan.scores.index_copy_(0, plan.places, scores)
        shares = torch.add(plan.mask, scores.view(B, H, -1), alpha=D**-0.5).softmax(dim=-1)
        if plan.is_ragged:
            shares = shares.view(-1, plan.C).index_select(0, plan.places)
        attended = self.values.sums(plan.value_indices, plan.value_offsets, shares.view(-1))
        return attended.view(B, H * D)

    def _encode(self, keys: Tensor) -> Tensor:
        """Keys [., H, D] as the table holds them."""
        if self._encoding is None:
            return keys
        offset, factor = self._encoding
        return torch.addcmul(offset, keys, factor).clamp_(0, 255).to(torch.uint8)

    def pack(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, n, D] as the first blocks and rows of a slot."""
        H, n, D = key.shape
        blocks = F.pad(key, (0, 0, 0, -n % self.plan.C)).view(H, -1, self.plan.C, D)
        encoded = self._encode(blocks.permute(1, 2, 0, 3)).permute(2, 0, 3, 1)
        values = self.values.encode(value.reshape(H * n, D))
        return encoded.contiguous(), values.view(H, n, -1)

    def load(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        keys = self.keys.table.view(*self._key_shape, -1)
        keys[slots, :, : key.shape[1], :, : self.plan.C] = key
        self.values.table.view(*self._value_shape, -1)[slots, :, : value.shape[1]] = value


class _SparsePlan:
    """Where the rows of a step read and write in layers of one of the sparse kinds."""

    def __init__(self, config: TransformerConfig, kind: AttentionKind) -> None:
        self.H, self.D, self.length = config.num_heads, config.head_width, config.length
        order, counts = inputs_seen(config, kind)
        self._first_image = config.text_length + 1
        n = int(counts[self._first_image :].max()) if len(counts) > self._first_image else 1
        unseen = np.arange(n) >= counts[:, None]
        self._seen = torch.from_numpy(np.where(unseen, 0, order[:, :n]))
        self._mask = torch.zeros(self.length, 1, 1, n).masked_fill_(
            torch.from_numpy(unseen)[:, None, None], -torch.inf
        )
        self._heads = torch.arange(self.H)[:, None]
        self._slots: np.ndarray | None = None

    def update(self, slots: np.ndarray, inputs: np.ndarray) -> None:
        B, H, n = len(slots), self.H, self._seen.shape[1]
        if slots is not self._slots:
            self._slots = slots
            first = torch.from_numpy(slots)[:, None, None] * H + self._heads
            self._first_rows = first * self.length  # [B, H, 1]
            self.offsets = torch.arange(B * H + 1) * n
        index = torch.from_numpy(inputs)
        self.rows = (self._first_rows + index[:, None, None]).flatten()
        seen = self._seen.index_select(0, index)[:, None]
        self.indices = (self._first_rows + seen).flatten()
        self.mask = self._mask.index_select(0, index)


class _SparseLayer:
    """Keys and values of a layer of one of the sparse kinds."""

    def __init__(self, num_slots: int, plan: _SparsePlan, as_bytes: bool) -> None:
        self.plan = plan
        self._shape = (num_slots, plan.H, plan.length)
        Table = ByteRows if as_bytes else FloatRows
        self.keys: Rows = Table(num_slots * plan.H * plan.length, plan.D)
        self.values: Rows = Table(num_slots * plan.H * plan.length, plan.D)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        plan = self.plan
        B, H, D = query.shape
        for rows, new in ((self.keys, key), (self.values, value)):
            rows.table.index_copy_(0, plan.rows, rows.encode(new.reshape(B * H, D)))
        keys = self.keys.fetch(plan.indices).view(B * H, -1, D)
        scores = torch.bmm(query.reshape(B * H, 1, D), keys.transpose(1, 2)).view(B, H, 1, -1)
        shares = torch.add(plan.mask, scores, alpha=D**-0.5).softmax(dim=-1)
        attended = self.values.sums(plan.indices, plan.offsets, shares.view(-1))
        return attended.view(B, H * D)

    def pack(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, n, D] as the first rows of a slot."""
        H, n, D = key.shape
        encoded_key, encoded_value = (
            rows.encode(each.reshape(H * n, D)).view(H, n, -1)
            for rows, each in ((self.keys, key), (self.values, value))
        )
        return encoded_key, encoded_value

    def load(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        for rows, each in ((self.keys, key), (self.values, value)):
            rows.table.view(*self._shape, -1)[slots, :, : each.shape[1]] = each


def inputs_seen(config: TransformerConfig, kind: AttentionKind) -> tuple[np.ndarray, np.ndarray]:
    """Of the query at each input, the inputs that it sees in order, [L, most], and how many: [L].

    What stands behind them is no part of it.
    """
    grid_size, kernel_size = config.grid_size, config.conv_kernel_size
    visible = visibility(kind, config.text_length, grid_size, kernel_size).numpy()
    counts = visible.sum(axis=1)
    return np.argsort(~visible, axis=1, kind="stable")[:, : int(counts.max())], counts


def _int32(numbers: np.ndarray) -> Tensor:
    """Flat, of the type that the embedding kernels read fastest."""
    return torch.from_numpy(numbers.reshape(-1).astype(np.int32))
