"""Width of the windows of parallel decoding: the one that promises most positions a second.

A wider window has more rows, which take longer, and its further positions are exact less often. The
seconds of a step by its rows are measured when a model is loaded; how often positions are exact is
counted while images are decoded. Letters: C candidates, K widest window.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_MEMORY = 0.97  # weight of all earlier steps when a step is counted
_PRIOR = 0.6  # assumed share of right guesses, where nothing has been counted
_PRIOR_COUNT = 2.0  # guesses that it weighs as much as
_ROWS_AT_ONCE = (
    16  # where nothing is measured, a step of so many rows takes twice as long as of none
)


class WindowWidth:
    """Counts of right guesses, and the width that follows from them and from measured seconds.

    widest: K. fixed: the width where the rows have room for it; None: what promises most.
    seconds: of a step by its number of rows, measured; empty: an assumption.
    """

    def __init__(self, widest: int, fixed: int | None = None) -> None:
        self.widest, self.fixed = widest, fixed
        self.seconds: Mapping[int, float] = {}
        # Guesses by their place in a window, and the right ones, given that those before were.
        self._guesses, self._right = np.zeros(widest), np.zeros(widest)

    def record(self, widths: np.ndarray, exact: np.ndarray) -> None:
        """Count a step's guesses. widths, exact: rows and exact positions by candidate, [C]."""
        # A window's last position is nobody's guess.
        right, guesses = exact - 1, np.minimum(exact, widths - 1)
        for counts, places in ((self._right, right), (self._guesses, guesses)):
            counts *= _MEMORY
            by_number = np.bincount(places, minlength=self.widest + 1)
            counts += len(exact) - np.cumsum(by_number)[: self.widest]

    def choose(self, rows_each: int, most_rows: int | None = None) -> int:
        """Return the width for a step in which each position of the windows takes `rows_each` rows.

        most_rows: of the whole step.
        """
        widest = self.widest if most_rows is None else min(self.widest, most_rows // rows_each)
        if self.fixed is not None:
            widest = min(self.fixed, widest)
        if self.fixed is not None or widest <= 1:
            return max(1, widest)
        widths = np.arange(1, widest + 1)
        promised = self.expected()[:widest] / self._seconds_of(widths * rows_each)
        return int(widths[promised.argmax()])

    def expected(self) -> np.ndarray:
        """Return the expected exact positions of a step by its width from 1 on, [K]."""
        share, shares = _PRIOR, []
        for right, guesses in zip(self._right.tolist(), self._guesses.tolist(), strict=True):
            share = (right + _PRIOR_COUNT * share) / (guesses + _PRIOR_COUNT)
            shares.append(share)
        return 1 + np.concatenate([[0.0], np.cumprod(shares[:-1]).cumsum()])

    def _seconds_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the seconds of steps by their rows, between measured ones in proportion."""
        if not self.seconds:
            return 1 + rows / _ROWS_AT_ONCE
        known = sorted(self.seconds)
        seconds: np.ndarray = np.interp(rows, known, [self.seconds[each] for each in known])
        # Beyond the most that were measured each row is taken to cost as much as the mean one.
        return seconds * np.maximum(1.0, rows / known[-1])
