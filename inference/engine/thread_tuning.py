"""How many threads draw fastest on this machine as it is now: found by trying, in a second.

A kernel ends when its last thread does. Where a neighbour has one of two processors, two threads
wait for the slower one in every kernel and draw slower than one alone; on a quiet machine they draw
nearly twice as fast. Which it is cannot be read anywhere, so real steps are timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from dalle.decoding.engine import DecodeEngine
from dalle.models.transformer import PADDING

SECONDS = 1.0  # for all of the trying
_MOST_ROUNDS = 25
_WORTH = 0.95  # of the time with fewer threads that more of them must stay below


def choices(most: int) -> list[int]:
    """1, 2, 4, … and `most`: what is tried where so many processors may be used."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})


def measure_steps(
    engine: DecodeEngine,
    numbers: Sequence[int],
    *,
    candidates: int,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """The median time of a step that draws `candidates`, in seconds, by number of threads.

    The numbers take turns, each beginning a round as often as the others, until the time is over
    or there are enough; the first round warms up and counts only where there is no other. Leaves
    the engine idle and torch's threads, of the calling thread, at the last number that was tried.
    """
    ends = clock() + seconds
    text_tokens = torch.full((1, engine.model.config.text_length), PADDING)
    text_tokens = text_tokens.to(engine.model.text_position.device)
    times: dict[int, list[float]] = {number: [] for number in numbers}
    generation = None
    try:
        for turn in range(_MOST_ROUNDS + 1):
            for place in range(len(numbers)):
                number = numbers[(place + turn) % len(numbers)]
                if engine.is_idle:  # a small model's pictures are soon whole
                    generation = engine.submit(text_tokens, candidates=range(candidates), seed=0)
                    engine.step()  # fills the slots, which is not a step's own work
                torch.set_num_threads(number)
                began = clock()
                engine.step()
                times[number].append(clock() - began)
            if clock() > ends:
                break
    finally:
        if generation is not None:
            engine.cancel(generation)
    return {
        number: statistics.median(measured[1:] or measured) for number, measured in times.items()
    }


def fastest(seconds: Mapping[int, float]) -> int:
    """The number of threads to draw with, by the seconds of a step with each.

    Fewer where more gain next to nothing: requests' threads can use the processor.
    """
    best = min(seconds)
    for number in sorted(seconds):
        if seconds[number] < _WORTH * seconds[best]:
            best = number
    return best
