"""A request as the decoding engine keeps it: its candidates, waiting, in slots, finished.

Letters: N positions, M codes per position, W width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dalle.decoding.sampling import SamplingOptions


@dataclass(frozen=True, eq=False, slots=True)
class FinishedCandidate:
    """One image's worth of tokens, [N, M] int64, and its log p as in `SampledTokens`."""

    generation: Generation
    candidate: int
    image_tokens: Tensor = field(repr=False)
    log_likelihood: float


@dataclass(eq=False)
class Generation:
    """A request's candidates on their way; made by `DecodeEngine.submit`."""

    seed: int
    options: SamplingOptions
    waiting: deque[int]
    """Numbers of the candidates that have no slot yet."""
    prime_tokens: Tensor | None = field(repr=False)
    prefixes: list[Prefix] = field(repr=False)
    """With the caption, and with guidance without it."""
    most: int | None = None
    """Candidates that may be in the making together; None: as many as there is room for."""
    in_slots: int = 0
    """Candidates in the making."""

    @property
    def slots_each(self) -> int:
        """Slots that one candidate takes."""
        return len(self.prefixes)

    @property
    def may_start(self) -> bool:
        """Whether more of its candidates wait and may begin."""
        return bool(self.waiting) and (self.most is None or self.in_slots < self.most)

    @property
    def is_over(self) -> bool:
        """Whether no candidate of it is to come any more."""
        return not self.waiting and not self.in_slots


@dataclass(frozen=True, eq=False, slots=True)
class Prefix:
    """A caption's pass through the model, done once: what its candidates' slots begin with."""

    packed: Sequence[Any]
    """What `Step.load` writes."""
    hidden: Tensor  # [W], predicts the first position that is not primed


@dataclass(eq=False, slots=True)
class Candidate:
    """A candidate in the making."""

    generation: Generation
    number: int
    slot: int
    guidance_slot: int | None
    position: int
