"""Parallel decoding: several positions of a candidate in one step, and the same tokens exactly.

A candidate's noise is a function of its seed, number and position, so that its image is the one
fixed point of "sample every position from what the tokens before it give". A step samples a window
of positions, all but the first by guesses of the tokens between. The first position is exact, and
each further one as long as the guess before it equals what was sampled. The other samples are the
next guesses. That is fixed-point (Jacobi) iteration: Wiggers & Hoogeboom, "Predictive Sampling with
Forecasting Autoregressive Models" (ICML 2020); Song et al., "Accelerating Feedforward Computation
via Parallel Nonlinear Equation Solving" (ICML 2021).

    WindowWidth      how wide the windows are
    sample_windows   hidden states of the windows -> exact positions, and guesses
    run_windows      guesses -> hidden states of the next windows
    trial            the same work for no candidate, to be timed

A wider window has more rows, which take longer, and its further positions are exact less often. The
seconds of a step by its rows are measured when a model is loaded, how often positions are exact is
counted while images are decoded, and the width is the one that promises most positions a second.

Works on a CPU. Letters: S slots, K widest window, B rows, R of them with caption, C candidates,
N positions, M codes, G side of the grid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import torch

from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.step import Batch, CandidateTokens, DecodeRequest, SlotState, Step

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


def sample_windows(step: Step, batch: Batch, state: SlotState) -> np.ndarray:
    """Sample every row of a batch, and move each candidate past its exact positions.

    Returns how many those are, [C], 1 or more.
    """
    S, N, M = state.image_tokens.shape
    tokens = state.image_tokens.view(S * N, M)
    hidden = state.hidden.flatten(0, 1).index_select(0, _hidden_rows(batch, state))
    noise_keys = state.noise_keys.view(S * N, M).index_select(0, batch.places)
    sampled, log_p = step.sample(hidden, noise_keys, batch)
    differs = (tokens.index_select(0, batch.places) != sampled).any(dim=1).numpy()
    tokens.index_copy_(0, batch.places, sampled)
    state.log_p.view(S * N).index_copy_(0, batch.places, log_p)
    # The last position of a window is no guess of another one: if it is reached, it is exact.
    differs[batch.starts + batch.widths - 1] = True
    offsets = batch.numpy_offsets[: len(differs)]
    exact: np.ndarray = np.minimum.reduceat(np.where(differs, offsets, N), batch.starts) + 1
    for candidate, number in zip(batch.candidates, exact.tolist(), strict=True):
        candidate.guessed = max(candidate.guessed, candidate.position + candidate.window)
        candidate.move(number)
        if candidate.position == N:
            _sum_log_p(candidate, state)
    return exact


def run_windows(step: Step, batch: Batch, state: SlotState) -> None:
    """Run the model on the position before each row of a batch, which predicts the row's."""
    S, N, M = state.image_tokens.shape
    for candidate in batch.candidates:
        _guess(candidate, N)
    tokens = state.image_tokens.view(S * N, M)
    codes = batch.spread(tokens.index_select(0, batch.places - 1))
    hidden = step(batch.numpy_rows, codes, batch.numpy_positions - 1)
    state.hidden.flatten(0, 1).index_copy_(0, _hidden_rows(batch, state), hidden)


def trial(step: Step, state: SlotState, num_candidates: int, width: int) -> Callable[[], None]:
    """Return the work of a step of windows in the middle of an image, which changes no candidate.

    It writes to the first slots, which must be free. Raises ValueError for windows that do not fit.
    """
    S, N, M = state.image_tokens.shape
    if num_candidates > S or width > min(state.hidden.shape[1], N - 1):
        raise ValueError(f"no room for {num_candidates} windows of {width} positions")
    request = DecodeRequest(0, SamplingOptions(), deque(), None, [])
    position = 1 + (N - 1 - width) // 2
    candidates = [
        CandidateTokens(request, slot, (slot,), position, state.image_tokens[slot], width, N)
        for slot in range(num_candidates)
    ]
    batch = Batch(candidates, N, state.hidden.device)

    def work() -> None:
        run_windows(step, batch, state)
        hidden = state.hidden.flatten(0, 1).index_select(0, _hidden_rows(batch, state))
        noise_keys = state.noise_keys.view(S * N, M).index_select(0, batch.places)
        step.sample(hidden, noise_keys, batch)

    return work


def _hidden_rows(batch: Batch, state: SlotState) -> torch.Tensor:
    """Return the index of each row's hidden state among [S · K], [B]."""
    return torch.from_numpy(batch.numpy_rows * state.hidden.shape[1] + batch.numpy_offsets)


def _guess(candidate: CandidateTokens, num_positions: int) -> None:
    """Guess the tokens that the window needs and has none of: those of the row above."""
    first, end = candidate.guessed, candidate.position + candidate.window - 1
    if first >= end:
        return
    grid_size = round(num_positions**0.5)
    tokens = candidate.image_tokens.numpy()
    for begin in range(first, end, grid_size):
        stop = min(begin + grid_size, end)
        if begin >= grid_size:
            tokens[begin:stop] = tokens[begin - grid_size : stop - grid_size]
        elif begin:
            tokens[begin:stop] = tokens[begin - 1]
        else:
            tokens[begin:stop] = 0
    candidate.guessed = end


def _sum_log_p(candidate: CandidateTokens, state: SlotState) -> None:
    """Sum the positions' log p one after the other, as they are added without windows."""
    each = state.log_p[candidate.slot].numpy()[candidate.num_primed :]
    state.log_likelihood[candidate.slot] = float(np.add.accumulate(each)[-1])
