"""Thread tuning: the number of CPU threads that sample fastest, found by timing steps for a second.

A kernel ends when its last thread does. Where another process uses one of two processors, two
threads wait for the slower one in every kernel and are slower than one alone; on a quiet machine
they are nearly twice as fast. No system file tells the two apart, so real steps are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from dalle.decoding.engine import DecodeEngine
from dalle.models.transformer import PADDING

SECONDS = 1.0  # for all measurements
_MAX_ROUNDS = 25
_WORTH = 0.95  # more threads must take less than this share of the time of fewer


def choices(most: int) -> list[int]:
    """Return the numbers of threads to try: 1, 2, 4, … and `most`."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def measure_steps(
    engine: DecodeEngine,
    numbers: Sequence[int],
    *,
    candidates: int,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return the median seconds of a step of `candidates`, by number of threads.

    A step samples one position of each.

    Rounds of one step with each number, in rotated order, are timed for `seconds` or 25 times; the
    first round is a warm-up and counts only where there is no other. Leaves the engine idle, and
    torch's threads of the calling thread at the last number.
    """
    ends = clock() + seconds
    text_tokens = torch.full((1, engine.model.config.text_length), PADDING)
    text_tokens = text_tokens.to(engine.model.text_position.device)
    times: dict[int, list[float]] = {number: [] for number in numbers}
    request = None
    fixed, engine.windows.fixed = engine.windows.fixed, 1
    try:
        for turn in range(_MAX_ROUNDS + 1):
            for place in range(len(numbers)):
                number = numbers[(place + turn) % len(numbers)]
                if engine.is_idle:  # at first, and when all candidates are finished
                    request = engine.submit(text_tokens, candidates=range(candidates), seed=0)
                    engine.step()  # also fills the slots, which is not to be timed
                torch.set_num_threads(number)
                began = clock()
                engine.step()
                times[number].append(clock() - began)
            if clock() > ends:
                break
    finally:
        engine.windows.fixed = fixed
        if request is not None:
            engine.cancel(request)
    return {
        number: statistics.median(measured[1:] or measured) for number, measured in times.items()
    }


def fastest(seconds: Mapping[int, float]) -> int:
    """Return the number of threads to use, by the seconds of a step with each.

    Fewer where more gain little: requests' threads can then use the processor.
    """
    best = min(seconds)
    for number in sorted(seconds):
        if seconds[number] < _WORTH * seconds[best]:
            best = number
    return best
