"""Engine core: one thread owns the model; requests wait for it in a bounded queue.

    loading ──> ready ──> stopping
       └──────────┴─────> dead

The thread loads the model and tests it once. Then it begins requests while there is room, and steps
all that were begun. Requests' threads prepare a request, submit it and read its events. Nothing
here sleeps or polls. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

from dalle.errors import DalleError
from dalle.model_card import ModelCard
from dalle.preprocess.square import Square
from inference.api.rendering import GenerateResult
from inference.api.schema import Request
from inference.engine.error_log import log_unexpected
from inference.engine.request import Cancelled, EngineRequest
from inference.engine.request_queue import Busy, RequestQueue, deadline_passed_waiting

logger = logging.getLogger(__name__)

_FINISHING_SECONDS = 2.0  # of a drain, reserved for decoding, ranking and sending


class Engine(Protocol):
    """What the core runs: `engine.model_runner.ModelRunner`, or a test's stand-in.

    The properties and `prepare` are used by any thread, the rest by the model's thread only.
    """

    @property
    def image_size(self) -> int | None:
        """Side of generated images in pixels; None when there are no models to generate with."""
        ...

    @property
    def card(self) -> ModelCard:
        """The artefact's model card."""
        ...

    @property
    def clip_square(self) -> Square | None:
        """What CLIP reads of a picture; None without a CLIP."""
        ...

    @property
    def threads(self) -> int:
        """Number of threads that compute on the CPU."""
        ...

    @property
    def busy_slots(self) -> int:
        """Number of sequences that are being sampled."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether another request may be added while others run."""
        ...

    def prepare(
        self, request: Request, *, arrival: float | None = None, deadline: float = math.inf
    ) -> EngineRequest:
        """Check and convert a request without the device. Raises `UserError`."""
        ...

    def add(self, request: EngineRequest) -> None:
        """Begin a request. Raises a `DalleError` for one that cannot begin."""
        ...

    def step(self) -> Sequence[EngineRequest]:
        """Advance what was added, and return the requests that have ended, with their outcome.

        After an error `abandon` must be called.
        """
        ...

    def abandon(self) -> None:
        """Give up everything that was added."""
        ...

    def self_test(self) -> None:
        """Use every component once; raise when one does not work."""
        ...


class State(StrEnum):
    """State of the engine core."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    DEAD = "dead"


class EngineCore:
    """Owner of the model's thread. Every method may be called by any thread.

    load: called once in the model's thread; an error makes the core dead.
    queue_size: how many requests may wait beside those that were begun.
    stall_seconds: a core whose requests make no progress for so long counts as dead.
    on_death: called once, in the model's thread, when loading has failed or the engine has died.
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
        self._queue = RequestQueue(queue_size)
        self._state = State.LOADING  # changed under the lock of `_queue`
        self._begun: set[EngineRequest] = set()  # used by the model's thread only
        self._engine: Engine | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.cause: str | None = None  # of its death
        self.was_ready = False

    def start(self) -> None:
        """Start loading; return at once."""
        self._thread.start()

    @property
    def state(self) -> State:
        """The state now; an engine without progress is dead."""
        if self._state in (State.READY, State.STOPPING):
            last = self._queue.last_progress
            if last is not None and time.monotonic() - last > self._stall_seconds:
                self.cause = f"no progress for {self._stall_seconds:g} seconds"
                return State.DEAD
        return self._state

    @property
    def queue_depth(self) -> int:
        """Number of requests that wait or run."""
        return self._queue.depth

    @property
    def num_running(self) -> int:
        """Number of requests that were begun and have not ended."""
        return self._queue.num_running

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait to be begun."""
        return self._queue.num_waiting

    @property
    def loaded_engine(self) -> Engine | None:
        """The engine, whatever the state; None before it is loaded."""
        return self._engine

    def wait_until_loaded(self, timeout_seconds: float | None = None) -> State:
        """Block until loading has succeeded or failed, and return the state."""
        with self._queue.changed:
            self._queue.changed.wait_for(lambda: self._state is not State.LOADING, timeout_seconds)
        return self.state

    def engine(self) -> Engine:
        """Return the engine, to prepare requests with. Raises `Busy` 503 unless it is ready."""
        state = self.state
        if state is State.READY and self._engine is not None:
            return self._engine
        message = {
            State.STOPPING: "this server is stopping; another one will answer",
            State.DEAD: f"the model does not work: {self.cause}",
        }.get(state, "the model is being loaded; try again soon")
        raise Busy(
            message,
            code=f"engine_{state}",
            status=503,
            retry_after=None if state is State.DEAD else 5,
        )

    def submit(self, request: EngineRequest, *, wait: bool = False) -> None:
        """Queue a prepared request.

        wait: block until there is a place or the deadline has passed, instead of refusing.
        Raises `Busy`: 429 when the queue is full, 503 when the requests in front would take longer
        than the deadline allows or the state is not ready; `DeadlineExceeded` when the deadline
        has passed, before or after waiting.
        """
        self._queue.admit(request, wait=wait, check=self.engine)

    def drain(self, timeout_seconds: float) -> bool:
        """Refuse new requests, end the accepted ones; return whether all have ended in time.

        Deadlines are brought forward, so that long requests answer with the best so far. Where a
        model was loaded its thread is waited for as well, within the time: a thread that is inside
        a library when the process ends may crash it.
        """
        limit = time.monotonic() + timeout_seconds
        with self._queue.changed:
            if self._state is not State.DEAD:
                self._state = State.STOPPING
            for request in self._queue.accepted():
                request.shorten(limit - min(_FINISHING_SECONDS, timeout_seconds / 2))
            self._queue.changed.notify_all()
        is_complete = self._queue.wait_until_empty(limit - time.monotonic())
        if is_complete and self._engine is not None:
            self._thread.join(max(0.0, limit - time.monotonic()))
        return is_complete

    def cancel_all(self) -> None:
        """Refuse new requests and cancel the accepted ones. Takes no lock: for signal handlers."""
        self._state = State.STOPPING
        for request in self._queue.accepted():
            request.cancel()

    def _run(self) -> None:
        """Main loop of the model's thread."""
        try:
            engine = self._load()
            engine.self_test()
        except Exception as error:
            # An error that we raised says in one line what to do; others need their traceback.
            logger.error("loading failed: %s", error, exc_info=not isinstance(error, DalleError))
            self._die(error)
            return
        with self._queue.changed:
            if self._state is State.LOADING:
                self._state = State.READY
            self.was_ready = True
            self._engine = engine
            self._queue.changed.notify_all()
        logger.info("ready")
        while self._take_turn(engine):
            pass

    def _take_turn(self, engine: Engine) -> bool:
        """Begin requests while there is room, then step once; return whether to go on."""
        while not self._begun or engine.has_room:
            request = self._queue.take(wait_unless=None if self._begun else self._is_stopping)
            if request is None:
                break
            if not self._begin(engine, request):
                return False
        if self._begun:
            return self._step(engine)
        return self._queue.num_waiting > 0 or not self._is_stopping()

    def _is_stopping(self) -> bool:
        return self._state is State.STOPPING

    def _begin(self, engine: Engine, request: EngineRequest) -> bool:
        """Begin a request; return whether the engine still works."""
        try:
            if request.is_cancelled:
                raise Cancelled("the request was cancelled")
            if request.seconds_left() <= 0:
                raise deadline_passed_waiting()
            engine.add(request)
        except Exception as error:
            return self._fail(engine, [request], error)
        self._begun.add(request)
        return True

    def _step(self, engine: Engine) -> bool:
        """Step all begun requests; return whether the engine still works."""
        try:
            ended = engine.step()
        except Exception as error:
            engine.abandon()
            failed = [*self._begun]
            self._begun.clear()
            return self._fail(engine, failed, error)
        for request in ended:
            self._begun.remove(request)
            if isinstance(request.outcome, Exception):
                if not self._fail(engine, [request], request.outcome):
                    return False
            elif request.outcome is not None:
                self._measure(request)
                self._queue.end(request, request.outcome)
        return True

    def _fail(self, engine: Engine, requests: Sequence[EngineRequest], error: Exception) -> bool:
        """End requests by an error; return whether the engine still works.

        After an unexpected error the engine is tested: a lost device would fail every later
        request too.
        """
        is_expected = isinstance(error, DalleError)
        if not is_expected:
            texts = [text for request in requests for text in request.texts]
            log_unexpected(logger, f"{len(requests)} requests failed", error, texts)
        for request in requests:
            self._queue.end(request, error)
        if is_expected:
            return True
        try:
            engine.self_test()
        except Exception as failure:
            logger.exception("the engine does not work any more")
            self._die(failure)
            return False
        return True

    def _measure(self, request: EngineRequest) -> None:
        """Record the cost of a request, for the wait estimate."""
        units = request.units
        if isinstance(request.outcome, GenerateResult):
            units = len(request.outcome.ranked)  # fewer than requested after a deadline
        with self._queue.changed:
            self._queue.speeds.record(type(request), units, request.cost_seconds)

    def _die(self, error: Exception) -> None:
        with self._queue.changed:
            self._state = State.DEAD
            self.cause = str(error) if isinstance(error, DalleError) else type(error).__name__
        self._queue.end_waiting(error)
        for request in self._begun:
            self._queue.end(request, error)
        self._begun.clear()
        if self._on_death is not None:
            self._on_death(error)
