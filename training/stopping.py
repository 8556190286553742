"""Requests to stop (SIGTERM, Ctrl-C), and loops that end early because of one.

Within 20 seconds of SIGTERM everything must be on the disk, so that every long loop over data or
models checks for a stop. Knows nothing of signals.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

Stop = threading.Event
"""Set when a stop was requested."""

NEVER = Stop()
"""Never set: for work that ends early only with the program."""


class Stopped(Exception):  # noqa: N818 - not an error: a stop was requested
    """Work ended early after a stop; its partial result is discarded."""


def unless_stopped(items: Iterable[T], stop: Stop) -> Iterator[T]:
    """Yield the items. Raises Stopped instead of yielding the next one once `stop` is set."""
    for item in items:
        if stop.is_set():
            raise Stopped
        yield item
