"""An engine without a model: `step` runs one request from start to end by `run`."""

import time
from typing import Any

from dalle.manifest import Manifest
from dalle.model_card import describe
from dalle.preprocess.square import Square


class OneAtATime:
    """What the tests' engines share. `run`, of the child, returns a request's result or raises."""

    image_size: int | None = 8
    clip_square: Square | None = Square(8)
    card = describe(Manifest(captions=["a red square"]), {})
    threads = 1
    busy_slots = 0
    has_room = False
    _added: Any = None

    def add(self, request: Any) -> None:
        self._added = request

    def step(self) -> list[Any]:
        request, self._added = self._added, None
        began = time.monotonic()
        try:
            request.outcome = self.run(request)
        except Exception as error:
            request.outcome = error
        request.cost_seconds = time.monotonic() - began
        return [request]

    def abandon(self) -> None:
        self._added = None

    def self_test(self) -> None:
        pass

    def run(self, request: Any) -> Any:
        raise NotImplementedError
