"""A request in the decoding engine, and its candidates: waiting, in slots, finished.

Letters: N positions, M codes per position, W width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dalle.decoding.sampling import SamplingOptions


@dataclass(eq=False)
class DecodeRequest:
    """A request for candidates of one caption; made by `DecodeEngine.submit`."""

    seed: int
    options: SamplingOptions
    waiting: deque[int]
    """Numbers of the candidates that have no slot yet."""
    prime_tokens: Tensor | None = field(repr=False)
    prefixes: list[Prefix] = field(repr=False)
    """With the caption, and with guidance without it; none where every position is primed."""
    max_in_slots: int | None = None
    """Candidates that may be in slots at the same time; None: as many as there is room for."""
    in_slots: int = 0
    """Candidates in slots now."""

    @property
    def slots_each(self) -> int:
        """Slots that one candidate takes."""
        return len(self.prefixes)

    @property
    def may_start(self) -> bool:
        """Whether a candidate waits and may take slots."""
        return bool(self.waiting) and (
            self.max_in_slots is None or self.in_slots < self.max_in_slots
        )

    @property
    def is_over(self) -> bool:
        """Whether every candidate is finished or given up."""
        return not self.waiting and not self.in_slots


@dataclass(frozen=True, eq=False, slots=True)
class Prefix:
    """Result of the caption's pass through the model, with which each candidate starts."""

    packed: Sequence[Any]
    """What `Step.load` writes."""
    hidden: Tensor  # [W], predicts the first position that is not primed


@dataclass(eq=False, slots=True)
class CandidateTokens:
    """The image tokens of one candidate, while they are sampled and when they are complete."""

    request: DecodeRequest
    number: int
    slots: tuple[int, ...]
    """The slot with the caption, then with guidance the one without it."""
    position: int
    """Number of positions that are primed or sampled."""
    image_tokens: Tensor = field(repr=False)
    """[N, M] int64. Only the first `position` are valid, and in a slot it is the engine's own."""
    log_likelihood: float = 0.0
    """log p of the sampled tokens in nats, set when they are complete: before temperature, filters
    and guidance, and without the primed positions."""

    @property
    def slot(self) -> int:
        return self.slots[0]

    @property
    def guidance_slot(self) -> int | None:
        return self.slots[1] if len(self.slots) > 1 else None
