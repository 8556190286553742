"""The decoding step for a CPU by torch's kernels, where `dalle.decoding.cpu.step` cannot run.

Computes the busy slots only. Each sequence has a slot, and slots may be at different inputs. A
query reads the keys and values that it sees and no others, as sums of a table's rows:

    values           a row is one input's value of one head        sum over inputs, weight = share
    keys, full       a row is one channel over a block of inputs   sum over channels, weight = query
    keys, sparse     a row is one input's key of one head          fetched, then multiplied

Letters: S slots, B busy slots (rows of a step), H heads, D head width, C inputs of a block,
n inputs that a query sees, M codes, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.decoding.model_parts import inputs_seen
from dalle.decoding.step import Step
from dalle.decoding.torch_decoder import TorchDecoder
from dalle.models.layers import KeyValueCache
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.types import AttentionKind, Precision

# By overload: looked up once, not at each call.
_SUMS: Any = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default
_PACK: Any = torch.ops.quantized.embedding_bag_byte_prepack.default
_UNPACK: Any = torch.ops.quantized.embedding_bag_byte_unpack.default

_SCALE_BYTES = 8  # after a row of bytes: its scale and its least value, as two floats


@dataclass(frozen=True)
class KeyRange:
    """Least and greatest value of each key channel of a layer, [H, D] each: what bytes span."""

    least: Tensor
    greatest: Tensor


class CpuTorchStep(Step):
    """A model's decoding step with the keys and values of all its slots.

    key_ranges: one a layer stores keys and values as bytes; None keeps float32.
    num_rows: most rows of one call; None: any number.
    """

    def __init__(
        self,
        model: Dalle,
        num_slots: int,
        *,
        precision: Precision = "fp32",
        key_ranges: Sequence[KeyRange] | None = None,
        num_rows: int | None = None,
    ) -> None:
        self.num_rows = num_rows
        if precision != "int8":  # which adds exactly
            self.window_refusal = f"torch's {precision} products round by their number of rows"
        self._decoder = TorchDecoder(model, precision)
        config = model.config
        self._first_input = config.text_length + 1  # index of position 0 as an input
        kinds = [config.kind_of_layer(layer) for layer in range(config.num_layers)]
        as_bytes = key_ranges is not None
        full = _FullPlan(config, as_bytes)
        sparse = {kind: _SparsePlan(config, kind) for kind in set(kinds) if kind != "full"}
        self._plans: list[_FullPlan | _SparsePlan] = [*sparse.values()]
        if "full" in kinds:
            self._plans.append(full)
        ranges: Sequence[KeyRange | None] = key_ranges or [None] * len(kinds)
        self._layers = [
            _FullLayer(num_slots, full, key_range)
            if kind == "full"
            else _SparseLayer(num_slots, sparse[kind], as_bytes)
            for kind, key_range in zip(kinds, ranges, strict=True)
        ]

    @property
    def num_bytes(self) -> int:
        return sum(
            each.table.nbytes for layer in self._layers for each in (layer.keys, layer.values)
        )

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        inputs = positions + self._first_input
        for plan in self._plans:
            plan.update(slots, inputs)
        return self._decoder(codes, torch.from_numpy(positions), self)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `torch_decoder.Cache`, for the busy slots."""
        return self._layers[layer].attend(query, key, value)

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        return self._decoder.code_logits(hidden, m, codes)

    def pack(self, prefix: KeyValueCache) -> list[tuple[Tensor, Tensor]]:
        return [
            layer.pack(key[0, :, : prefix.filled], value[0, :, : prefix.filled])
            for layer, key, value in zip(self._layers, prefix.keys, prefix.values, strict=True)
        ]

    def load(self, slots: Tensor, packed: Sequence[tuple[Tensor, Tensor]]) -> None:
        for layer, (key, value) in zip(self._layers, packed, strict=True):
            layer.load(slots, key, value)


class _FullPlan:
    """Indices that a step reads and writes in layers in which a query sees all inputs before it.

    Those that depend on the blocks alone are kept from step to step: they change when an input is
    the first of its block.
    """

    def __init__(self, config: TransformerConfig, as_bytes: bool) -> None:
        # A quarter of a short sequence; 64 of a long one, where a row is as long as a value.
        C = max(8, min(64, 1 << ((config.length // 4).bit_length() - 1)))
        self.C, self.H, self.D = C, config.num_heads, config.head_width
        self.num_blocks = -(-config.length // C)
        self.stride = C + _SCALE_BYTES if as_bytes else C
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
        # Where rows have different numbers of blocks: the index of each block among B * H * most,
        # and of its query among B * H.
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
    """Keys and values of a layer in which a query sees all inputs before it."""

    def __init__(self, num_slots: int, plan: _FullPlan, key_range: KeyRange | None) -> None:
        self.plan = plan
        H, C, D = plan.H, plan.C, plan.D
        self._key_shape = (num_slots, H, plan.num_blocks, D)
        self._value_shape = (num_slots, H, plan.num_blocks * C)
        num_heads = num_slots * H * plan.num_blocks
        self.keys: Table
        self.values: Table
        self._encoding: tuple[Tensor, Tensor] | None = None
        if key_range is None:
            self.keys, self.values = FloatTable(num_heads * D, C), FloatTable(num_heads * C, D)
        else:
            self.keys, self.values = ByteTable(num_heads * D, C), ByteTable(num_heads * C, D)
            scale = ((key_range.greatest - key_range.least) / 255).clamp(min=1e-6)
            by_row = [
                each[None, :, None].expand(self._key_shape).flatten()
                for each in (scale, key_range.least)
            ]
            self.keys.set_scales(*by_row)
            # 0.5, because the conversion to bytes cuts off: this rounds to the nearest.
            self._encoding = 0.5 - key_range.least / scale, 1 / scale
        self._elements = self.keys.table.view(-1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        plan = self.plan
        B, H, D = query.shape
        self._elements.scatter_(0, plan.key_elements, self._encode(key).reshape(-1))
        self.values.table.index_copy_(
            0, plan.value_rows, self.values.encode(value.reshape(B * H, D))
        )
        # One copy of a query for each block that it reads.
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
        """Convert keys [., H, D] to what the table holds."""
        if self._encoding is None:
            return keys
        offset, factor = self._encoding
        return torch.addcmul(offset, keys, factor).clamp_(0, 255).to(torch.uint8)

    def pack(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Convert keys and values [H, n, D] to the first blocks and rows of a slot."""
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
    """Indices that a step reads and writes in layers of one of the sparse kinds."""

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
        make = ByteTable if as_bytes else FloatTable
        self.keys: Table = make(num_slots * plan.H * plan.length, plan.D)
        self.values: Table = make(num_slots * plan.H * plan.length, plan.D)

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
        """Convert keys and values [H, n, D] to the first rows of a slot."""
        H, n, D = key.shape
        encoded_key, encoded_value = (
            rows.encode(each.reshape(H * n, D)).view(H, n, -1)
            for rows, each in ((self.keys, key), (self.values, value))
        )
        return encoded_key, encoded_value

    def load(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        for rows, each in ((self.keys, key), (self.values, value)):
            rows.table.view(*self._shape, -1)[slots, :, : each.shape[1]] = each


class FloatTable:
    """A table [rows, columns] of float32 whose weighted row sums take no longer than reading them.

    One kernel made for embeddings (`embedding_bag`) sums, for each bag of row indices, the rows by
    weight. It prefetches along the indices, so that rows may lie anywhere in the table.
    """

    def __init__(self, num_rows: int, columns: int) -> None:
        self.table = torch.zeros(num_rows, columns)

    def sums(self, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """Sum rows by weight: [bags, columns]. Bag i is indices[offsets[i]:offsets[i + 1]].

        All three arguments are flat; weights has one number per index.
        """
        return torch.embedding_bag(
            self.table, indices, offsets, False, 0, False, weights, include_last_offset=True
        )[0]

    def fetch(self, indices: Tensor) -> Tensor:
        """Rows [indices, columns] as they were before `encode`."""
        return self.table.index_select(0, indices)

    @staticmethod
    def encode(rows: Tensor) -> Tensor:
        """Convert float rows to what the table holds."""
        return rows


class ByteTable:
    """A table [rows, columns] of bytes; each row has a scale and a least value."""

    def __init__(self, num_rows: int, columns: int) -> None:
        self.table = torch.zeros(num_rows, columns + _SCALE_BYTES, dtype=torch.uint8)

    def sums(self, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        """As `FloatTable.sums`."""
        summed: Tensor = _SUMS(self.table, indices, offsets, False, 0, False, weights, None, True)
        return summed

    def fetch(self, indices: Tensor) -> Tensor:
        """As `FloatTable.fetch`."""
        chosen = self.table.index_select(0, indices)
        rows: Tensor = _UNPACK(chosen)
        return rows

    @staticmethod
    def encode(rows: Tensor) -> Tensor:
        """Convert float rows to bytes [rows, columns + 8]: 0 is a row's least value, 255 its
        greatest."""
        encoded: Tensor = _PACK(rows)
        return encoded

    def set_scales(self, scale: Tensor, least: Tensor) -> None:
        """Set scale and least value of each row, [rows] each; for rows not made by `encode`."""
        floats = self.table.view(torch.float32)
        floats[:, -2], floats[:, -1] = scale, least


Table = FloatTable | ByteTable


def _int32(numbers: np.ndarray) -> Tensor:
    """Flatten, and convert to the type that the embedding kernels read fastest."""
    return torch.from_numpy(numbers.reshape(-1).astype(np.int32))
