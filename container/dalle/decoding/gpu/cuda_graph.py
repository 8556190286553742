"""CUDA graphs of decoding steps: a step computes all slots in fixed shapes, and is replayed.

On a GPU launching kernels takes longer than computing idle slots: with fixed shapes and addresses
a step is captured once as a CUDA graph and replayed. A step waits for nothing, and sends nothing to
the device while the same slots continue, so that the host runs ahead. Also runs on a CPU, without
graphs.

Letters: S slots, B busy slots, M codes, W width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dalle.decoding.step import Step
from dalle.models.transformer import Dalle

_WARM_UPS = 2  # runs before a capture, in which libraries allocate their memory


class CudaGraphStep(Step):
    """A step with the tensors that its graphs read and write, by slot, in the model's dtype."""

    window_refusal = "its CUDA graph has one row for each slot"

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
        self._graphs = CudaGraphs(like.device)
        # Of the last step.
        self._last_slots: np.ndarray | None = None
        self._busy = self._one = self._positions[:0]

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self._tables)

    def __call__(self, slots: np.ndarray, codes: Tensor, positions: np.ndarray) -> Tensor:
        # The positions of sequences that continue stay on the device.
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
        """Compute hidden of all slots from their codes and positions.

        last_input: no slot is at a later input. A second run changes nothing.
        """


class CudaGraphs:
    """Functions by name: on a GPU captured as CUDA graphs, on a CPU called as they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._replays: dict[Hashable, Callable[[], None]] = {}

    def __contains__(self, name: Hashable) -> bool:
        return name in self._replays

    def add(self, name: Hashable, work: Callable[[], None]) -> None:
        """Capture a function, which is called a few times for it; that must change nothing."""
        on_gpu = self._device.type == "cuda"
        self._replays[name] = _capture(work, self._device).replay if on_gpu else work

    def replay(self, name: Hashable) -> None:
        """Run the function."""
        self._replays[name]()


def _capture(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    # Without the device's stream the capture would run on the current device's.
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
    """Return one stream for all captures on a device: libraries keep memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
