"""Bounded request queue with a wait estimate.

    admit ──> waiting ──take──> running ──end──> gone

Requests' threads admit; the model's thread takes and ends. Knows nothing of HTTP or models.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from dalle.errors import PlatformError
from inference.api.rendering import Result
from inference.engine.request import DeadlineExceeded, EngineRequest, Failed

_NEWEST = 0.3  # weight of the newest measurement in the running mean
_MAX_RETRY_SECONDS = 3600


class Busy(PlatformError):  # noqa: N818 - reads as what it is
    """Refused for now: 429 when the queue is full; 503 while loading, stopping, dead or too slow.

    retry_after: whole seconds after which to try again; None when that will not help.
    """

    def __init__(self, message: str, *, code: str, status: int, retry_after: int | None) -> None:
        super().__init__(message, code=code, status=status)
        self.retry_after = retry_after


class Speeds:
    """Running means of the seconds that a unit of each kind of request takes. Not locked."""

    def __init__(self) -> None:
        self._seconds_per_unit: dict[type[EngineRequest], float] = {}

    def record(self, kind: type[EngineRequest], units: int, seconds: float) -> None:
        """Record that so many units of a kind took so long."""
        newest = seconds / max(1, units)
        mean = self._seconds_per_unit.get(kind, newest)
        self._seconds_per_unit[kind] = mean + _NEWEST * (newest - mean)

    def seconds_left(self, requests: Iterable[EngineRequest], num_running: int) -> float:
        """Return the seconds that requests still take, one after another.

        num_running: how many of them run at the same time.
        """
        now, seconds = time.monotonic(), 0.0
        for request in requests:
            expected = self._seconds_per_unit.get(type(request), 0.0) * request.units
            # The time since a request began was shared with the others that run.
            spent = (now - request.started) / num_running if request.started is not None else 0.0
            left = max(0.0, request.deadline - now)
            seconds += min(max(0.0, expected - spent), left)
        return seconds


class RequestQueue:
    """The requests that were accepted and have not ended. Any thread may call every method.

    size: how many may wait beside those that run. changed: notified whenever anything here
    changes; code that changes what admission depends on notifies it too.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.speeds = Speeds()
        self._waiting: deque[EngineRequest] = deque()
        self._running: list[EngineRequest] = []

    @property
    def depth(self) -> int:
        """Number of requests that wait or run."""
        with self.changed:
            return len(self._waiting) + len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def last_progress(self) -> float | None:
        """Time of the last progress of any running request, as `time.monotonic()`; None: none runs.

        One thread steps them all: progress of one shows that the thread is alive.
        """
        with self.changed:
            return max(
                (each.last_progress or each.started or math.inf for each in self._running),
                default=None,
            )

    def accepted(self) -> list[EngineRequest]:
        """Return running requests, then waiting ones. Takes no lock: for signal handlers too."""
        return [*self._running, *self._waiting]

    def admit(self, request: EngineRequest, *, wait: bool, check: Callable[[], object]) -> None:
        """Add a request to the waiting ones, or refuse it.

        wait: block until there is a place, the request's deadline has passed or `check` raises,
        instead of refusing. check: called under the lock; raises when nothing may be admitted.
        Raises `Busy` and `DeadlineExceeded` as `EngineCore.submit` says.
        """
        with self.changed:
            if wait:
                self.changed.wait_for(
                    lambda: len(self._waiting) < self.size or _raises(check),
                    max(0.0, request.seconds_left()),
                )
            check()
            for gone in [each for each in self._waiting if each.is_cancelled]:
                self._waiting.remove(gone)
            ahead = self.speeds.seconds_left(self.accepted(), max(1, len(self._running)))
            if len(self._waiting) >= self.size:
                if wait:
                    raise deadline_passed_waiting()
                raise Busy(
                    f"{len(self._waiting)} requests are waiting, which is all that may",
                    code="queue_full",
                    status=429,
                    retry_after=_whole_seconds(ahead),
                )
            seconds_left = request.seconds_left()
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
            self._waiting.append(request)
            self.changed.notify_all()

    def take(self, *, wait_unless: Callable[[], bool] | None = None) -> EngineRequest | None:
        """Return the first waiting request, which runs from now on; None when none waits.

        wait_unless: block until one waits or this is true; None: do not block.
        """
        with self.changed:
            if wait_unless is not None:
                self.changed.wait_for(lambda: self._waiting or wait_unless())
            if not self._waiting:
                return None
            request = self._waiting.popleft()
            self._running.append(request)
            request.started = time.monotonic()
            self.changed.notify_all()
            return request

    def end(self, request: EngineRequest, outcome: Result | Exception) -> None:
        """Remove a running request, and pass it its last event."""
        with self.changed:
            self._running.remove(request)
            request.put(Failed(outcome) if isinstance(outcome, Exception) else outcome)
            self.changed.notify_all()

    def end_waiting(self, error: Exception) -> None:
        """Remove every waiting request, and pass each the error as its last event."""
        with self.changed:
            while self._waiting:
                self._waiting.popleft().put(Failed(error))
            self.changed.notify_all()

    def wait_until_empty(self, timeout_seconds: float) -> bool:
        """Return whether every request has ended within the time."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.accepted(), max(0.0, timeout_seconds))


def deadline_passed_waiting() -> DeadlineExceeded:
    """Return the error of a request that waited until its deadline."""
    return DeadlineExceeded(
        "the deadline passed while the request waited for its turn; try again later or set a "
        "later deadline_seconds",
        field="deadline_seconds",
    )


def _raises(check: Callable[[], object]) -> bool:
    try:
        check()
    except Busy:
        return True
    return False


def _whole_seconds(seconds: float) -> int:
    return min(_MAX_RETRY_SECONDS, max(1, math.ceil(seconds)))
