"""The decoding step of DALLE-pytorch's transformers: the model's own code, one input a sequence.

In float32 on any device. A step copies the keys and values of the busy slots, unless they lie side
by side.

Letters: S slots, B busy slots (rows of a step), M codes, V codebook size, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from torch import Tensor

from dalle.decoding.step import Step
from dalle.models.layers import KeyValueCache
from dalle.models.legacy.attention import LegacyCache
from dalle.models.legacy.transformer import LegacyTransformer


class LegacyStep(Step):
    """A model's decoding step with the keys and values of all its slots."""

    window_refusal = "a step of the old transformer has one row for each slot"

    def __init__(self, model: LegacyTransformer, num_slots: int) -> None:
        self._model = model
        self._cache = model.new_cache(num_slots)

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self._cache.tensors())

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        return self._model.step(codes, positions, self._cache, slots)

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        return self._model.code_logits(hidden, m, codes)

    def pack(self, prefix: KeyValueCache) -> list[Tensor]:
        """Return the prefix as the first row of each of the cache's tensors."""
        return [each[0] for each in cast(LegacyCache, prefix).tensors()]

    def load(self, slots: Tensor, packed: Sequence[Tensor]) -> None:
        for table, row in zip(self._cache.tensors(), packed, strict=True):
            table[slots] = row
