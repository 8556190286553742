"""Windows of guessed positions in compiled code, and several steps of them in one call.

The same as `dalle.decoding.windows.WindowDecoder`, whose steps of a small model would take longer
in Python than in the model. The C++ is `csrc/windows.h`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from ctypes import byref

import numpy as np

from dalle.decoding.cpu.structures import (
    CCandidate,
    CCounts,
    CLeader,
    CState,
    sampling_numbers,
)
from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.step import CandidateTokens, DecodeRequest, SlotState, WindowCounts

Call = Callable[..., None]
"""Calls `dalle_decode` of a step: most rows, then its arguments."""

_MOST_SECONDS = 3600.0  # which the library's clock can add
_CANDIDATE, _LEADER = np.dtype(CCandidate), np.dtype(CLeader)


class CompiledWindows:
    """The windows of one engine. call: of the step's library."""

    def __init__(self, call: Call, state: SlotState, codebook_size: int) -> None:
        self._call, self._state, self._codebook_size = call, state, codebook_size
        _, self._widest, _ = state.hidden.shape
        _, self._num_positions, _ = state.image_tokens.shape
        self._c_state = CState(
            hidden=state.hidden.data_ptr(),
            tokens=state.image_tokens.data_ptr(),
            noise_keys=state.noise_keys.data_ptr(),
            log_likelihood=state.log_likelihood.data_ptr(),
            widest=self._widest,
            num_positions=self._num_positions,
        )

    def decode(
        self, candidates: Sequence[CandidateTokens], width: int, seconds: float
    ) -> WindowCounts:
        """Sample the candidates' windows, and run the model on the next ones of at most `width`.

        Once, and again until a candidate has all positions or `seconds` have passed.
        """
        requests = list({id(each.request): each.request for each in candidates}.values())
        places = {id(each): place for place, each in enumerate(requests)}
        table = np.array(
            [
                (
                    sampling_numbers(each.request.options, self._codebook_size),
                    each.slot,
                    -1 if each.guidance_slot is None else each.guidance_slot,
                    each.position,
                    each.window,
                    each.guessed,
                    places[id(each.request)],
                )
                for each in candidates
            ],
            dtype=_CANDIDATE,
        )
        at = {id(each): place for place, each in enumerate(candidates)}
        leaders = np.array([_leader(each.leader, at) for each in requests], dtype=_LEADER)
        compared, right = np.zeros((2, self._widest + 1), np.int64)
        counts = CCounts(compared=compared.ctypes.data, right=right.ctypes.data)
        rows_each = 1 + (table["blank_slot"] >= 0)
        following = (self._num_positions - table["position"]).clip(max=width)
        rows = max((rows_each * each).sum() for each in (table["window"], following))
        self._run(int(rows), table, leaders, width, seconds, counts)
        for each, position, window, guessed in zip(
            candidates,
            *(table[name].tolist() for name in ("position", "window", "guessed")),
            strict=True,
        ):
            each.move(position - each.position, counts.steps)
            each.window, each.guessed = window, guessed
        for request, place in zip(requests, leaders["candidate"].tolist(), strict=True):
            if place >= 0:
                request.leader = candidates[place]
        return WindowCounts(compared, right, counts.steps)

    def _run(
        self,
        rows: int,
        candidates: np.ndarray,
        leaders: np.ndarray,
        width: int,
        seconds: float,
        counts: CCounts,
    ) -> None:
        """Call `dalle_decode` on arrays of its structures, which it changes. rows: of a step."""
        self._call(
            rows,
            byref(self._c_state),
            candidates.ctypes.data,
            len(candidates),
            leaders.ctypes.data,
            width,
            round(1e9 * min(seconds, _MOST_SECONDS)),
            byref(counts),
        )

    def trial(self, num_candidates: int, width: int) -> Callable[[], None]:
        """As `WindowDecoder.trial`."""
        request = DecodeRequest(0, SamplingOptions(), deque(), None, [])
        options = sampling_numbers(request.options, self._codebook_size)
        position = 1 + (self._num_positions - 1 - width) // 2
        first = np.array(
            [(options, slot, -1, position, width, position, 0) for slot in range(num_candidates)],
            dtype=_CANDIDATE,
        )
        leaders = np.array([_leader(None, {})], dtype=_LEADER)
        tokens = self._state.image_tokens[:num_candidates]
        found = np.zeros((2, self._widest + 1), np.int64)
        counts = CCounts(compared=found[0].ctypes.data, right=found[1].ctypes.data)

        def work() -> None:
            assert len(found) == 2  # it is what the counts' memory belongs to
            tokens.zero_()  # or what the last call has sampled would be right guesses
            self._run(num_candidates * width, first.copy(), leaders.copy(), width, 0.0, counts)

        return work


def _leader(leader: CandidateTokens | None, places: dict[int, int]) -> tuple[int, int, int, int]:
    """Return the fields of `CLeader`. places: of the candidates by identity."""
    if leader is None:
        return 0, 0, 0, -1
    place = places.get(id(leader), -1)
    return leader.image_tokens.data_ptr(), leader.position, leader.guessed, place
