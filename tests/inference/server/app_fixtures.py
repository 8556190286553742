"""What the tests of the HTTP application share: an engine whose work a test decides, and clients.

The engine is a stand-in handed to the real engine core: what is tested is the way from a request to
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
    GenerateResult,
    Preview,
    Result,
    rank,
)
from inference.api.replies import CompleteReply, Completion
from inference.api.schema import ClassifyRequest, CompleteRequest, GenerateRequest, Limits, Request
from inference.engine.engine_core import EngineCore, State
from inference.engine.request import EngineRequest
from inference.server.app import create_app
from inference.settings import read_settings
from tests.inference.one_at_a_time import OneAtATime

PATIENCE = 180.0  # seconds until a test that waits for another thread gives up
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


@dataclass(kw_only=True, eq=False)
class Work(EngineRequest):
    request: Any
    units: int = 1

    @property
    def texts(self) -> list[str]:
        return [getattr(self.request, "caption", "")]


@dataclass
class Engine(OneAtATime):
    """Fake engine: grey squares whose brightness is the candidate's number.

    gate: every candidate waits for it; asked: requests so far. Some captions change what happens.
    """

    can_complete: bool = True
    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    asked: list[Request] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def prepare(self, request: Request, **times: Any) -> Work:
        if isinstance(request, ClassifyRequest):
            for number, text in enumerate(request.images):
                decode_base64(text, field=f"images[{number}]")
            return Work(request=request, units=len(request.images), **times)
        if isinstance(request, CompleteRequest):
            if not self.can_complete:
                raise UserError("no transformer", status=422, code="component_missing")
            return Work(request=request, **times)
        if request.caption == "endless":
            raise CaptionTooLong("caption has 9 text tokens, the model reads 8", field="caption")
        warnings = ("unknown: 'größer'\n",) if request.caption == "unknown" else ()
        return Work(request=request, units=request.num_candidates, warnings=warnings, **times)

    def run(self, work: Work) -> Result:
        self.asked.append(work.request)
        self.begun.release()
        request = work.request
        if isinstance(request, ClassifyRequest):
            return ClassifyResult([([1, 0], ["b", "a"], [0.75, 0.25]) for _ in request.images])
        if isinstance(request, CompleteRequest):
            caption = Completion(caption=f"{request.complete} x", log_likelihood=-1.0)
            return CompleteReply(captions=[caption], seed=3)
        assert isinstance(request, GenerateRequest)
        if request.caption == "bug":
            raise ZeroDivisionError("secret detail")
        if request.caption.startswith("quote"):
            raise LookupError(f"no token for {request.caption[:20]!r}") from KeyError(request)
        finished: list[Candidate] = []
        for number in range(request.num_candidates):
            if request.preview_rows is not None:
                work.put(Preview(number, 1, np.full((8, 8, 3), 128, np.uint8)))
            while work.may_continue() and not self.gate.wait(0.01):
                pass
            if not work.may_continue() or (request.caption == "half" and number == 2):
                break
            if request.caption == "breaks" and number == 1:
                raise ZeroDivisionError("secret detail")
            pixels = np.full((8, 8, 3), number, np.uint8)
            new = Candidate(number, -float(number), number / 10, float(number), pixels)
            alike = request.caption == "alike" and number > 0
            finished.append(finished[0].again(number) if alike else new)
            work.put(finished[-1])
        if work.is_cancelled:
            self.cancelled.set()
        if work.is_cancelled or not finished:
            raise work.stop_error()
        seed = request.seed if request.seed is not None else 5
        ranked = rank(finished)
        return GenerateResult(ranked, "clip", seed, request.num_candidates, 0.1, 0.1, 0.1)


@pytest.fixture
def engine() -> Engine:
    engine = Engine()
    engine.gate.set()
    return engine


@pytest.fixture
def engine_core(engine: Engine) -> Iterator[EngineCore]:
    engine_core = EngineCore(lambda: engine, queue_size=SETTINGS.queue_size)
    engine_core.start()
    assert engine_core.wait_until_loaded(PATIENCE) is State.READY
    yield engine_core
    engine_core.cancel_all()
    engine_core.drain(PATIENCE)


@pytest.fixture
def client(engine_core: EngineCore) -> FlaskClient:
    return create_app(engine_core, SETTINGS).test_client()


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
