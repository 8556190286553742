"""What the decoding steps for a GPU have in common: every slot every time, in fixed shapes.

A GPU is fed faster than it can be told what to do, so that idle slots cost nothing and launching
kernels does: with fixed shapes and addresses a step is recorded once (a CUDA graph) and replayed.
A step awaits nothing, and sends nothing to the device while the same slots go on, so that the host
runs ahead. Also runs, unrecorded, on a CPU.

Letters: S slots, B busy slots, M codes, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dalle.models.transformer import Dalle

_WARM_UPS = 2  # runs before a recording, in which libraries take their memory


class RecordedStep(ABC):
    """A step with what its recordings read and write, by slot, in the model's dtype."""

    _tables: list[Tensor]
    """Keys and values, by layer."""

    def __init__(self, model: Dalle, num_slots: int) -> None:
        config, like = model.config, model.text_position.detach()
        self._first_input = config.text_length + 1  # index of position 0 as an input
        self._num_slots, self._length = num_slots, config.length
        self._codes = torch.zeros(
            num_slots, config.num_codebooks, dtype=torch.int64, device=like.device
        )
        self._positions = torch.zeros(num_slots, dtype=torch.int64, device=like.device)
        self._hidden = like.new_zeros(num_slots, config.width)
        self._recordings = Recordings(like.device)
        # Of the last step.
        self._last_slots: np.ndarray | None = None
        self._busy = self._one = self._positions[:0]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(each.nbytes for each in self._tables)

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        """As `SlotStep`, whose rule lets positions stay on the device."""
        if slots is self._last_slots:
            self._positions.index_add_(0, self._busy, self._one)
        else:
            self._last_slots = slots
            self._busy = torch.from_numpy(slots).to(self._hidden.device)
            self._one = torch.ones_like(self._busy)
            current = torch.from_numpy(positions).to(self._hidden.device)
            self._positions.index_copy_(0, self._busy, current)
        self._codes.index_copy_(0, self._busy, codes)
        self._run(int(positions.max()) + self._first_input)
        return self._hidden.index_select(0, self._busy)

    @abstractmethod
    def _run(self, last_input: int) -> None:
        """Codes and positions of all slots into hidden, none of them at an input beyond the last;
        again changes nothing."""


class Recordings:
    """Pieces of work by name: on a GPU as CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._replays: dict[Hashable, Callable[[], None]] = {}

    def __contains__(self, name: Hashable) -> bool:
        return name in self._replays

    def add(self, name: Hashable, work: Callable[[], None]) -> None:
        """Record a piece of work; it is done a few times, which must change nothing."""
        on_gpu = self._device.type == "cuda"
        self._replays[name] = _record(work, self._device).replay if on_gpu else work

    def replay(self, name: Hashable) -> None:
        """Do it."""
        self._replays[name]()


def _record(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    # Streams are a device's own, and what is given no stream would be recorded on another device's.
    with torch.cuda.device(device):
        aside = _stream(device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            work()
    return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device: libraries keep memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
