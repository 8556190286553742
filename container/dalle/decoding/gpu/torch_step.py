"""The decoding step for a GPU by torch's kernels, where `dalle.decoding.gpu.step` cannot run.

Keys are read up to a length that grows in blocks, with a CUDA graph for each length.

Letters: S slots, H heads, L inputs of a sequence, D head width, M codes, W width, n inputs that a
query sees, or that a prefix has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.decoding.gpu.cuda_graph import CudaGraphStep
from dalle.decoding.torch_decoder import TorchDecoder
from dalle.models.layers import KeyValueCache, visibility
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.types import AttentionKind

_BLOCK = 128  # inputs by which the keys that are read grow
_ALIGNED = 16  # keys: attention kernels copy a mask whose rows are of another length


_View = tuple[Tensor | None, Tensor]
"""Rows [S * n] of a layer's table that the slots' queries see, None for all inputs up to the bound;
and their mask [S, 1, 1, n]: 0 for an input that is seen, else -inf."""


class GpuTorchStep(CudaGraphStep):
    """A model's decoding step with the keys and values of all its slots, in the model's dtype."""

    def __init__(self, model: Dalle, num_slots: int) -> None:
        super().__init__(model, num_slots)
        config, like = model.config, model.text_position.detach()
        self._decoder = TorchDecoder(model)
        # A layer's keys and values side by side: one kernel gathers both.
        self._tables = [
            like.new_zeros(num_slots * config.length, 2, config.width)
            for _ in range(config.num_layers)
        ]
        self._heads = (config.num_heads, config.head_width)
        self._kinds = [config.kind_of_layer(layer) for layer in range(config.num_layers)]
        self._seen = {kind: _Seen(config, kind, like) for kind in set(self._kinds)}
        self._first_rows = torch.arange(num_slots, device=like.device) * config.length
        # Of the current step.
        self._rows = self._first_rows
        self._views: dict[AttentionKind, _View] = {}
        self._bound = config.length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `torch_decoder.Cache`, for all slots."""
        table = self._tables[layer]
        rows, mask = self._views[self._kinds[layer]]
        table.select(1, 0).index_copy_(0, self._rows, key.flatten(1))
        table.select(1, 1).index_copy_(0, self._rows, value.flatten(1))
        if rows is None:
            seen = table.view(self._num_slots, -1, *table.shape[1:])[:, : self._bound]
        else:
            seen = table.index_select(0, rows).view(self._num_slots, -1, *table.shape[1:])
        keys, values = seen.view(*seen.shape[:3], *self._heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=mask)
        return attended.flatten(1)

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        return self._decoder.code_logits(hidden, m, codes)

    def pack(self, prefix: KeyValueCache) -> list[Tensor]:
        """Keys and values [n, 2, W] of each layer."""
        return [
            torch.stack([each[0, :, : prefix.filled] for each in (key, value)])
            .permute(2, 0, 1, 3)
            .flatten(2)
            for key, value in zip(prefix.keys, prefix.values, strict=True)
        ]

    def load(self, slots: Tensor, packed: Sequence[Tensor]) -> None:
        for table, inputs in zip(self._tables, packed, strict=True):
            table.view(self._num_slots, -1, *table.shape[1:])[slots, : len(inputs)] = inputs

    def _run(self, last_input: int) -> None:
        self._bound = min(self._length, -(-(last_input + 1) // _BLOCK) * _BLOCK)
        if self._bound not in self._graphs:
            # A repeated step writes the same keys to the same rows.
            self._graphs.add(self._bound, self._compute)
        self._graphs.replay(self._bound)

    def _compute(self) -> None:
        inputs = self._positions + self._first_input
        self._rows = self._first_rows + inputs
        self._views = {
            kind: seen.by(inputs, self._first_rows, self._bound)
            for kind, seen in self._seen.items()
        }
        self._hidden.copy_(self._decoder(self._codes, self._positions, self))


class _Seen:
    """Inputs that the query at each input sees, for one kind of attention.

    inputs: [L, n], padded; None where a query sees all inputs before it. mask: [L, n], added to the
    scores: 0 for an input that is seen, -inf for padding.
    """

    def __init__(self, config: TransformerConfig, kind: AttentionKind, like: Tensor) -> None:
        """like: a tensor of the device and dtype to use."""
        visible = visibility(kind, config.text_length, config.grid_size, config.conv_kernel_size)
        self.inputs: Tensor | None = None
        if kind != "full":
            counts = visible.sum(dim=1)
            n = int(counts[config.text_length + 1 :].max()) if config.num_positions > 1 else 1
            n = min(-(-n // _ALIGNED) * _ALIGNED, config.length)
            order = visible.int().argsort(dim=1, descending=True, stable=True)[:, :n]
            visible = torch.arange(n) < counts[:, None]
            self.inputs = order.where(visible, 0).to(like.device)
        unseen = ~visible.to(like.device)
        self.mask = like.new_zeros(visible.shape).masked_fill_(unseen, -torch.inf)

    def by(self, inputs: Tensor, first_rows: Tensor, bound: int) -> _View:
        """Select for queries at the slots' inputs [S]. first_rows: [S], the slots' in a table."""
        if self.inputs is None:
            return None, self.mask[:, :bound].index_select(0, inputs)[:, None, None]
        mask = self.mask.index_select(0, inputs)[:, None, None]
        rows = self.inputs.index_select(0, inputs) + first_rows[:, None]
        return rows.flatten(), mask
