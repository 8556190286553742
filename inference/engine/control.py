"""The reins of one piece of work: how long it may take, whether anybody still wants it.

The request's thread holds one end, the model's thread asks at the other between steps. Knows
nothing of models or HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dalle.errors import DalleError

if TYPE_CHECKING:
    from inference.api.rendering import Candidate, Preview


class DeadlineExceeded(DalleError):  # noqa: N818 - reads as what happened
    """Nothing was finished in time."""

    status = 504
    code = "deadline_exceeded"


class Cancelled(DalleError):  # noqa: N818 - reads as what happened
    """Whoever asked has gone; nobody reads the answer."""

    status = 499
    code = "cancelled"


class Control:
    """Deadline and cancellation of one piece of work. Every method may be called by any thread.

    deadline: on `clock`'s scale, infinite for none.
    on_candidate: called in the model's thread with each finished candidate.
    on_preview: the same with what is being drawn, where the work was asked for that.
    """

    def __init__(
        self,
        deadline: float = math.inf,
        *,
        on_candidate: Callable[[Candidate], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deadline = deadline
        self.last_beat: float | None = None  # when the work last showed that it goes on
        self._on_candidate = on_candidate
        self._on_preview = on_preview
        self._clock = clock
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop at its next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def shorten(self, deadline: float) -> None:
        """Bring the deadline forward; never back."""
        self.deadline = min(self.deadline, deadline)

    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - self._clock()

    def keep_going(self, reserve_seconds: float = 0.0) -> bool:
        """Whether another step is wanted, with `reserve_seconds` of work still to follow it."""
        self.last_beat = self._clock()
        return not self.cancelled and self.seconds_left() > reserve_seconds

    def check(self) -> None:
        """Raise `Cancelled` or `DeadlineExceeded` where the work is not wanted any more."""
        if not self.keep_going():
            raise self.error()

    def error(self) -> Cancelled | DeadlineExceeded:
        """Why work that `keep_going` stopped has nothing to show."""
        if self.cancelled:
            return Cancelled("the request was cancelled")
        return DeadlineExceeded(
            "the deadline passed before anything was finished; ask for less or set a later "
            "deadline_seconds",
            field="deadline_seconds",
        )

    def finished(self, candidate: Candidate) -> None:
        """Hand a finished candidate to whoever waits for them one by one."""
        if self._on_candidate is not None:
            self._on_candidate(candidate)

    def previewed(self, preview: Preview) -> None:
        """Hand on what is being drawn to whoever watches."""
        if self._on_preview is not None:
            self._on_preview(preview)
