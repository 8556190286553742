"""The engine's interface to what holds the model. `engine.model_runner` is the real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from dalle.errors import DalleError
from inference.api.rendering import GenerateResult, Result
from inference.api.schema import Request
from inference.engine.control import Control


class Engine(Protocol):
    """What holds the model. Its properties and `prepare` are used by any thread, the others by the
    model's thread."""

    @property
    def image_size(self) -> int | None:
        """Side of the pictures in pixels; None when pictures cannot be drawn."""
        ...

    @property
    def clip_size(self) -> int | None:
        """Side in pixels of what CLIP looks at; None when images cannot be classified."""
        ...

    @property
    def threads(self) -> int:
        """How many threads compute on the CPU."""
        ...

    @property
    def busy_slots(self) -> int:
        """Sequences that are being drawn; any thread may ask."""
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
