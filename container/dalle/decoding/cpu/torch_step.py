"""The decoding step for a CPU by torch's kernels, where `dalle.decoding.cpu.step` cannot run.

Computes the busy slots only, and of each only what its query sees.
Letters: B busy slots, M codes, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dalle.decoding.cpu.kv_cache import KeyRange, SlotCache
from dalle.decoding.step import Step
from dalle.decoding.torch_decoder import TorchDecoder
from dalle.models.layers import KeyValueCache
from dalle.models.transformer import Dalle
from dalle.types import Precision


class CpuTorchStep(Step):
    """A model's decoding step with the keys and values of all its slots.

    key_ranges: one a layer stores keys and values as bytes; None keeps float32.
    """

    def __init__(
        self,
        model: Dalle,
        num_slots: int,
        *,
        precision: Precision = "fp32",
        key_ranges: Sequence[KeyRange] | None = None,
    ) -> None:
        self._decoder = TorchDecoder(model, precision)
        self._cache = SlotCache(model.config, num_slots, key_ranges=key_ranges)
        self._first_input = model.config.text_length + 1  # index of position 0 as an input

    @property
    def num_bytes(self) -> int:
        return self._cache.num_bytes

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        self._cache.plan(slots, positions + self._first_input)
        return self._decoder(codes, torch.from_numpy(positions), self._cache)

    def code_logits(self, hidden: Tensor, m: int, codes: Tensor) -> Tensor:
        return self._decoder.code_logits(hidden, m, codes)

    def pack(self, prefix: KeyValueCache) -> list[tuple[Tensor, Tensor]]:
        return self._cache.pack(prefix)

    def load(self, slots: Tensor, packed: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._cache.load(slots, packed)
