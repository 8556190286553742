"""Window tuning: the seconds of a decoding step by its number of rows, measured when a model loads.

Several guessed positions of a candidate are several rows of a step. How much longer a step of more
rows takes decides how many promise most (`dalle.decoding.windows`); it depends on the model,
the precision, the processor and what else runs on it, so steps are timed. No image depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dalle.decoding.engine import DecodeEngine

SECONDS = 0.5  # for all measurements
_MIN_ROUNDS, _MAX_ROUNDS = 3, 15


def measure_windows(
    engine: DecodeEngine,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return the least seconds of a step by its number of rows; nothing where it has no windows.

    Rounds of one step with each number of rows are timed for `seconds`, 3 to 15 times. What else
    runs on the processor lengthens some of them. Numbers of rows that one round alone would take
    longer for are left out: a step of so many rows is too slow. The engine must be idle.
    """
    trials = engine.trials()
    times: dict[int, list[float]] = {rows: [] for rows in trials}
    ends = clock() + seconds
    for rounds in range(1, _MAX_ROUNDS + 1):
        for rows, work in list(trials.items()):
            if rounds > 1:
                work()  # or the caches would hold what another number of rows has left there
            began = clock()
            if rounds == 1 and began > ends:
                del trials[rows], times[rows]
                continue
            work()
            times[rows].append(clock() - began)
        if rounds >= _MIN_ROUNDS and clock() > ends:
            break
    return {rows: min(each) for rows, each in times.items()}
