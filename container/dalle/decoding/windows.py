"""Parallel decoding: several positions of a candidate in one step, and the same tokens exactly.

A candidate's noise is a function of its seed, number and position, so that its image is the one
fixed point of "sample every position from what the tokens before it give". A step samples a window
of positions, all but the first by guesses of the tokens between. The first position is exact, and
each further one as long as the guess before it equals what was sampled. The other samples are the
next guesses. That is fixed-point (Jacobi) iteration: Wiggers & Hoogeboom, "Predictive Sampling with
Forecasting Autoregressive Models" (ICML 2020); Song et al., "Accelerating Feedforward Computation
via Parallel Nonlinear Equation Solving" (ICML 2021).

    WindowWidth      how wide the windows are
    WindowDecoder    sample: hidden states of the windows -> exact positions, and guesses
                     run: guesses -> hidden states of the next windows

A wider window has more rows, which take longer, and its further positions are exact less often. The
seconds of a step by its rows are measured when a model is loaded, how often positions are exact is
counted while images are decoded, and the width is the one that promises most positions a second.

Works on a CPU. Letters: S slots, K widest window, B rows, R of them with caption, C candidates,
N positions, M codes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.step import (
    Batch,
    CandidateTokens,
    DecodeRequest,
    SlotState,
    Step,
    WindowCounts,
)

_MEMORY = 0.97  # weight of all earlier steps when a step is counted
_PRIOR = 0.6  # assumed share of right guesses, where nothing has been counted
_PRIOR_COUNT = 2.0  # guesses that it weighs as much as
# Where nothing is measured, a step of so many rows takes twice as long as of none.
_ROWS_AT_ONCE = 16
_STEPS_PER_CHOICE = 8  # with the same width, since choosing one takes as long as a small layer
_HEAVIEST = 1e100  # weight of a step above which all counts are scaled down


class WindowWidth:
    """Counts of right guesses, and the width that follows from them and from measured seconds.

    widest: K. fixed: the width where the rows have room for it; None: what promises most.
    """

    def __init__(self, widest: int, fixed: int | None = None) -> None:
        self.widest, self.fixed = widest, fixed
        self._seconds: Mapping[int, float] = {}
        # Windows by the number of their guesses that were compared, and that were right. Later
        # steps have greater weights, as if the counts of earlier ones shrank.
        self._compared, self._right = [0.0] * (widest + 1), [0.0] * (widest + 1)
        self._weight = 1.0
        self._steps_to_choice = _STEPS_PER_CHOICE
        self._choices: dict[tuple[int, int | None], int] = {}

    @property
    def seconds(self) -> Mapping[int, float]:
        """Measured seconds of a step by its number of rows; empty: an assumption is made."""
        return self._seconds

    @seconds.setter
    def seconds(self, measured: Mapping[int, float]) -> None:
        self._seconds = measured
        self._choices.clear()

    def record(self, widths: Iterable[int], exact: Iterable[int]) -> None:
        """Count a step's guesses. widths, exact: rows and exact positions by candidate, [C].

        Without candidates the earlier counts fade all the same, so that after many steps of one
        position windows are tried again.
        """
        self._weight /= _MEMORY
        for width, number in zip(widths, exact, strict=True):
            # No guess is compared at a window's last position.
            self._compared[min(number, width - 1)] += self._weight
            self._right[number - 1] += self._weight
        self._count_steps(1)

    def record_counts(self, counts: WindowCounts) -> None:
        """Count the guesses of several steps."""
        self._weight /= _MEMORY**counts.steps
        for own, found in ((self._compared, counts.compared), (self._right, counts.right)):
            for number in found.nonzero()[0].tolist():
                own[number] += self._weight * float(found[number])
        self._count_steps(counts.steps)

    def _count_steps(self, steps: int) -> None:
        if self._weight > _HEAVIEST:
            self._compared, self._right = (
                [each / self._weight for each in counts] for counts in (self._compared, self._right)
            )
            self._weight = 1.0
        self._steps_to_choice -= steps
        if self._steps_to_choice <= 0:
            self._steps_to_choice = _STEPS_PER_CHOICE
            self._choices.clear()

    def choose(self, rows_each: int, most_rows: int | None = None) -> int:
        """Return the width for a step in which each position of the windows takes `rows_each` rows.

        most_rows: of the whole step.
        """
        if self.fixed is not None:
            widest = self.fixed if most_rows is None else min(self.fixed, most_rows // rows_each)
            return max(1, min(self.widest, widest))
        width = self._choices.get((rows_each, most_rows))
        if width is None:
            width = self._choices[rows_each, most_rows] = self._best(rows_each, most_rows)
        return width

    def _best(self, rows_each: int, most_rows: int | None) -> int:
        widest = self.widest if most_rows is None else min(self.widest, most_rows // rows_each)
        widths = np.arange(1, max(1, widest) + 1)
        promised = self.expected()[: len(widths)] / self._seconds_of(widths * rows_each)
        return int(widths[promised.argmax()])

    def expected(self) -> np.ndarray:
        """Return the expected exact positions of a step by its width from 1 on, [K]."""
        # Windows in which the guess at a place was compared, and in which it was right.
        compared, right = (
            (np.cumsum(counts[:0:-1])[::-1] / self._weight).tolist()
            for counts in (self._compared, self._right)
        )
        share, shares = _PRIOR, []
        for number, of in zip(right, compared, strict=True):
            share = (number + _PRIOR_COUNT * share) / (of + _PRIOR_COUNT)
            shares.append(share)
        return 1 + np.concatenate([[0.0], np.cumprod(shares[:-1]).cumsum()])

    def _seconds_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the seconds of steps by their rows, between measured ones in proportion."""
        if not self.seconds:
            return 1 + rows / _ROWS_AT_ONCE
        known = sorted(self.seconds)
        # Fewer rows do not take more time: where they seem to, something else ran meanwhile.
        measured = np.minimum.accumulate([self.seconds[each] for each in known[::-1]])[::-1]
        seconds: np.ndarray = np.interp(rows, known, measured)
        # Beyond the most that were measured each row is taken to cost as much as the mean one.
        return seconds * np.maximum(1.0, rows / known[-1])


class WindowDecoder:
    """A step and the engine's state, for candidates that have windows."""

    def __init__(self, step: Step, state: SlotState) -> None:
        S, N, M = state.image_tokens.shape
        self._step, self._state, self._num_positions = step, state, N
        self._tokens = state.image_tokens.view(S * N, M).numpy()
        self._noise_keys = state.noise_keys.view(S * N, M).numpy()
        self._log_p = state.log_p.view(S * N).numpy()
        # Of the last run: copied to the state only where other candidates follow.
        self._ran: Batch | None = None
        self._hidden = state.hidden[:0, 0]

    def sample(self, batch: Batch) -> list[int]:
        """Sample every row of a batch, and move each candidate past its exact positions.

        Returns how many those are, [C], 1 or more.
        """
        hidden = self._hidden if batch is self._ran else self._gather(batch)
        places = batch.numpy_places
        noise_keys = torch.from_numpy(self._noise_keys[places])
        sampled, log_p = self._step.sample(hidden, noise_keys, batch)
        tokens = sampled.numpy()
        exact = [1] * len(batch.candidates)
        if batch.has_windows:
            exact = _lengths_exact(batch, (self._tokens[places] != tokens).any(axis=1))
        self._tokens[places] = tokens
        self._log_p[places] = log_p.numpy()
        for candidate, number in zip(batch.candidates, exact, strict=True):
            candidate.guessed = max(candidate.guessed, candidate.position + candidate.window)
            candidate.move(number)
            leader = candidate.request.leader
            if leader is None or candidate.position > leader.position:
                candidate.request.leader = candidate
            if candidate.position == self._num_positions:
                self._sum_log_p(candidate)
        return exact

    def run(self, batch: Batch) -> None:
        """Run the model on the position before each row of a batch, which predicts the row's."""
        for candidate in batch.candidates:
            _guess(candidate)
        codes = self._tokens[batch.numpy_places - 1]
        if len(batch.guided):
            codes = np.concatenate([codes, codes[batch.guided]])
        positions = batch.numpy_positions - 1
        self._hidden = self._step(batch.numpy_rows, torch.from_numpy(codes), positions)
        self._ran = batch

    def trial(self, num_candidates: int, width: int) -> Callable[[], None]:
        """Return the work of a step in the middle of an image, to be timed: of no candidate.

        It writes to the first slots, which must be free. Raises ValueError for windows that do not
        fit.
        """
        S, N, _ = self._state.image_tokens.shape
        if num_candidates > S or width > min(self._state.hidden.shape[1], N - 1):
            raise ValueError(f"no room for {num_candidates} windows of {width} positions")
        request = DecodeRequest(0, SamplingOptions(), deque(), None, [])
        position = 1 + (N - 1 - width) // 2
        tokens = self._state.image_tokens
        candidates = [
            CandidateTokens(request, slot, (slot,), position, tokens[slot], width, N)
            for slot in range(num_candidates)
        ]

        def work() -> None:
            batch = Batch(candidates, N, tokens.device)
            self.run(batch)
            noise_keys = torch.from_numpy(self._noise_keys[batch.numpy_places])
            self._step.sample(self._hidden, noise_keys, batch)

        return work

    def _gather(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states [B, W] of a batch of other candidates than the last run's."""
        states = self._state.hidden.flatten(0, 1)
        if self._ran is not None:
            last = self._ran
            stay = np.array([each in batch.candidates for each in last.candidates])[
                last.row_candidates
            ]
            stay = np.flatnonzero(np.concatenate([stay, stay[last.guided]]))
            rows = self._hidden_rows(last)[stay]
            states.index_copy_(0, torch.from_numpy(rows), self._hidden[torch.from_numpy(stay)])
            self._ran = None
        return states.index_select(0, torch.from_numpy(self._hidden_rows(batch)))

    def _hidden_rows(self, batch: Batch) -> np.ndarray:
        """Return the index of each row's hidden state among [S · K], [B]."""
        rows: np.ndarray = batch.numpy_rows * self._state.hidden.shape[1] + batch.numpy_offsets
        return rows

    def _sum_log_p(self, candidate: CandidateTokens) -> None:
        """Sum the positions' log p one after the other, as they are added without windows."""
        first = candidate.slot * self._num_positions
        each = self._log_p[first + candidate.num_primed : first + self._num_positions]
        self._state.log_likelihood[candidate.slot] = float(np.add.accumulate(each)[-1])


def _lengths_exact(batch: Batch, differs: np.ndarray) -> list[int]:
    """Return how many first positions of each window are exact, [C].

    differs: whether what was sampled differs from the guess, [R]. It is changed.
    """
    # The last position of a window is no guess of another one: if it is reached, it is exact.
    if len(batch.candidates) == 1:
        differs[-1] = True
        return [int(differs.argmax()) + 1]
    differs[batch.starts + batch.widths - 1] = True
    offsets = np.where(differs, batch.numpy_offsets[: len(differs)], len(differs))
    exact: list[int] = (np.minimum.reduceat(offsets, batch.starts) + 1).tolist()
    return exact


def _guess(candidate: CandidateTokens) -> None:
    """Guess the tokens that the window needs and has none of.

    They are those of the furthest candidate of the same request where it has them, else those of
    the last position that has some.
    """
    first, end = candidate.guessed, candidate.position + candidate.window - 1
    if first >= end:
        return
    leader, tokens = candidate.request.leader, candidate.image_tokens.numpy()
    if leader is not None and leader is not candidate and leader.guessed >= end:
        tokens[first:end] = leader.image_tokens.numpy()[first:end]
    else:
        tokens[first:end] = tokens[first - 1] if first else 0
    candidate.guessed = end
