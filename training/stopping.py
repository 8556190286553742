"""Requests to stop (SIGTERM, Ctrl-C), and loops that end early because of one.

Within 20 seconds of SIGTERM everything must be on the disk, so that every long loop over data or
models checks for a stop. Knows nothing of signals.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Stop = threading.Event
"""Set when a stop was requested."""

NEVER = Stop()
"""Never set: for work that ends early only with the program."""


class DelayedStop(Stop):
    """Set some seconds after another stop: for work that may use a part of the time that is left.

    The seconds begin when `is_set` first finds the other stop set.
    """

    def __init__(
        self, stop: Stop, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._stop, self._seconds, self._clock = stop, seconds, clock
        self._latest: float | None = None

    def is_set(self) -> bool:
        if self._latest is None and self._stop.is_set():
            self._latest = self._clock() + self._seconds
        return self._latest is not None and self._clock() >= self._latest


class Stopped(Exception):  # noqa: N818 - not an error: a stop was requested
    """Work ended early after a stop; its partial result is discarded."""


def unless_stopped(items: Iterable[T], stop: Stop) -> Iterator[T]:
    """Yield the items. Raises Stopped instead of yielding the next one once `stop` is set."""
    for item in items:
        if stop.is_set():
            raise Stopped
        yield item
