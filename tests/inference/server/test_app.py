"""HTTP: routes, refusals, health, metrics and headers, through Flask's test client."""

import base64
import io
import threading

import numpy as np
import pytest

from inference.api.rendering import Candidate, GenerateResult, render_best
from inference.engine.engine_core import EngineCore, State
from inference.server.app import create_app
from tests.inference.server.app_fixtures import (
    ATTRIBUTES,
    PATIENCE,
    SETTINGS,
    Engine,
    in_background,
    post,
)

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
            "a request without a caption is answered in: application/json",
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


def test_a_missing_component_is_a_422_that_names_it(client, engine):
    engine.can_complete = False
    response = post(client, {"complete": "a"})
    assert (response.status_code, response.json["error"]["code"]) == (422, "component_missing")


def test_a_reply_that_could_be_too_large_is_refused_before_any_work(engine_core, engine):
    engine.image_size = 1024
    client = create_app(engine_core, SETTINGS).test_client()
    response = post(client, {"caption": "a", "num_candidates": 8, "num_images": 8})
    assert (response.status_code, response.json["error"]["code"]) == (422, "reply_too_large")
    assert "num_images must be at most 1 for 1024 x 1024 png" in response.json["error"]["message"]
    assert engine.asked == []
    assert post(client, {"caption": "a", "num_images": 3, "format": "webp"}).status_code == 200


def test_an_internal_error_is_a_500_without_its_traceback(client):
    response = post(client, {"caption": "bug"})
    assert (response.status_code, response.json["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in response.data
    assert b"Traceback" not in response.data


def test_an_unknown_path_and_a_wrong_method_are_errors_in_json(client):
    assert client.get("/nothing").json["error"]["code"] == "not_found"
    response = client.get("/invocations")
    assert response.status_code == 405
    assert response.json["error"]["code"] == "method_not_allowed"


def test_a_full_queue_is_a_429_with_retry_after(client, engine, engine_core):
    engine.gate.clear()
    threads = [in_background(lambda: post(client, {"caption": "a"}))[0]]
    assert engine.begun.acquire(timeout=PATIENCE)  # before that it fills a place in the queue
    threads += [in_background(lambda: post(client, {"caption": "a"}))[0] for _ in range(2)]
    while engine_core.queue_depth < 3:
        pass
    metrics = client.get("/metrics").text
    assert "dalle_num_requests_running 1.0" in metrics
    assert "dalle_num_requests_waiting 2.0" in metrics
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


def test_ping_gives_the_state():
    gate = threading.Event()

    def load() -> Engine:
        assert gate.wait(PATIENCE)
        return Engine()

    engine_core = EngineCore(load)
    client = create_app(engine_core, SETTINGS).test_client()
    engine_core.start()
    assert client.get("/ping").status_code == 503
    response = post(client, {"caption": "a"})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    gate.set()
    assert engine_core.wait_until_loaded(PATIENCE) is State.READY
    assert client.get("/ping").status_code == 200
    assert engine_core.drain(PATIENCE)
    assert client.get("/ping").status_code == 503
    assert post(client, {"caption": "a"}).json["error"]["code"] == "engine_stopping"


def test_ping_is_500_when_the_engine_is_dead():
    class Dead(Engine):
        def self_test(self) -> None:
            raise RuntimeError("no kernel image")

    engine_core = EngineCore(Dead)
    client = create_app(engine_core, SETTINGS).test_client()
    engine_core.start()
    engine_core.wait_until_loaded(PATIENCE)
    assert client.get("/ping").status_code == 500
    response = post(client, {"caption": "a"})
    assert response.status_code == 503
    assert "Retry-After" not in response.headers


def test_execution_parameters_are_within_the_platforms_limits(client):
    parameters = client.get("/execution-parameters").json
    assert isinstance(parameters["MaxConcurrentTransforms"], int)
    assert isinstance(parameters["MaxPayloadInMB"], int)
    assert parameters["MaxConcurrentTransforms"] * parameters["MaxPayloadInMB"] <= 100


def test_metrics_count_candidates_and_replies(client):
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


def test_metrics_count_an_image_reply_and_a_stream_that_fails(client):
    post(client, {"caption": "a", "num_candidates": 3}, Accept="image/png")
    post(client, {"caption": "breaks"}, Accept="application/jsonlines")
    metrics = client.get("/metrics").text
    assert "dalle_candidates_total 4.0" in metrics
    assert 'dalle_stage_seconds_count{stage="encode"} 1.0' in metrics


def test_two_apps_do_not_share_their_metrics(engine_core):
    first, second = (create_app(engine_core, SETTINGS).test_client() for _ in range(2))
    post(first, {"caption": "a"})
    assert 'status="200"' not in second.get("/metrics").text


def test_the_openapi_document_is_served(client):
    assert client.get("/openapi.json").json["openapi"] == "3.1.0"


@pytest.mark.parametrize("body", [{"caption": "a"}, b"{"])
def test_custom_attributes_come_back_unchanged(client, body):
    response = post(client, body, **{ATTRIBUTES: "trace=abc; x=1"})
    assert response.headers[ATTRIBUTES] == "trace=abc; x=1"


def test_attributes_of_the_caller_replace_the_scores_of_an_image(client):
    headers = {ATTRIBUTES: "trace=abc", "Accept": "image/png"}
    response = post(client, {"caption": "a"}, **headers)
    assert response.headers.get_all(ATTRIBUTES) == ["trace=abc"]
    assert response.headers["X-Dalle-Seed"] == "5"
    assert response.headers["X-Dalle-Temperature"] == "1.0"
    assert "X-Dalle-Top-P" not in response.headers


@pytest.mark.parametrize(
    ("attributes", "status"),
    [("x" * 1024, 200), ("x" * 1025, 400), ("größe=1", 400), ("a\tb", 400), ("", 200)],
)
def test_custom_attributes_are_at_most_1024_visible_characters(client, attributes, status):
    response = post(client, {"caption": "a"}, **{ATTRIBUTES: attributes})
    assert response.status_code == status
    if status == 200:
        assert response.headers[ATTRIBUTES] == attributes
    else:
        assert response.json["error"]["field"] == ATTRIBUTES
        assert ATTRIBUTES not in response.headers


def test_the_scores_of_an_image_fit_into_the_platforms_header():
    pixels = np.zeros((8, 8, 3), np.uint8)
    worst = GenerateResult(
        ranked=[Candidate(511, -1234567.891, -0.987654321, 0.0, pixels)] * 512,
        ranked_by="log_likelihood",
        seed=2**53 - 1,
        num_candidates=512,
        sample_seconds=0.0,
        decode_seconds=0.0,
        rank_seconds=0.0,
    )
    attributes = render_best(worst, "png")[1][ATTRIBUTES]
    assert attributes.isascii()
    assert attributes.isprintable()
    assert len(attributes) <= 1024


def test_session_headers_are_ignored(client):
    response = post(client, {"caption": "a"}, X_Amzn_SageMaker_Session_Id="NEW_SESSION")
    assert response.status_code == 200
    assert not [name for name, _ in response.headers if "Session" in name]
