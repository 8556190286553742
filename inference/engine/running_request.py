"""One request for pictures on its way: what is drawn of it, what it has cost, what comes of it.

Letters: E embedding.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from dalle.decoding.request import FinishedCandidate, Generation
from dalle.errors import DalleError
from inference.api.rendering import Candidate, GenerateResult, rank
from inference.api.replies import RankedBy
from inference.engine.control import Control
from inference.engine.input_processor import GenerateWork

_NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


@dataclass(eq=False)
class Drawing:
    """A request on its way."""

    work: GenerateWork
    control: Control
    generation: Generation
    caption_embedding: Tensor | None
    """[1, E], where there is a CLIP."""
    positions: int
    """That are not primed."""
    began: float
    drawn: deque[FinishedCandidate] = field(default_factory=deque)
    """Candidates that are no pictures yet."""
    finished: list[Candidate] = field(default_factory=list)
    decode_seconds: float = 0.0
    rank_seconds: float = 0.0
    cost_seconds: float = 0.0
    """Its share of the device's time."""
    is_stopped: bool = False
    """Nothing more is drawn: the deadline is near."""

    @property
    def wanted(self) -> int:
        """Candidates that are to be drawn or being drawn."""
        return len(self.generation.waiting) + self.generation.in_slots

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        if self.control.cancelled:
            return True
        return self.generation.is_over and not self.drawn

    def let_go(self) -> None:
        """Keep the pictures of the best `num_images` only: a reply has no others, and a stream has
        sent them. So many are in memory, however many are drawn."""
        kept = self.work.num_images
        if len(self.finished) <= kept:
            return
        ranked = rank(self.finished)
        self.finished = [
            *ranked[:kept],
            *(replace(each, pixels=_NO_PIXELS) for each in ranked[kept:]),
        ]

    def outcome(self, ranked_by: RankedBy) -> GenerateResult | DalleError:
        """What is handed back of a request that is over."""
        if self.control.cancelled or not self.finished:
            return self.control.error()
        elapsed = time.monotonic() - self.began
        return GenerateResult(
            ranked=rank(self.finished),
            ranked_by=ranked_by,
            seed=self.work.seed,
            num_candidates=self.work.num_candidates,
            sample_seconds=max(0.0, elapsed - self.decode_seconds - self.rank_seconds),
            decode_seconds=self.decode_seconds,
            rank_seconds=self.rank_seconds,
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that is over. cost_seconds: its share of the device's time."""

    drawing: Drawing
    outcome: GenerateResult | DalleError
    cost_seconds: float
