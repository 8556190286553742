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
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from dalle.errors import DalleError
from inference.api.rendering import GenerateResult, Result
from inference.engine.control import Cancelled
from inference.engine.engines import Engine, SharedEngine
from inference.engine.request import Failed, Job, Work
from inference.engine.request_queue import Busy, JobQueue, no_turn

logger = logging.getLogger(__name__)

_FINISHING_SECONDS = 2.0  # kept back from a drain for decoding, ranking and sending


class State(StrEnum):
    """Where the scheduler is in its life."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


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
        self._stall_seconds = stall_seconds
        self._on_death = on_death
        self._jobs = JobQueue(queue_size)
        self._state = State.LOADING  # changed under the lock of `_jobs`
        self._begun: dict[Any, Job] = {}  # used by the model's thread only
        self._engine: Engine | None = None
        self._thread = threading.Thread(target=self._live, name="model", daemon=True)
        self.cause: str | None = None  # why it is dead
        self.was_ready = False

    def start(self) -> None:
        """Start loading; return at once."""
        self._thread.start()

    @property
    def state(self) -> State:
        """The state now; an engine that has stopped making progress is dead."""
        if self._state in (State.READY, State.STOPPING):
            last = self._jobs.last_beat
            if last is not None and time.monotonic() - last > self._stall_seconds:
                self.cause = f"no progress for {self._stall_seconds:g} seconds"
                return State.DEAD
        return self._state

    @property
    def queue_depth(self) -> int:
        """How many pieces of work wait or run."""
        return self._jobs.depth

    @property
    def loaded_engine(self) -> Engine | None:
        """The engine, whatever its state; None before it is loaded."""
        return self._engine

    def wait_until_loaded(self, timeout_seconds: float | None = None) -> State:
        """Block until loading has ended, well or badly, and return the state."""
        with self._jobs.changed:
            self._jobs.changed.wait_for(lambda: self._state is not State.LOADING, timeout_seconds)
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
        self._jobs.admit(job, wait=wait, check=self.engine)
        return job

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new work, end what was accepted, and return whether all of it ended in time.

        Deadlines are brought forward, so that long requests answer with the best so far. Where a
        model was loaded its thread is waited for as well, within the time: one that is in a
        library's code when the process ends may take it down with an error.
        """
        limit = time.monotonic() + timeout_seconds
        with self._jobs.changed:
            if self._state is not State.DEAD:
                self._state = State.STOPPING
            for job in self._jobs.accepted():
                job.control.shorten(limit - min(_FINISHING_SECONDS, timeout_seconds / 2))
            self._jobs.changed.notify_all()
        is_complete = self._jobs.wait_until_empty(limit - time.monotonic())
        if is_complete and self._engine is not None:
            self._thread.join(max(0.0, limit - time.monotonic()))
        return is_complete

    def cancel_all(self) -> None:
        """Refuse new work and give up what was accepted. Takes no lock: for signal handlers."""
        self._state = State.STOPPING
        for job in self._jobs.accepted():
            job.cancel()

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
        with self._jobs.changed:
            if self._state is State.LOADING:
                self._state = State.READY
            self.was_ready = True
            self._engine = engine
            self._jobs.changed.notify_all()
        logger.info("ready")
        shared = engine if isinstance(engine, SharedEngine) else None
        while self._take_turn(engine, shared):
            pass

    def _take_turn(self, engine: Engine, shared: SharedEngine | None) -> bool:
        """Begin what there is room for, go on with what was begun; whether there is a next turn."""
        while not self._begun or (shared is not None and shared.has_room):
            job = self._jobs.take(wait_unless=None if self._begun else self._is_stopping)
            if job is None:
                break
            if not self._start(engine, shared, job):
                return False
        if shared is not None and self._begun:
            return self._advance(engine, shared)
        return self._jobs.has_waiting or not self._is_stopping()

    def _is_stopping(self) -> bool:
        return self._state is State.STOPPING

    def _start(self, engine: Engine, shared: SharedEngine | None, job: Job) -> bool:
        """Begin a piece of work or do it whole; return whether the engine can go on."""
        began = time.monotonic()
        try:
            if job.control.cancelled:
                raise Cancelled("the request was cancelled")
            if job.control.seconds_left() <= 0:
                raise no_turn()
            handle = None if shared is None else shared.begin(job.work, job.control)
            if handle is not None:
                self._begun[handle] = job
                return True
            result = engine.run(job.work, job.control)
        except DalleError as error:
            self._jobs.end(job, Failed(error))
        except Exception as error:
            logger.exception("work of kind %s failed", job.work.kind)
            self._jobs.end(job, Failed(error))
            return self._still_works(engine)
        else:
            self._measure(job, result, time.monotonic() - began)
            self._jobs.end(job, result)
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
                    self._jobs.end(job, each.outcome)
                else:
                    self._jobs.end(job, Failed(each.outcome))
        return True

    def _fail_begun(self, error: Exception) -> None:
        """End everything that was begun."""
        for job in self._begun.values():
            self._jobs.end(job, Failed(error))
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
        with self._jobs.changed:
            self._jobs.speeds.note(job.work.kind, units, seconds)

    def _die(self, error: Exception) -> None:
        with self._jobs.changed:
            self._state = State.DEAD
            self.cause = str(error) if isinstance(error, DalleError) else type(error).__name__
        self._jobs.end_waiting(Failed(error))
        self._fail_begun(error)
        if self._on_death is not None:
            self._on_death(error)
