"""State of one request for images while it runs. Used by the model's thread only.

Letters: E embedding.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from dalle.decoding.request import CandidateTokens, DecodeRequest
from inference.api.rendering import Candidate, GenerateResult, rank
from inference.api.replies import RankedBy
from inference.engine.request import PreparedGeneration

_NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


@dataclass(eq=False)
class RunningRequest:
    """A request for images that was begun."""

    request: PreparedGeneration
    decoding: DecodeRequest
    """The request in the decoding engine."""
    caption_embedding: Tensor | None
    """[1, E] by CLIP; None without a CLIP."""
    num_positions: int
    """Positions that are sampled: all but the primed ones."""
    began: float
    sampled: deque[CandidateTokens] = field(default_factory=deque)
    """Candidates whose tokens are complete, and which are not decoded yet."""
    finished: list[Candidate] = field(default_factory=list)
    decode_seconds: float = 0.0
    rank_seconds: float = 0.0
    is_stopped: bool = False
    """No more candidates are sampled: it was cancelled or the deadline is near."""

    @property
    def num_unsampled(self) -> int:
        """Candidates that wait for a slot or are being sampled."""
        return len(self.decoding.waiting) + self.decoding.in_slots

    @property
    def is_over(self) -> bool:
        """Whether no further candidate will be finished."""
        return self.request.is_cancelled or (self.decoding.is_over and not self.sampled)

    def release_pixels(self) -> None:
        """Keep the pixels of the best `num_images` candidates only.

        A reply contains no others, and a stream has sent them already. This bounds the memory
        whatever `num_candidates` is.
        """
        kept = self.request.num_images
        if len(self.finished) > kept:
            ranked = rank(self.finished)
            rest = [replace(each, pixels=_NO_PIXELS) for each in ranked[kept:]]
            self.finished = [*ranked[:kept], *rest]

    def end(self, ranked_by: RankedBy) -> None:
        """Set the request's outcome: the finished candidates, or an error where there are none."""
        if self.request.is_cancelled or not self.finished:
            self.request.outcome = self.request.stop_error()
            return
        elapsed = time.monotonic() - self.began
        self.request.outcome = GenerateResult(
            ranked=rank(self.finished),
            ranked_by=ranked_by,
            seed=self.request.seed,
            num_candidates=self.request.num_candidates,
            sample_seconds=max(0.0, elapsed - self.decode_seconds - self.rank_seconds),
            decode_seconds=self.decode_seconds,
            rank_seconds=self.rank_seconds,
        )
