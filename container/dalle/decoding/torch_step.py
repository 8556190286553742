"""The decoding step for a CPU: the busy slots only, and of each only what it sees.

Letters: B busy slots, M codes, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dalle.decoding.input_batch import Batch
from dalle.decoding.kv_cache import KeyRange, SlotTables
from dalle.decoding.step import DecodeStep
from dalle.models.attention import KeyValueCache
from dalle.models.transformer import Dalle
from dalle.types import Precision


class RaggedStep:
    """A model's decoding step with the keys and values of all its slots.

    key_ranges: one a layer makes keys and values bytes; None keeps float32.
    """

    def __init__(
        self,
        model: Dalle,
        num_slots: int,
        *,
        precision: Precision = "fp32",
        key_ranges: Sequence[KeyRange] | None = None,
    ) -> None:
        self._step = DecodeStep(model, precision)
        self._tables = SlotTables(model.config, num_slots, key_ranges=key_ranges)
        self._first_input = model.config.text_length + 1  # index of position 0 as an input
        self.code_logits = self._step.code_logits

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return self._tables.num_bytes

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        """As `SlotStep`, whose rule lets plans be kept."""
        self._tables.plan(slots, positions + self._first_input)
        return self._step(codes, torch.from_numpy(positions), self._tables)

    def draw(self, hidden: Tensor, uniforms: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `DrawingStep`."""
        return batch.draw(self.code_logits, hidden, uniforms)

    def pack(self, prefix: KeyValueCache) -> list[tuple[Tensor, Tensor]]:
        """What `load` writes for sequences that begin as a cache of one row does."""
        return self._tables.pack(prefix)

    def load(self, slots: Tensor, packed: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin the same sequence in each of the slots [B]."""
        self._tables.load(slots, packed)
