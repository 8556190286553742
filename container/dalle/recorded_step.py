"""What the decoding steps for a GPU have in common: every slot every time, in shapes that never
change.

A GPU is fed faster than it can be told what to do, so that idle slots cost nothing and launching
kernels does: with fixed shapes and addresses a step is recorded once (a CUDA graph) and replayed.
A step awaits nothing, and sends nothing to the device while the same slots go on, so that the host
runs ahead. Also runs, unrecorded, on a CPU.

Letters: S slots, B busy slots, M codes, W width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from dalle.transformer import Dalle

_WARM_UPS = 2  # runs before a recording, in which libraries take their memory


class RecordedStep(ABC):
    """What a recorded step reads and writes, by slot."""

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
        self._is_on_gpu = device.type == "cuda"
        self._replays: dict[Hashable, Callable[[], None]] = {}

    def __contains__(self, name: Hashable) -> bool:
        return name in self._replays

    def add(self, name: Hashable, work: Callable[[], None]) -> None:
        """Record a piece of work; it is done a few times, which must change nothing."""
        self._replays[name] = _record(work).replay if self._is_on_gpu else work

    def replay(self, name: Hashable) -> None:
        """Do it."""
        self._replays[name]()


def _record(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
