"""HTTP: routes, refusals, media types, streams and lines, through Flask's test client.

The engine is a stand-in handed to the scheduler: what is tested is the way from a request to it.
"""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image

from dalle.errors import CaptionTooLong, UserError
from inference.app import create_app
from inference.control import Control
from inference.render import Candidate, ClassifyResult, CompleteResult, GenerateResult, Result, rank
from inference.replies import CompleteReply, Completion
from inference.scheduler import Scheduler, State
from inference.schema import (
    ClassifyRequest,
    CompleteRequest,
    GenerateRequest,
    Limits,
    Request,
    decode_base64,
)
from inference.settings import Settings

PATIENCE = 20.0
LIMITS = Limits(max_candidates=8, max_images=8, max_request_bytes=20_000)
SETTINGS = Settings(limits=LIMITS, queue_size=2)
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
            while control.keep_going() and not self.gate.wait(0.01):
                pass
            if not control.keep_going() or (request.caption == "half" and number == 2):
                break
            if request.caption == "breaks" and number == 1:
                raise ZeroDivisionError("secret detail")
            pixels = np.full((8, 8, 3), number, np.uint8)
            finished.append(Candidate(number, -float(number), number / 10, pixels))
            control.finished(finished[-1])
        if control.cancelled:
            self.cancelled.set()
        if control.cancelled or not finished:
            raise control.error()
        ranked_by, ranked = rank(finished)
        seed = request.seed if request.seed is not None else 5
        return GenerateResult(ranked, ranked_by, seed, request.num_candidates, 0.1, 0.1, 0.1)


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


def test_the_best_candidates_come_first(client):
    response = post(client, {"caption": "a", "num_candidates": 4, "num_images": 2, "seed": 7})
    assert response.status_code == 200
    reply = response.json
    assert [(image["rank"], image["candidate"]) for image in reply["images"]] == [(1, 3), (2, 2)]
    assert [image["clip_score"] for image in reply["images"]] == [0.3, 0.2]
    assert (pixels_of(reply["images"][0]["image"]) == 3).all()
    assert (reply["seed"], reply["num_candidates"], reply["completed_candidates"]) == (7, 4, 4)
    assert reply["ranked_by"] == "clip"
    assert set(reply["timings"]) == {
        "queue_seconds",
        "sample_seconds",
        "decode_seconds",
        "rank_seconds",
        "encode_seconds",
    }


def test_a_deadline_leaves_the_best_so_far(client):
    reply = post(client, {"caption": "half", "num_candidates": 4, "num_images": 4}).json
    assert (reply["num_candidates"], reply["completed_candidates"]) == (4, 2)
    assert [image["candidate"] for image in reply["images"]] == [1, 0]


def test_a_deadline_before_anything_is_a_504(client, engine):
    engine.gate.clear()
    response = post(client, {"caption": "a", "deadline_seconds": 0.05})
    assert response.status_code == 504
    assert response.json["error"]["code"] == "deadline_exceeded"


def test_images_are_classified_in_the_shape_of_clip_container(client):
    response = post(client, {"images": ["aGk=", "aGk="], "classes": ["a", "b"]})
    assert response.json == [[[1, 0], ["b", "a"], [0.75, 0.25]]] * 2


def test_captions_are_completed(client):
    reply = post(client, {"complete": "big filled", "seed": 3}).json
    assert reply == {"captions": [{"caption": "big filled x", "log_likelihood": -1.0}], "seed": 3}


def test_plain_text_is_a_caption(client, engine):
    response = post(client, b"a red square", Content_Type="text/plain")
    assert response.status_code == 200
    assert engine.asked[0].caption == "a red square"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_type_gets_the_best_picture_with_its_scores_in_headers(client, kind):
    response = post(client, {"caption": "a", "num_candidates": 3}, Accept=f"image/{kind}")
    assert response.content_type == f"image/{kind}"
    image = Image.open(io.BytesIO(response.data))
    assert (image.format, image.size) == (kind.upper(), (8, 8))
    assert response.headers["X-Dalle-Candidate"] == "2"
    assert response.headers["X-Dalle-Clip-Score"] == "0.200000"
    assert response.headers["X-Dalle-Completed-Candidates"] == "3"
    assert "seed=5;candidate=2;clip_score=0.200000" in response.headers[ATTRIBUTES]


def test_candidates_are_streamed_then_ranked(client):
    response = post(client, {"caption": "a", "num_candidates": 3}, Accept="application/jsonlines")
    assert response.content_type == "application/jsonlines"
    lines = [json.loads(line) for line in response.data.splitlines()]
    assert [line["event"] for line in lines] == ["candidate"] * 3 + ["ranking"]
    assert [line["candidate"] for line in lines[:3]] == [0, 1, 2]
    assert (pixels_of(lines[2]["image"]) == 2).all()
    assert [each["candidate"] for each in lines[3]["ranking"]] == [2, 1, 0]
    assert (lines[3]["seed"], lines[3]["completed_candidates"]) == (5, 3)


def test_a_streams_first_line_is_sent_before_its_last_candidate_is_drawn(scheduler, engine):
    engine.gate = OneByOne()
    engine.gate.set()
    client = create_app(scheduler, SETTINGS).test_client()
    response = client.post(
        "/invocations",
        json={"caption": "a", "num_candidates": 2},
        headers={"Accept": "application/jsonlines"},
        buffered=False,
    )
    parts = iter(response.response)
    assert json.loads(next(parts))["candidate"] == 0
    assert not engine.gate.is_set()
    engine.gate.set()
    assert json.loads(next(parts))["candidate"] == 1
    assert json.loads(next(parts))["event"] == "ranking"
    response.close()


def test_a_stream_that_breaks_off_says_so_in_its_last_line(client):
    response = post(client, {"caption": "breaks"}, Accept="application/jsonlines")
    lines = [json.loads(line) for line in response.data.splitlines()]
    assert [line["event"] for line in lines] == ["candidate", "error"]
    assert lines[1]["error"]["code"] == "internal_error"
    assert b"secret" not in response.data


def test_a_stream_that_is_closed_gives_its_work_up(scheduler, engine):
    engine.gate = OneByOne()
    engine.gate.set()
    client = create_app(scheduler, SETTINGS).test_client()
    response = client.post(
        "/invocations",
        json={"caption": "a", "num_candidates": 8},
        headers={"Accept": "application/jsonlines"},
        buffered=False,
    )
    next(iter(response.response))
    response.close()
    assert engine.cancelled.wait(PATIENCE)


def test_each_line_of_a_body_has_one_line_of_the_reply_in_order(client):
    body = b"\n".join(
        [
            b'{"caption": "a", "num_candidates": 1, "seed": 1}',
            b"{nonsense",
            b"",
            b'{"caption": "\xff"}',
            b'{"caption": "endless"}',
            b'{"caption": "bug"}',
            b'{"images": ["aGk="], "classes": ["a", "b"]}',
            b'{"complete": "x"}',
            b'{"caption": "a", "num_candidates": 1, "seed": 9}',
        ]
    )
    response = post(client, body + b"\n", Content_Type="application/jsonlines")
    assert response.status_code == 200
    assert response.content_type == "application/jsonlines"
    lines = [json.loads(line) for line in response.data.decode().split("\n")[:-1]]
    assert len(lines) == 9
    assert (lines[0]["seed"], lines[8]["seed"]) == (1, 9)
    codes = [line["error"]["code"] for line in lines[1:6]]
    assert codes == ["malformed_body"] * 3 + ["caption_too_long", "internal_error"]
    assert lines[6] == [[[1, 0], ["b", "a"], [0.75, 0.25]]]
    assert lines[7]["captions"]


def test_more_lines_than_the_queue_holds_wait_for_each_other(client):
    line = b'{"caption": "a", "num_candidates": 1}\n'
    response = post(client, line * 20, Content_Type="application/x-ndjson")
    assert [b"images" in each for each in response.data.splitlines()] == [True] * 20


def test_a_lines_own_short_deadline_fails_that_line_only(client):
    body = b"""{"caption": "a", "num_candidates": 1, "deadline_seconds": 1e-9}
{"caption": "a", "num_candidates": 1}
"""
    response = post(client, body, Content_Type="application/jsonlines")
    assert response.status_code == 200
    first, second = (json.loads(line) for line in response.data.splitlines())
    assert first["error"]["code"] == "deadline_exceeded"
    assert second["images"]


def test_a_line_that_others_leave_no_time_for_fails_alone(client, engine, scheduler):
    post(client, {"caption": "a", "num_candidates": 1})
    scheduler._seconds_per_unit["generate"] = 5.0
    engine.gate.clear()
    thread, _ = in_background(lambda: post(client, {"caption": "a", "num_candidates": 8}))
    assert engine.begun.acquire(timeout=PATIENCE)
    assert engine.begun.acquire(timeout=PATIENCE)
    line = {"caption": "a", "num_candidates": 1, "deadline_seconds": 1}
    response = client.post("/invocations", data=json.dumps(line), content_type="application/jsonl")
    engine.gate.set()
    thread.join(PATIENCE)
    assert response.status_code == 200
    assert json.loads(response.data)["error"]["code"] == "too_busy"


def test_a_server_that_is_not_ready_refuses_all_lines_at_once(client, scheduler):
    scheduler.drain(PATIENCE)
    response = post(client, b'{"caption": "a"}\n', Content_Type="application/jsonlines")
    assert (response.status_code, response.json["error"]["code"]) == (503, "engine_stopping")


BIG = base64.b64encode(bytes(30_000)).decode()


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "says"),
    [
        (b"{", {}, 400, "malformed_body", "not JSON"),
        (b"[]", {}, 400, "malformed_body", "must be a JSON object"),
        (b'{"caption": "\xff"}', {}, 400, "malformed_body", "not UTF-8"),
        (b"\xff", {"Content_Type": "text/plain"}, 400, "malformed_body", "not UTF-8"),
        (b"", {"Content_Type": "application/jsonlines"}, 400, "malformed_body", "no lines"),
        ({"images": ["?"], "classes": ["a"]}, {}, 400, "bad_base64", "images[0] is not base64"),
        ({"caption": "a"}, {"Accept": "text/html"}, 406, "not_acceptable", "text/html"),
        (
            {"images": ["aGk="], "classes": ["a"]},
            {"Accept": "image/png"},
            406,
            "not_acceptable",
            "answered in application/json",
        ),
        (
            b'{"caption": "a"}',
            {"Content_Type": "application/jsonlines", "Accept": "image/png"},
            406,
            "not_acceptable",
            "application/jsonlines",
        ),
        ({"caption": "a", "prime_image": BIG}, {}, 413, "payload_too_large", "20,000 bytes"),
        (b"a=b", {"Content_Type": "multipart/form-data"}, 415, "unsupported_media_type", "send"),
        (b"", {"Content_Encoding": "gzip"}, 415, "unsupported_media_type", "gzip"),
        ({"caption": "a", "num_candidates": 9}, {}, 422, "invalid_request", "must be 1 to 8"),
        ({"caption": "a", "nope": 1}, {}, 422, "invalid_request", "nope is unknown"),
        ({"caption": "endless"}, {}, 422, "caption_too_long", "the model reads 8"),
        (
            {"caption": "a"},
            {ATTRIBUTES: "x" * 1025},
            400,
            "bad_custom_attributes",
            "at most 1,024",
        ),
    ],
)
def test_a_refusal_says_what_to_change_and_uses_no_device_time(
    client, engine, body, headers, status, code, says
):
    response = post(client, body, **headers)
    assert response.status_code == status
    error = response.json["error"]
    assert (error["code"], set(error)) == (code, {"code", "message", "field"})
    assert says in error["message"]
    assert engine.asked == [], "no device time may be spent on a refused request"


@pytest.mark.parametrize("content_type", ["application/json", "application/jsonlines"])
@pytest.mark.parametrize(("size", "status"), [(20_000, 200), (20_001, 413), (60_000, 413)])
def test_a_body_of_unknown_length_is_never_cut(client, content_type, size, status):
    line = b'{"caption": "a", "num_candidates": 1}\n'
    response = client.post(
        "/invocations",
        input_stream=io.BytesIO(line + b" " * (size - len(line) - 1) + b"\n"),
        headers={"Content-Type": content_type, "Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert response.status_code == status
    if status == 413:
        assert response.json["error"]["code"] == "payload_too_large"


def test_a_missing_component_is_a_422_that_names_it():
    engine = Engine()
    scheduler = Scheduler(lambda: engine)
    scheduler.start()
    scheduler.wait_until_loaded(PATIENCE)
    response = post(create_app(scheduler, SETTINGS).test_client(), {"complete": "a"})
    scheduler.drain(PATIENCE)
    assert (response.status_code, response.json["error"]["code"]) == (422, "component_missing")


def test_a_reply_that_could_be_too_large_is_refused_before_any_work(scheduler, engine):
    engine.image_size = 1024
    client = create_app(scheduler, SETTINGS).test_client()
    response = post(client, {"caption": "a", "num_candidates": 8, "num_images": 8})
    assert (response.status_code, response.json["error"]["code"]) == (422, "reply_too_large")
    assert "num_images must be at most 1 for 1024 x 1024 png" in response.json["error"]["message"]
    assert engine.asked == []
    assert post(client, {"caption": "a", "num_images": 3, "format": "webp"}).status_code == 200


def test_a_mistake_of_ours_is_a_500_without_its_traceback(client):
    response = post(client, {"caption": "bug"})
    assert (response.status_code, response.json["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in response.data
    assert b"Traceback" not in response.data


def test_an_unknown_path_and_a_wrong_method_are_told_in_json(client):
    assert client.get("/nothing").json["error"]["code"] == "not_found"
    response = client.get("/invocations")
    assert response.status_code == 405
    assert response.json["error"]["code"] == "method_not_allowed"


def test_a_full_queue_is_a_429_with_retry_after(client, engine, scheduler):
    engine.gate.clear()
    threads = [in_background(lambda: post(client, {"caption": "a"}))[0] for _ in range(3)]
    assert engine.begun.acquire(timeout=PATIENCE)
    while scheduler.queue_depth < 3:
        pass
    response = post(client, {"caption": "a"})
    assert (response.status_code, response.json["error"]["code"]) == (429, "queue_full")
    assert int(response.headers["Retry-After"]) >= 1
    engine.gate.set()
    for thread in threads:
        thread.join(PATIENCE)


def test_ping_and_metrics_are_answered_during_a_generation(client, engine):
    engine.gate.clear()
    thread, answers = in_background(lambda: post(client, {"caption": "a"}))
    assert engine.begun.acquire(timeout=PATIENCE)
    assert client.get("/ping").status_code == 200
    assert "dalle_queue_depth 1.0" in client.get("/metrics").text
    engine.gate.set()
    thread.join(PATIENCE)
    assert answers[0].status_code == 200


def test_ping_tells_the_states_apart():
    gate = threading.Event()

    def load() -> Engine:
        assert gate.wait(PATIENCE)
        return Engine()

    scheduler = Scheduler(load)
    client = create_app(scheduler, SETTINGS).test_client()
    scheduler.start()
    assert client.get("/ping").status_code == 503
    response = post(client, {"caption": "a"})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    gate.set()
    assert scheduler.wait_until_loaded(PATIENCE) is State.READY
    assert client.get("/ping").status_code == 200
    assert scheduler.drain(PATIENCE)
    assert client.get("/ping").status_code == 503
    assert post(client, {"caption": "a"}).json["error"]["code"] == "engine_stopping"


def test_ping_is_500_when_the_engine_is_dead():
    class Dead(Engine):
        def self_test(self) -> None:
            raise RuntimeError("no kernel image")

    scheduler = Scheduler(Dead)
    client = create_app(scheduler, SETTINGS).test_client()
    scheduler.start()
    scheduler.wait_until_loaded(PATIENCE)
    assert client.get("/ping").status_code == 500
    response = post(client, {"caption": "a"})
    assert response.status_code == 503
    assert "Retry-After" not in response.headers


def test_execution_parameters_are_within_the_platforms_limits(client):
    parameters = client.get("/execution-parameters").json
    assert isinstance(parameters["MaxConcurrentTransforms"], int)
    assert isinstance(parameters["MaxPayloadInMB"], int)
    assert parameters["MaxConcurrentTransforms"] * parameters["MaxPayloadInMB"] <= 100


def test_metrics_count_what_was_drawn_and_answered(client):
    post(client, {"caption": "a", "num_candidates": 3})
    post(client, {"caption": "half", "num_candidates": 3})
    post(client, b"{")
    response = client.get("/metrics")
    assert response.content_type.startswith("text/plain")
    for line in (
        "dalle_candidates_total 5.0",
        "dalle_cut_short_total 1.0",
        'dalle_invocations_total{status="200"} 2.0',
        'dalle_invocations_total{status="400"} 1.0',
        'dalle_stage_seconds_count{stage="sample"} 2.0',
        "dalle_ready 1.0",
    ):
        assert line in response.text


def test_metrics_count_a_picture_reply_and_a_stream_that_breaks_off(client):
    post(client, {"caption": "a", "num_candidates": 3}, Accept="image/png")
    post(client, {"caption": "breaks"}, Accept="application/jsonlines")
    metrics = client.get("/metrics").text
    assert "dalle_candidates_total 4.0" in metrics
    assert 'dalle_stage_seconds_count{stage="encode"} 1.0' in metrics


def test_two_apps_do_not_share_their_metrics(scheduler):
    first, second = (create_app(scheduler, SETTINGS).test_client() for _ in range(2))
    post(first, {"caption": "a"})
    assert 'status="200"' not in second.get("/metrics").text


def test_the_openapi_document_is_served(client):
    assert client.get("/openapi.json").json["openapi"] == "3.1.0"


@pytest.mark.parametrize("body", [{"caption": "a"}, b"{"])
def test_custom_attributes_come_back_unchanged(client, body):
    response = post(client, body, **{ATTRIBUTES: "trace=abc; x=1"})
    assert response.headers[ATTRIBUTES] == "trace=abc; x=1"


def test_session_headers_are_ignored(client):
    response = post(client, {"caption": "a"}, X_Amzn_SageMaker_Session_Id="NEW_SESSION")
    assert response.status_code == 200
    assert not [name for name, _ in response.headers if "Session" in name]
