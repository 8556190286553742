"""One thread owns the model; requests wait for it in a bounded queue. Knows nothing of HTTP.

    loading ──> ready ──> stopping
       └──────────┴─────> dead

The thread loads the model, tries it once, then begins one piece of work after another, as there is
room, and goes on with all that it has begun in turn; an engine that cannot do several at once does
one after another. Requests' threads prepare their work, submit it, and read its events. Nothing
here sleeps or polls.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from dalle.errors import DalleError, PlatformError
from inference.control import Cancelled, Control, DeadlineExceeded
from inference.render import Candidate, GenerateResult, Preview, Result
from inference.schema import Request

logger = logging.getLogger(__name__)

_SPEED_WEIGHT = 0.3  # of the newest measurement in the running mean
_MOST_UNREAD = 64  # events of a job beyond which previews are left out
_FINISHING_SECONDS = 2.0  # kept back from a drain for decoding, ranking and sending


class State(StrEnum):
    """Where the scheduler is in its life."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


class Busy(PlatformError):  # noqa: N818 - reads as what it is
    """Not now: 429 when the queue is full, 503 while loading, stopping, dead or far behind.

    retry_after: whole seconds after which it may go better; None when it will not.
    """

    def __init__(self, message: str, *, code: str, status: int, retry_after: int | None) -> None:
        super().__init__(message, code=code, status=status)
        self.retry_after = retry_after


class Work(Protocol):
    """A prepared request. kind: what is measured together; units: how much of it there is."""

    @property
    def kind(self) -> str: ...

    @property
    def units(self) -> int: ...


class Engine(Protocol):
    """What holds the model. `prepare` is called by any thread, the others by the model's thread."""

    @property
    def image_size(self) -> int | None:
        """Side of the pictures in pixels; None when pictures cannot be drawn."""
        ...

    def prepare(self, request: Request) -> Any:
        """Check and convert a request without the device. Raises `UserError`."""
        ...

    def run(self, work: Any, control: Control) -> Result:
        """Do prepared work. Raises `DeadlineExceeded`, `Cancelled` or another `DalleError`."""
        ...

    def self_test(self) -> None:
        """Use every component once; raise when one does not work."""
        ...


class Ended(Protocol):
    """A piece of work that was begun and is over. cost_seconds: its share of the engine's time."""

    @property
    def drawing(self) -> Any: ...

    @property
    def outcome(self) -> GenerateResult | DalleError: ...

    @property
    def cost_seconds(self) -> float: ...


@runtime_checkable
class SharedEngine(Protocol):
    """An engine that does several pieces of work at once. All by the model's thread."""

    @property
    def has_room(self) -> bool:
        """Whether another piece of work would be begun now."""
        ...

    def begin(self, work: Any, control: Control) -> Any:
        """Begin a piece of work; None for one that `run` must do. Raises what `run` does."""
        ...

    def advance(self) -> Sequence[Ended]:
        """Go on a little with everything; whatever has ended by that."""
        ...

    def abandon(self) -> Sequence[Any]:
        """Give up everything that was begun, after `advance` has failed."""
        ...


@dataclass(frozen=True, slots=True)
class Failed:
    """The event of work that ended in an error."""

    error: Exception


Event = Preview | Candidate | Result | Failed


class Job:
    """One piece of work on its way through the queue, as its request's thread sees it."""

    def __init__(self, work: Work, *, arrival: float, deadline: float) -> None:
        self.work = work
        self.arrival = arrival
        self.started: float | None = None
        self.control = Control(deadline, on_candidate=self.put, on_preview=self._put_preview)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    @property
    def queue_seconds(self) -> float:
        """From the request's arrival until the model began with it."""
        return max(0.0, (self.started or self.arrival) - self.arrival)

    def put(self, event: Event) -> None:
        """Hand an event to whoever waits."""
        self._events.put(event)

    def _put_preview(self, preview: Preview) -> None:
        """Only for who keeps up: a slow reader must not make unread pictures pile up here."""
        if self._events.qsize() < _MOST_UNREAD:
            self._events.put(preview)

    def next_event(self, timeout_seconds: float) -> Event | None:
        """The next preview or candidate, or the last event (a result or `Failed`); None for none
        yet."""
        try:
            return self._events.get(timeout=max(0.0, timeout_seconds))
        except queue.Empty:
            return None

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self.control.cancel()


class Scheduler:
    """Owns the model's thread. Every method may be called by any thread.

    load: called once in the model's thread; whatever it raises makes the scheduler dead.
    queue_size: how many pieces of work may wait beside those that were begun.
    stall_seconds: work that shows no progress for so long counts as a dead engine.
    on_death: called once, in the model's thread, when loading failed or the engine died.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        queue_size: int = 16,
        stall_seconds: float = 300.0,
        on_death: Callable[[Exception], None] | None = None,
    ) -> None:
        self._load = load
        self._queue_size = queue_size
        self._stall_seconds = stall_seconds
        self._on_death = on_death
        self._changed = threading.Condition()
        self._state = State.LOADING
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._begun: dict[Any, Job] = {}  # used by the model's thread only
        self._engine: Engine | None = None
        self._seconds_per_unit: dict[str, float] = {}
        self._thread = threading.Thread(target=self._live, name="model", daemon=True)
        self.cause: str | None = None  # why it is dead
        self.was_ready = False

    def start(self) -> None:
        """Start loading; return at once."""
        self._thread.start()

    @property
    def state(self) -> State:
        """The state now; an engine that has stopped making progress is dead."""
        with self._changed:
            if self._state in (State.READY, State.STOPPING) and self._running:
                # One thread does it all: while one of them moves, the others have their turn.
                last = max(
                    job.control.last_beat or job.started or math.inf for job in self._running
                )
                if time.monotonic() - last > self._stall_seconds:
                    self.cause = f"no progress for {self._stall_seconds:g} seconds"
                    return State.DEAD
            return self._state

    @property
    def queue_depth(self) -> int:
        """How many pieces of work wait or run."""
        with self._changed:
            return len(self._queue) + len(self._running)

    def wait_until_loaded(self, timeout_seconds: float | None = None) -> State:
        """Block until loading has ended, well or badly, and return the state."""
        with self._changed:
            self._changed.wait_for(lambda: self._state is not State.LOADING, timeout_seconds)
        return self.state

    def engine(self) -> Engine:
        """The engine, to prepare work with. Raises `Busy` 503 unless the state is ready."""
        state = self.state
        if state is State.READY:
            assert self._engine is not None
            return self._engine
        message = {
            State.LOADING: "the model is being loaded; try again soon",
            State.STOPPING: "this server is stopping; another one will answer",
            State.DEAD: f"the model does not work: {self.cause}",
        }[state]
        raise Busy(
            message,
            code=f"engine_{state}",
            status=503,
            retry_after=None if state is State.DEAD else 5,
        )

    def submit(self, work: Work, *, arrival: float, deadline: float, wait: bool = False) -> Job:
        """Queue prepared work; arrival and deadline as `time.monotonic()`.

        wait: block for a place until the deadline instead of refusing.
        Raises `Busy`: 429 when the queue is full, 503 when the work in front would take longer
        than the deadline allows or the state is not ready; `DeadlineExceeded` after waiting, or
        when the deadline had passed before.
        """
        job = Job(work, arrival=arrival, deadline=deadline)
        with self._changed:
            if wait:
                self._changed.wait_for(
                    lambda: len(self._queue) < self._queue_size or self._state is not State.READY,
                    max(0.0, deadline - time.monotonic()),
                )
            self.engine()  # refuses unless ready
            for gone in [each for each in self._queue if each.control.cancelled]:
                self._queue.remove(gone)
            ahead = self._seconds_ahead()
            if len(self._queue) >= self._queue_size:
                if wait:
                    raise _no_turn()
                raise Busy(
                    f"{len(self._queue)} requests are waiting, which is all that may",
                    code="queue_full",
                    status=429,
                    retry_after=_whole_seconds(ahead),
                )
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                raise DeadlineExceeded(
                    "the deadline passed before the request could be queued; send less or set a "
                    "later deadline_seconds",
                    field="deadline_seconds",
                )
            if not wait and ahead > seconds_left:
                raise Busy(
                    f"the requests in front take about {ahead:.0f} s, longer than this one's "
                    "deadline allows",
                    code="too_busy",
                    status=503,
                    retry_after=_whole_seconds(ahead),
                )
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new work, end what was accepted, and return whether all of it ended in time.

        Deadlines are brought forward, so that long requests answer with the best so far.
        """
        limit = time.monotonic() + timeout_seconds
        with self._changed:
            if self._state is not State.DEAD:
                self._state = State.STOPPING
            for job in self._accepted():
                job.control.shorten(limit - min(_FINISHING_SECONDS, timeout_seconds / 2))
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not self._accepted(), max(0.0, limit - time.monotonic())
            )

    def cancel_all(self) -> None:
        """Refuse new work and give up what was accepted. Takes no lock: for signal handlers."""
        self._state = State.STOPPING
        for job in [*self._queue, *self._running]:
            job.cancel()

    def _accepted(self) -> list[Job]:
        return [*self._running, *self._queue]

    def _seconds_ahead(self) -> float:
        """Estimate of the time that accepted work still takes, from the speeds measured so far."""
        now, seconds = time.monotonic(), 0.0
        together = max(1, len(self._running))
        for job in self._accepted():
            expected = self._seconds_per_unit.get(job.work.kind, 0.0) * job.work.units
            # Of the time since work began the others that run have had their part.
            spent = (now - job.started) / together if job.started is not None else 0.0
            left = max(0.0, job.control.deadline - now)
            seconds += min(max(0.0, expected - spent), left)
        return seconds

    def _live(self) -> None:
        """The model's thread."""
        try:
            engine = self._load()
            engine.self_test()
        except Exception as error:
            # A user's mistake is told in one line; anything else needs its traceback.
            logger.error("loading failed: %s", error, exc_info=not isinstance(error, DalleError))
            self._die(error)
            return
        with self._changed:
            if self._state is State.LOADING:
                self._state = State.READY
            self.was_ready = True
            self._engine = engine
            self._changed.notify_all()
        logger.info("ready")
        shared = engine if isinstance(engine, SharedEngine) else None
        while self._take_turn(engine, shared):
            pass

    def _take_turn(self, engine: Engine, shared: SharedEngine | None) -> bool:
        """Begin what there is room for, go on with what was begun; whether there is a next turn."""
        while not self._begun or (shared is not None and shared.has_room):
            job = self._next_job(wait=not self._begun)
            if job is None:
                break
            if not self._start(engine, shared, job):
                return False
        if shared is not None and self._begun:
            return self._advance(engine, shared)
        with self._changed:
            return bool(self._queue) or self._state is not State.STOPPING

    def _next_job(self, *, wait: bool) -> Job | None:
        """The first in the queue, which then runs; None for none. wait: until there is one, or none
        will come."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._queue or self._state is State.STOPPING)
            if not self._queue:
                return None
            job = self._queue.popleft()
            self._running.append(job)
            job.started = time.monotonic()
            self._changed.notify_all()
            return job

    def _start(self, engine: Engine, shared: SharedEngine | None, job: Job) -> bool:
        """Begin a piece of work or do it whole; return whether the engine can go on."""
        began = time.monotonic()
        try:
            if job.control.cancelled:
                raise Cancelled("the request was cancelled")
            if job.control.seconds_left() <= 0:
                raise _no_turn()
            handle = None if shared is None else shared.begin(job.work, job.control)
            if handle is not None:
                self._begun[handle] = job
                return True
            result = engine.run(job.work, job.control)
        except DalleError as error:
            self._end(job, Failed(error))
        except Exception as error:
            logger.exception("work of kind %s failed", job.work.kind)
            self._end(job, Failed(error))
            return self._still_works(engine)
        else:
            self._measure(job, result, time.monotonic() - began)
            self._end(job, result)
        return True

    def _advance(self, engine: Engine, shared: SharedEngine) -> bool:
        """Go on with what was begun; return whether the engine can go on."""
        try:
            over = shared.advance()
        except Exception as error:
            if not isinstance(error, DalleError):
                logger.exception("what was begun together failed")
            shared.abandon()
            self._fail_begun(error)
            return isinstance(error, DalleError) or self._still_works(engine)
        else:
            for each in over:
                job = self._begun.pop(each.drawing)
                if isinstance(each.outcome, GenerateResult):
                    self._measure(job, each.outcome, each.cost_seconds)
                    self._end(job, each.outcome)
                else:
                    self._end(job, Failed(each.outcome))
        return True

    def _end(self, job: Job, event: Result | Failed) -> None:
        """The last event of a piece of work."""
        with self._changed:
            self._running.remove(job)
            job.put(event)
            self._changed.notify_all()

    def _fail_begun(self, error: Exception) -> None:
        """End everything that was begun."""
        for job in self._begun.values():
            self._end(job, Failed(error))
        self._begun.clear()

    def _still_works(self, engine: Engine) -> bool:
        """After an error of ours, try the engine: a lost device fails every later request too."""
        try:
            engine.self_test()
        except Exception as error:
            logger.exception("the engine does not work any more")
            self._die(error)
            return False
        return True

    def _measure(self, job: Job, result: Result, seconds: float) -> None:
        units = job.work.units
        if isinstance(result, GenerateResult):
            units = len(result.ranked)  # fewer than were asked for when the deadline came first
        newest = seconds / max(1, units)
        mean = self._seconds_per_unit.get(job.work.kind, newest)
        self._seconds_per_unit[job.work.kind] = mean + _SPEED_WEIGHT * (newest - mean)

    def _die(self, error: Exception) -> None:
        with self._changed:
            self._state = State.DEAD
            self.cause = str(error) if isinstance(error, DalleError) else type(error).__name__
            while self._queue:
                self._queue.popleft().put(Failed(error))
            self._changed.notify_all()
        self._fail_begun(error)
        if self._on_death is not None:
            self._on_death(error)


def _no_turn() -> DeadlineExceeded:
    return DeadlineExceeded(
        "the deadline passed while the request waited for its turn; try again later or set a "
        "later deadline_seconds",
        field="deadline_seconds",
    )


def _whole_seconds(seconds: float) -> int:
    return min(3600, max(1, math.ceil(seconds)))
