"""A stop that was asked for (SIGTERM, Ctrl-C), and how long work ends early because of it.

20 seconds after SIGTERM everything must be on the disk, so that no loop over data or models may
run much longer than that without a look. Knows nothing of signals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Stop(Protocol):
    """Whether a stop was asked for; threading.Event is one."""

    def is_set(self) -> bool: ...


class _Never:
    def is_set(self) -> bool:
        return False


NEVER: Stop = _Never()
"""For work that nobody stops but by ending the program."""


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Work ended early; what it had done so far is of no use and gone."""


def unless_stopped(items: Iterable[T], stop: Stop) -> Iterator[T]:
    """The items one by one. Raises Stopped, instead of giving the next, once `stop` is set."""
    for item in items:
        if stop.is_set():
            raise Stopped
        yield item
