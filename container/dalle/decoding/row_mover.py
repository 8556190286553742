"""An engine's candidates moved on by a step that knows rows only, not where an engine keeps things.

Letters: B rows of a step, C candidates in the making, M codes, N positions.
"""

from __future__ import annotations

import numpy as np

from dalle.decoding.input_batch import Batch, SlotState
from dalle.decoding.step import DrawingStep


class RowMover:
    """What a `MovingStep` does, by fetching the rows and putting them back."""

    def __init__(self, step: DrawingStep) -> None:
        self._step = step

    def move(self, batch: Batch, state: SlotState) -> None:
        """As `MovingStep`."""
        N, M = state.image_tokens.shape[1:]
        hidden = state.hidden.index_select(0, batch.rows)
        uniforms = state.uniforms.view(-1, M).index_select(0, batch.places)
        codes, log_likelihood = self._step.draw(hidden, uniforms, batch)
        state.image_tokens.view(-1, M).index_copy_(0, batch.places, codes)
        state.log_likelihood.index_add_(0, batch.slots, log_likelihood)
        codes = batch.spread(codes)
        numpy_rows, rows, positions = batch.numpy_rows, batch.rows, batch.numpy_positions
        if (positions == N - 1).any():
            # Of those whose last position this was nothing is read any more.
            going_on = np.flatnonzero(positions < N - 1)
            if not len(going_on):
                return
            numpy_rows, positions = numpy_rows[going_on], positions[going_on]
            rows, codes = rows[going_on], codes[going_on]
        state.hidden.index_copy_(0, rows, self._step(numpy_rows, codes, positions))
