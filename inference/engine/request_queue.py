"""Who is let in: a bounded queue, and an estimate of how long what is in front will take.

    admit ──> waiting ──take──> running ──end──> gone

Requests' threads admit, the model's thread takes and ends. Knows nothing of HTTP or models.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from dalle.errors import PlatformError
from inference.engine.control import DeadlineExceeded
from inference.engine.request import Event, Job

_SPEED_WEIGHT = 0.3  # of the newest measurement in the running mean
_LONGEST_RETRY = 3600  # seconds


class Busy(PlatformError):  # noqa: N818 - reads as what it is
    """Not now: 429 when the queue is full, 503 while loading, stopping, dead or far behind.

    retry_after: whole seconds after which it may go better; None when it will not.
    """

    def __init__(self, message: str, *, code: str, status: int, retry_after: int | None) -> None:
        super().__init__(message, code=code, status=status)
        self.retry_after = retry_after


class Speeds:
    """Seconds that a unit of each kind of work takes, as running means. Not locked."""

    def __init__(self) -> None:
        self._seconds_per_unit: dict[str, float] = {}

    def note(self, kind: str, units: int, seconds: float) -> None:
        """So many units of a kind took so long."""
        newest = seconds / max(1, units)
        mean = self._seconds_per_unit.get(kind, newest)
        self._seconds_per_unit[kind] = mean + _SPEED_WEIGHT * (newest - mean)

    def seconds_left(self, jobs: Iterable[Job], together: int) -> float:
        """What jobs still take, one after another. together: how many of them run side by side."""
        now, seconds = time.monotonic(), 0.0
        for job in jobs:
            expected = self._seconds_per_unit.get(job.work.kind, 0.0) * job.work.units
            # Of the time since work began the others that run have had their part.
            spent = (now - job.started) / together if job.started is not None else 0.0
            left = max(0.0, job.control.deadline - now)
            seconds += min(max(0.0, expected - spent), left)
        return seconds


class JobQueue:
    """The jobs that were accepted and have not ended. Every method may be called by any thread.

    size: how many may wait beside those that run. changed: notified whenever anything here
    changes; whoever decides about admission by something else notifies it too.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.speeds = Speeds()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []

    @property
    def depth(self) -> int:
        """How many wait or run."""
        with self.changed:
            return len(self._waiting) + len(self._running)

    @property
    def has_waiting(self) -> bool:
        with self.changed:
            return bool(self._waiting)

    @property
    def last_beat(self) -> float | None:
        """When one of those that run last moved, on `time.monotonic()`'s scale; None: none runs.

        One thread does it all: while one of them moves, the others have their turn.
        """
        with self.changed:
            return max(
                (each.control.last_beat or each.started or math.inf for each in self._running),
                default=None,
            )

    def accepted(self) -> list[Job]:
        """Those that run, then those that wait. Takes no lock: for signal handlers too."""
        return [*self._running, *self._waiting]

    def admit(self, job: Job, *, wait: bool, check: Callable[[], object]) -> None:
        """Let a job wait for its turn, or say why it may not.

        wait: block for a place until the job's deadline, or until `check` raises, instead of
        refusing. check: asked under the lock; raises when nothing may be admitted at all.
        Raises `Busy` and `DeadlineExceeded` as `Scheduler.submit` says.
        """
        with self.changed:
            if wait:
                self.changed.wait_for(
                    lambda: len(self._waiting) < self.size or _raises(check),
                    max(0.0, job.control.seconds_left()),
                )
            check()
            for gone in [each for each in self._waiting if each.control.cancelled]:
                self._waiting.remove(gone)
            ahead = self.speeds.seconds_left(self.accepted(), max(1, len(self._running)))
            if len(self._waiting) >= self.size:
                if wait:
                    raise no_turn()
                raise Busy(
                    f"{len(self._waiting)} requests are waiting, which is all that may",
                    code="queue_full",
                    status=429,
                    retry_after=_whole_seconds(ahead),
                )
            seconds_left = job.control.seconds_left()
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
            self._waiting.append(job)
            self.changed.notify_all()

    def take(self, *, wait_unless: Callable[[], bool] | None = None) -> Job | None:
        """The first that waits, which then runs; None for none.

        wait_unless: block until there is one or this is true; None: do not block.
        """
        with self.changed:
            if wait_unless is not None:
                self.changed.wait_for(lambda: self._waiting or wait_unless())
            if not self._waiting:
                return None
            job = self._waiting.popleft()
            self._running.append(job)
            job.started = time.monotonic()
            self.changed.notify_all()
            return job

    def end(self, job: Job, event: Event) -> None:
        """The last event of a job that runs."""
        with self.changed:
            self._running.remove(job)
            job.put(event)
            self.changed.notify_all()

    def end_waiting(self, event: Event) -> None:
        """The last event of every job that waits."""
        with self.changed:
            while self._waiting:
                self._waiting.popleft().put(event)
            self.changed.notify_all()

    def wait_until_empty(self, timeout_seconds: float) -> bool:
        """Whether everything has ended in time."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.accepted(), max(0.0, timeout_seconds))


def no_turn() -> DeadlineExceeded:
    """The end of a job that waited too long."""
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
    return min(_LONGEST_RETRY, max(1, math.ceil(seconds)))
