"""What the tests of the HTTP application share: an engine whose work a test decides, and clients.

The engine is a stand-in handed to the real scheduler: what is tested is the way from a request to
it and back.
"""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image

from dalle.errors import CaptionTooLong, UserError
from inference.api.parsing import decode_base64
from inference.api.rendering import (
    Candidate,
    ClassifyResult,
    CompleteResult,
    GenerateResult,
    Preview,
    Result,
    rank,
)
from inference.api.replies import CompleteReply, Completion
from inference.api.schema import ClassifyRequest, CompleteRequest, GenerateRequest, Limits, Request
from inference.engine.control import Control
from inference.engine.engine_core import Scheduler, State
from inference.server.app import create_app
from inference.settings import read_settings

PATIENCE = 20.0
LIMITS = Limits(max_candidates=8, max_images=8, max_request_bytes=20_000)
SETTINGS = replace(read_settings({}), limits=LIMITS, queue_size=2)
ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"


class OneByOne(threading.Event):
    """A gate that closes behind each one it lets through."""

    def wait(self, timeout: float | None = None) -> bool:
        is_open = super().wait(timeout)
        if is_open:
            self.clear()
        return is_open


@dataclass
class Work:
    request: Any
    kind: str
    units: int = 1


@dataclass
class Engine:
    """Draws grey squares whose brightness is the candidate's number; remembers what it was asked.

    gate: every candidate waits for it. The caption says what else should happen.
    """

    image_size: int | None = 8
    clip_size: int | None = 8
    threads: int = 1
    busy_slots: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    asked: list[Request] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def self_test(self) -> None:
        pass

    def prepare(self, request: Request) -> Work:
        if isinstance(request, ClassifyRequest):
            for number, text in enumerate(request.images):
                decode_base64(text, field=f"images[{number}]")
            return Work(request, "classify", len(request.images))
        if isinstance(request, CompleteRequest):
            raise UserError(
                "this artefact has no transformer", status=422, code="component_missing"
            )
        if request.caption == "endless":
            raise CaptionTooLong("caption has 9 text tokens, the model reads 8", field="caption")
        return Work(request, "generate", request.num_candidates)

    def run(self, work: Work, control: Control) -> Result:
        self.asked.append(work.request)
        self.begun.release()
        request = work.request
        if isinstance(request, ClassifyRequest):
            return ClassifyResult([([1, 0], ["b", "a"], [0.75, 0.25]) for _ in request.images])
        assert isinstance(request, GenerateRequest)
        if request.caption == "bug":
            raise ZeroDivisionError("secret detail")
        finished: list[Candidate] = []
        for number in range(request.num_candidates):
            if request.preview_rows is not None:
                control.previewed(Preview(number, 1, np.full((8, 8, 3), 128, np.uint8)))
            while control.keep_going() and not self.gate.wait(0.01):
                pass
            if not control.keep_going() or (request.caption == "half" and number == 2):
                break
            if request.caption == "breaks" and number == 1:
                raise ZeroDivisionError("secret detail")
            pixels = np.full((8, 8, 3), number, np.uint8)
            finished.append(Candidate(number, -float(number), number / 10, float(number), pixels))
            control.finished(finished[-1])
        if control.cancelled:
            self.cancelled.set()
        if control.cancelled or not finished:
            raise control.error()
        seed = request.seed if request.seed is not None else 5
        ranked = rank(finished)
        return GenerateResult(ranked, "clip", seed, request.num_candidates, 0.1, 0.1, 0.1)


class Completing(Engine):
    """An engine that completes captions too."""

    def prepare(self, request: Request) -> Work:
        if isinstance(request, CompleteRequest):
            return Work(request, "complete")
        return super().prepare(request)

    def run(self, work: Work, control: Control) -> Result:
        if isinstance(work.request, CompleteRequest):
            captions = [Completion(caption=f"{work.request.complete} x", log_likelihood=-1.0)]
            return CompleteResult(CompleteReply(captions=captions, seed=3))
        return super().run(work, control)


@pytest.fixture
def engine() -> Engine:
    engine = Completing()
    engine.gate.set()
    return engine


@pytest.fixture
def scheduler(engine: Engine) -> Iterator[Scheduler]:
    scheduler = Scheduler(lambda: engine, queue_size=SETTINGS.queue_size)
    scheduler.start()
    assert scheduler.wait_until_loaded(PATIENCE) is State.READY
    yield scheduler
    scheduler.cancel_all()
    scheduler.drain(PATIENCE)


@pytest.fixture
def client(scheduler: Scheduler) -> FlaskClient:
    return create_app(scheduler, SETTINGS).test_client()


def post(client: FlaskClient, body: object, **headers: str) -> Any:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(
        "/invocations",
        data=data,
        headers={"Content-Type": "application/json"} | names,
        buffered=True,
    )


def pixels_of(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def in_background(do: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(do()))
    thread.start()
    return thread, answers
