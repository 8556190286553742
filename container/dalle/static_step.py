"""The decoding step for a GPU: every slot every time, in shapes that never change.

A GPU is fed faster than it can be told what to do, so that idle slots cost nothing and launching
kernels does: with fixed shapes and addresses the step is recorded once (a CUDA graph) and replayed.
Keys are read up to a length that grows in blocks, one graph for each. Also runs, unrecorded,
on a CPU.

Letters: S slots, B busy slots, H heads, L inputs of a sequence, D head width, M codes, W width, n
inputs that a query of a sparse kind sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.attention import KeyValueCache, visibility
from dalle.decode_step import DecodeStep
from dalle.names import AttentionKind
from dalle.transformer import Dalle, TransformerConfig

_BLOCK = 128  # inputs by which the keys that are read grow
_WARM_UPS = 2  # steps before a recording, in which libraries take their memory


class StaticStep:
    """A model's decoding step with the keys and values of all its slots, in the model's dtype."""

    def __init__(self, model: Dalle, num_slots: int) -> None:
        config, like = model.config, model.text_position.detach()
        self._step = DecodeStep(model)
        self._first_input = config.text_length + 1  # index of position 0 as an input
        self.code_logits = self._step.code_logits
        self._length = config.length
        shape = (num_slots, config.num_heads, config.length, config.head_width)
        self._cache = KeyValueCache(config.num_layers, shape, like)
        self._kinds = [config.kind_of_layer(layer) for layer in range(config.num_layers)]
        self._seen = {
            kind: _seen_inputs(config, kind, like.device)
            for kind in set(self._kinds)
            if kind != "full"
        }
        self._slots = torch.arange(num_slots, device=like.device)
        self._all_inputs = torch.arange(config.length, device=like.device)
        # What a recorded step reads and writes.
        self._codes = torch.zeros(
            num_slots, config.num_codebooks, dtype=torch.int64, device=like.device
        )
        self._positions = torch.zeros(num_slots, dtype=torch.int64, device=like.device)
        self._hidden = like.new_zeros(num_slots, config.width)
        self._inputs = torch.zeros_like(self._positions)
        self._bound = config.length
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(each.nbytes for each in self._cache.keys + self._cache.values)

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        """Take in the codes [B, M] of the slots' [B] positions [B]: states [B, W]."""
        device = self._hidden.device
        rows = torch.from_numpy(slots).to(device)
        self._codes.index_copy_(0, rows, codes)
        self._positions.index_copy_(0, rows, torch.from_numpy(positions).to(device))
        last_input = int(positions.max()) + self._first_input
        self._bound = min(self._length, -(-(last_input + 1) // _BLOCK) * _BLOCK)
        if self._hidden.device.type == "cuda":
            self._replay()
        else:
            self._run()
        return self._hidden.index_select(0, rows)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store every slot's key and value, then attend: all [S, H, D] -> [S, H * D]."""
        kind, inputs = self._kinds[layer], self._inputs
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._slots, :, inputs] = key
        values[self._slots, :, inputs] = value
        if kind == "full":
            keys, values = keys[:, :, : self._bound], values[:, :, : self._bound]
            mask = self._all_inputs[: self._bound] <= inputs[:, None]
        else:
            table, seen = self._seen[kind]
            chosen = table.index_select(0, inputs)[:, None, :, None]
            keys, values = (torch.take_along_dim(each, chosen, dim=2) for each in (keys, values))
            mask = seen.index_select(0, inputs)
        attended = F.scaled_dot_product_attention(
            query[:, :, None], keys, values, attn_mask=mask[:, None, None]
        )
        return attended.flatten(1)

    def pack(self, prefix: KeyValueCache) -> list[tuple[Tensor, Tensor]]:
        """What `load` writes for sequences that begin as a cache of one row does."""
        return [
            (key[0, :, : prefix.filled], value[0, :, : prefix.filled])
            for key, value in zip(prefix.keys, prefix.values, strict=True)
        ]

    def load(self, slots: Tensor, packed: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin the same sequence in each of the slots [B]."""
        for layer, (key, value) in enumerate(packed):
            self._cache.keys[layer][slots, :, : key.shape[1]] = key
            self._cache.values[layer][slots, :, : value.shape[1]] = value

    def _run(self) -> None:
        self._inputs = self._positions + self._first_input
        self._hidden.copy_(self._step(self._codes, self._positions, self))

    def _replay(self) -> None:
        graph = self._graphs.get(self._bound)
        if graph is None:
            # Repeating a step changes nothing: it writes the same keys in the same places.
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    self._run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = self._graphs[self._bound] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
        graph.replay()


def _seen_inputs(
    config: TransformerConfig, kind: AttentionKind, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each input the indices [L, n] that it sees, filled up with 0, and which of them count."""
    visible = visibility(kind, config.text_length, config.grid_size, config.conv_kernel_size)
    counts = visible.sum(dim=1)
    n = int(counts[config.text_length + 1 :].max()) if config.num_positions > 1 else 1
    order = visible.int().argsort(dim=1, descending=True, stable=True)[:, :n]
    counted = torch.arange(n) < counts[:, None]
    return order.where(counted, 0).to(device), counted.to(device)
