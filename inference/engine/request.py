"""One request inside the engine: prepared inputs, deadline, cancellation, events and outcome.

    request's thread   prepare ──> submit ──> next_event, next_event, … the last one is the outcome
    model's thread             started ──> put(preview or candidate), … ──> outcome

Knows nothing of HTTP, models or the queue; imports no torch. Letters: T text length, S image size,
E embedding.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dalle.errors import DalleError
from inference.api.rendering import Candidate, GenerateResult, Mark, Preview, Result, best, rank
from inference.api.replies import RankedBy, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from dalle.decoding.sampling import SamplingOptions
    from dalle.decoding.step import CandidateTokens, DecodeRequest

_NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
_MAX_RECENT = 8  # images of a request that serve equal candidates; more would need memory
_MAX_UNREAD = 64  # events of a request above which previews are dropped


class DeadlineExceeded(DalleError):  # noqa: N818 - reads as what happened
    """Nothing was finished before the deadline."""

    status = 504
    code = "deadline_exceeded"


class Cancelled(DalleError):  # noqa: N818 - reads as what happened
    """The request was cancelled: nobody reads the answer."""

    status = 499
    code = "cancelled"


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that ended in an error."""

    error: Exception


Event = Preview | Candidate | Result | Failed


@dataclass(kw_only=True, eq=False)
class EngineRequest:
    """A prepared request on its way through the engine.

    Every method may be called by any thread.
    """

    arrival: float = field(default_factory=time.monotonic)
    """When the request arrived, on the scale of `clock`."""
    deadline: float = math.inf
    """When it must have ended, on the scale of `clock`."""
    clock: Callable[[], float] = time.monotonic
    warnings: tuple[str, ...] = ()
    """For the client, of what the model could not read as it was written."""
    started: float | None = field(default=None, init=False)
    """When the model began with it."""
    last_progress: float | None = field(default=None, init=False)
    """When it last reached a point at which it could have stopped."""
    cost_seconds: float = field(default=0.0, init=False)
    """Seconds of the device's time that it took."""
    outcome: Result | Exception | None = field(default=None, init=False)
    """Result or error; None until it has ended."""
    _cancelled: threading.Event = field(default_factory=threading.Event, init=False)
    _events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue, init=False)

    @property
    def units(self) -> int:
        """Amount of work: candidates, images or completions."""
        return 1

    @property
    def num_text_tokens(self) -> int:
        """Text tokens of the caption, without padding; 0 where there is none."""
        return 0

    @property
    def texts(self) -> Sequence[str]:
        """What the client wrote; no log has it above DEBUG."""
        return ()

    @property
    def queue_seconds(self) -> float:
        """Seconds from arrival until the model began with it."""
        return max(0.0, (self.started or self.arrival) - self.arrival)

    def cancel(self) -> None:
        """Ask the engine to stop at the next step."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def shorten(self, deadline: float) -> None:
        """Bring the deadline forward, never back."""
        self.deadline = min(self.deadline, deadline)

    def seconds_left(self) -> float:
        """Seconds until the deadline, negative after it."""
        return self.deadline - self.clock()

    def may_continue(self, reserve_seconds: float = 0.0) -> bool:
        """Return whether there is time for another step and `reserve_seconds` of work after it."""
        self.last_progress = self.clock()
        return not self.is_cancelled and self.seconds_left() > reserve_seconds

    def check(self) -> None:
        """Raise `Cancelled` or `DeadlineExceeded` unless `may_continue`."""
        if not self.may_continue():
            raise self.stop_error()

    def stop_error(self) -> Cancelled | DeadlineExceeded:
        """Return the error of a request that was stopped before anything was finished."""
        if self.is_cancelled:
            return Cancelled("the request was cancelled")
        return DeadlineExceeded(
            "the deadline passed before anything was finished; ask for less or set a later "
            "deadline_seconds",
            field="deadline_seconds",
        )

    def put(self, event: Event) -> None:
        """Pass an event to the reader.

        Previews are dropped while the reader is far behind, so that unread images take little
        memory; other events never are.
        """
        if not isinstance(event, Preview) or self._events.qsize() < _MAX_UNREAD:
            self._events.put(event)

    def next_event(self, timeout_seconds: float) -> Event | None:
        """Return the next preview or candidate, or the last event: a result or `Failed`.

        None when there is no event within the time.
        """
        try:
            return self._events.get(timeout=max(0.0, timeout_seconds))
        except queue.Empty:
            return None


@dataclass(kw_only=True, eq=False)
class PreparedGeneration(EngineRequest):
    """A request for images. Its prepared tensors are on the CPU.

    `decoding` and all after it is its state while it runs: the model's thread alone uses it.
    """

    caption: str
    text_tokens: Tensor
    """[1, T] int64."""
    prime: Tensor | None = None
    """[1, 3, S, S] in [0, 1]."""
    prime_rows: int = 0
    seed: int
    num_candidates: int
    options: SamplingOptions
    preview_rows: int | None = None
    num_previewed: int | None = None
    """Candidates that have previews, from number 0; None: all."""
    num_images: int = 1
    distinct: bool = False
    """Whether the reply has different images only."""
    mark: Mark | None = None
    """What its files say of their origin."""

    decoding: DecodeRequest = field(init=False, repr=False)
    """The request in the decoding engine."""
    caption_embedding: Tensor | None = field(default=None, init=False)
    """[1, E] by CLIP; None without a CLIP."""
    num_positions: int = field(default=0, init=False)
    """Positions that are sampled: all but the primed ones."""
    began: float = field(default=0.0, init=False)
    """When the scheduler took it, as `time.monotonic()`; `started` is when it left the queue."""
    sampled: deque[CandidateTokens] = field(default_factory=deque, init=False)
    """Candidates whose tokens are complete, and which are not decoded yet."""
    finished: list[Candidate] = field(default_factory=list, init=False)
    groups: dict[bytes, int] = field(default_factory=dict, init=False)
    """Number of the first finished candidate of the same image tokens, by their digest."""
    recent: OrderedDict[int, Candidate] = field(default_factory=OrderedDict, init=False)
    """Of each of the last few groups a candidate with its pixels, by the group's number."""
    rows_seen: dict[int, int] = field(default_factory=dict, init=False)
    """Whole rows of each candidate for which previews were made, as far as they were wanted."""
    decode_seconds: float = field(default=0.0, init=False)
    rank_seconds: float = field(default=0.0, init=False)
    is_stopped: bool = field(default=False, init=False)
    """No more candidates are sampled: it was cancelled or the deadline is near."""

    @property
    def units(self) -> int:
        return self.num_candidates

    @property
    def num_text_tokens(self) -> int:
        # In numpy: torch would start a pool of threads for every thread that calls it.
        return int(np.count_nonzero(self.text_tokens.numpy()))

    @property
    def texts(self) -> Sequence[str]:
        return (self.caption,)

    @property
    def num_unsampled(self) -> int:
        """Candidates that wait for a slot or are being sampled."""
        return len(self.decoding.waiting) + self.decoding.in_slots

    def is_previewed(self, number: int) -> bool:
        """Return whether the candidate of a number has previews."""
        return self.preview_rows is not None and (
            self.num_previewed is None or number < self.num_previewed
        )

    def rows_to_preview(self, number: int, rows: int) -> list[int]:
        """Return after which rows a candidate of `rows` whole ones has previews now, in order.

        Each is returned once.
        """
        if self.preview_rows is None or not self.is_previewed(number):
            return []
        seen = self.rows_seen.get(number, self.prime_rows)
        self.rows_seen[number] = rows
        return [each for each in range(seen + 1, rows + 1) if each % self.preview_rows == 0]

    @property
    def is_over(self) -> bool:
        """Whether no further candidate will be finished."""
        return self.is_cancelled or (self.decoding.is_over and not self.sampled)

    def release_pixels(self) -> None:
        """Keep the pixels of the best `num_images` candidates only, and those in `recent`.

        A reply contains no others, and a stream has sent them already. With the limit of `recent`
        this bounds the memory whatever `num_candidates` is.
        """
        if len(self.finished) <= self.num_images:
            return
        ranked = rank(self.finished)
        kept = {each.number for each in best(ranked, self.num_images, distinct=self.distinct)}
        self.finished = [
            each if each.number in kept else replace(each, pixels=_NO_PIXELS) for each in ranked
        ]

    def group_of(self, number: int, image_tokens: bytes) -> int:
        """Return the number of the first finished candidate of the same image tokens.

        number: of the candidate that has them and is finished now.
        """
        digest = hashlib.blake2b(image_tokens, digest_size=16).digest()
        return self.groups.setdefault(digest, number)

    def finish(self, candidate: Candidate) -> None:
        """Keep a finished candidate, and pass it to the reader."""
        self.finished.append(candidate)
        self.put(candidate)
        self.recent[candidate.group] = candidate
        self.recent.move_to_end(candidate.group)
        if len(self.recent) > _MAX_RECENT:
            self.recent.popitem(last=False)

    def end(self, ranked_by: RankedBy) -> None:
        """Set the outcome: the finished candidates, or an error where there are none."""
        self.recent.clear()
        if self.is_cancelled or not self.finished:
            self.outcome = self.stop_error()
            return
        elapsed = time.monotonic() - self.began
        self.outcome = GenerateResult(
            ranked=rank(self.finished),
            ranked_by=ranked_by,
            seed=self.seed,
            num_candidates=self.num_candidates,
            sample_seconds=max(0.0, elapsed - self.decode_seconds - self.rank_seconds),
            decode_seconds=self.decode_seconds,
            rank_seconds=self.rank_seconds,
            positions_per_step=self.decoding.positions_per_step,
            sampling=Sampling(**asdict(self.options)),
        )


@dataclass(kw_only=True, eq=False)
class PreparedClassification(EngineRequest):
    """A request to classify images. images: each [1, 3, S, S] in [0, 1], on the CPU."""

    images: Sequence[Tensor]
    classes: Sequence[str]
    top: int

    @property
    def units(self) -> int:
        return len(self.images)

    @property
    def texts(self) -> Sequence[str]:
        return self.classes


@dataclass(kw_only=True, eq=False)
class PreparedCompletion(EngineRequest):
    """A request to complete a caption. prefix_tokens: [n] int64 without padding, on the CPU."""

    prefix: str
    prefix_tokens: Tensor
    num_completions: int
    options: SamplingOptions
    seed: int

    @property
    def units(self) -> int:
        return self.num_completions

    @property
    def texts(self) -> Sequence[str]:
        return (self.prefix,)
