"""From a request to its reply: images, streams and lines, through Flask's test client."""

import io
import json
import time
from dataclasses import replace

import pytest
from PIL import Image

from inference.api.parsing import Accept, BodyKind
from inference.server.app import create_app
from inference.server.bodies import BodyReader
from inference.server.handler import Handler
from inference.server.metrics import Metrics
from tests.inference.server.app_fixtures import (
    ATTRIBUTES,
    PATIENCE,
    SETTINGS,
    OneByOne,
    Work,
    in_background,
    pixels_of,
    post,
)


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
        "positions_per_step",
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
def test_an_image_type_gets_the_best_image_with_its_scores_in_headers(client, kind):
    response = post(client, {"caption": "a", "num_candidates": 3}, Accept=f"image/{kind}")
    assert response.content_type == f"image/{kind}"
    image = Image.open(io.BytesIO(response.data))
    assert (image.format, image.size) == (kind.upper(), (8, 8))
    assert response.headers["X-Dalle-Candidate"] == "2"
    assert response.headers["X-Dalle-Clip-Score"] == "0.200000"
    assert response.headers["X-Dalle-Completed-Candidates"] == "3"
    assert "seed=5;candidate=2;clip_score=0.200000" in response.headers[ATTRIBUTES]


@pytest.mark.parametrize(("caption", "warnings"), [("a", []), ("unknown", ["unknown: 'größer'\n"])])
def test_warnings_are_in_every_form_of_a_reply(client, caption, warnings):
    request = {"caption": caption, "num_candidates": 1}
    assert post(client, request).json["warnings"] == warnings
    lines = post(client, json.dumps(request).encode(), Content_Type="application/jsonlines")
    assert json.loads(lines.data)["warnings"] == warnings
    stream = post(client, request, Accept="application/jsonlines").data.splitlines()
    assert json.loads(stream[-1])["warnings"] == warnings
    header = post(client, request, Accept="image/png").headers.get("X-Dalle-Warnings", "[]")
    assert json.loads(header) == warnings
    assert header.isascii()
    assert header.isprintable()


def test_candidates_are_streamed_then_ranked(client):
    response = post(client, {"caption": "a", "num_candidates": 3}, Accept="application/jsonlines")
    assert response.content_type == "application/jsonlines"
    lines = [json.loads(line) for line in response.data.splitlines()]
    assert [line["event"] for line in lines] == ["candidate"] * 3 + ["ranking"]
    assert [line["candidate"] for line in lines[:3]] == [0, 1, 2]
    assert (pixels_of(lines[2]["image"]) == 2).all()
    assert [each["candidate"] for each in lines[3]["ranking"]] == [2, 1, 0]
    assert (lines[3]["seed"], lines[3]["completed_candidates"]) == (5, 3)


def test_a_streams_first_line_is_sent_before_its_last_candidate_is_finished(engine_core, engine):
    engine.gate = OneByOne()
    engine.gate.set()
    client = create_app(engine_core, SETTINGS).test_client()
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


def test_previews_come_before_their_candidate_is_finished(client, engine):
    engine.gate.clear()
    response = client.post(
        "/invocations",
        json={"caption": "a", "num_candidates": 1, "preview_rows": 1},
        headers={"Accept": "application/jsonlines"},
        buffered=False,
    )
    parts = iter(response.response)
    preview = json.loads(next(parts))
    assert (preview["event"], preview["candidate"], preview["rows"]) == ("preview", 0, 1)
    assert (pixels_of(preview["image"]) == 128).all()
    assert not engine.gate.is_set(), "the candidate is not finished yet"
    engine.gate.set()
    assert [json.loads(part)["event"] for part in parts] == ["candidate", "ranking"]
    response.close()


def test_metrics_do_not_count_previews(client):
    body = {"caption": "a", "num_candidates": 3, "preview_rows": 1}
    lines = post(client, body, Accept="application/jsonlines").data.splitlines()
    assert len(lines) == 3 + 3 + 1
    assert "dalle_candidates_total 3.0" in client.get("/metrics").text


def test_previews_without_a_stream_are_refused_before_any_work(client, engine):
    response = post(client, {"caption": "a", "preview_rows": 1}, Accept="image/png")
    assert (response.status_code, response.json["error"]["field"]) == (422, "preview_rows")
    assert "Accept: application/jsonlines, got image/png" in response.json["error"]["message"]
    line = b'{"caption": "a", "preview_rows": 1}\n'
    response = post(client, line, Content_Type="application/jsonlines")
    assert json.loads(response.data)["error"]["field"] == "preview_rows"
    assert engine.asked == []


def test_a_stream_that_fails_ends_with_an_error_line(client):
    response = post(client, {"caption": "breaks"}, Accept="application/jsonlines")
    lines = [json.loads(line) for line in response.data.splitlines()]
    assert [line["event"] for line in lines] == ["candidate", "error"]
    assert lines[1]["error"]["code"] == "internal_error"
    assert b"secret" not in response.data


def test_closing_a_stream_cancels_its_request(engine_core, engine):
    engine.gate = OneByOne()
    engine.gate.set()
    client = create_app(engine_core, SETTINGS).test_client()
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


def test_more_lines_than_the_queue_holds_wait(client):
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


def test_a_line_without_time_left_fails_alone(client, engine, engine_core):
    post(client, {"caption": "a", "num_candidates": 1})
    engine_core._queue.speeds.record(Work, 1, 20.0)
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


def test_a_server_that_is_not_ready_refuses_all_lines_at_once(client, engine_core):
    engine_core.drain(PATIENCE)
    response = post(client, b'{"caption": "a"}\n', Content_Type="application/jsonlines")
    assert (response.status_code, response.json["error"]["code"]) == (503, "engine_stopping")


WITHOUT_CAPTION = [
    ({"complete": "big"}, "application/json"),
    ({"images": ["aGk="], "classes": ["a"]}, "application/json"),
    (b'{"caption": "a"}\n', "application/jsonlines"),
]


@pytest.mark.parametrize(("body", "content_type"), WITHOUT_CAPTION)
@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("image/png, application/json;q=0.5", "application/json"),
        ("image/*, */*;q=0.1", "application/json"),
        (
            "image/png;q=0.9, application/x-ndjson;q=0.1, application/json;q=0",
            "application/x-ndjson",
        ),
    ],
)
def test_an_accept_that_prefers_images_gets_json_where_there_is_none(
    client, body, content_type, accept, chosen
):
    response = post(client, body, Content_Type=content_type, Accept=accept)
    assert response.status_code == 200
    of_lines = "application/jsonlines" if chosen == "application/json" else chosen
    expected = of_lines if content_type == "application/jsonlines" else chosen
    assert response.content_type == expected


@pytest.mark.parametrize(("body", "content_type"), WITHOUT_CAPTION)
@pytest.mark.parametrize("accept", ["image/png", "image/*;q=0.5", "image/webp, application/*;q=0"])
def test_an_accept_of_images_alone_is_refused_where_there_is_none(
    client, engine, body, content_type, accept
):
    response = post(client, body, Content_Type=content_type, Accept=accept)
    assert (response.status_code, response.json["error"]["field"]) == (406, "Accept")
    assert "is answered in: application/json, application/jsonlines" in response.text
    assert engine.asked == []


def test_deadlines_of_lines_count_from_the_arrival_of_their_body(engine_core):
    handler = Handler(
        engine_core,
        engine_core.engine(),
        BodyReader(),
        SETTINGS.limits,
        Metrics(engine_core),
        accept=Accept.parse(None),
        arrival=time.monotonic() - SETTINGS.limits.deadline_seconds,
        has_left=lambda: False,
    )
    line = b'{"caption": "a", "num_candidates": 1}'
    longer = b'{"caption": "a", "num_candidates": 1, "deadline_seconds": 3600}'
    answer = handler.answer(b"\n".join([line, longer, line]), BodyKind.JSON_LINES)
    replies = [json.loads(each) for each in answer.body]
    codes = [reply.get("error", {}).get("code") for reply in replies]
    assert codes == ["deadline_exceeded", None, "deadline_exceeded"]


@pytest.mark.parametrize(("has_break", "num_breaks"), [(True, 3), (False, 2)])
def test_a_body_of_lines_is_answered_with_one_break_a_line_but_for_the_last_of_a_batch(
    engine_core, has_break, num_breaks
):
    settings = replace(SETTINGS, last_line_break=has_break)
    client = create_app(engine_core, settings).test_client()
    lines = b'{"caption": "a"}\n{\n{"caption": "b"}\n'
    reply = post(client, lines, Content_Type="application/jsonlines").data
    assert reply.count(b"\n") == num_breaks
    assert [*map(type, map(json.loads, reply.splitlines()))] == [dict] * 3
