"""One piece of work as its request's thread sees it: submitted once, read event by event.

Knows nothing of HTTP, models or the queue.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Protocol

from inference.api.rendering import Candidate, Preview, Result
from inference.engine.control import Control

_MOST_UNREAD = 64  # events of a job beyond which previews are left out


class Work(Protocol):
    """A prepared request. kind: what is measured together; units: how much of it there is."""

    @property
    def kind(self) -> str: ...

    @property
    def units(self) -> int: ...


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
