"""POST /v1/images/generations, through Flask's test client."""

import json
from dataclasses import replace

import pytest
import torch

from dalle.decoding.sampling import SamplingOptions
from dalle.errors import UserError
from dalle.model_card import ComponentCard
from inference.api.schema import Limits
from inference.engine.request import PreparedGeneration
from inference.openai.schema import MODEL
from inference.server.app import create_app
from tests.inference.openai.posting import events, post, streaming
from tests.inference.server.app_fixtures import (
    ATTRIBUTES,
    PATIENCE,
    SETTINGS,
    in_background,
    pixels_of,
)

ROUTE = "/v1/images/generations"


@pytest.fixture
def with_grid(engine):
    """The engine, whose model has a grid of four rows."""
    engine.card = engine.card.model_copy(update={"image_size": 8, "grid_size": 4})
    return engine


def test_the_best_n_candidates_come_first(client, engine, with_grid):
    body = {"prompt": "a", "n": 2, "seed": 7, "num_candidates": 4, "guidance_scale": 2}
    reply = post(client, ROUTE, body).json
    assert [(each["rank"], each["candidate"]) for each in reply["data"]] == [(1, 3), (2, 2)]
    assert (pixels_of(reply["data"][0]["b64_json"]) == 3).all()
    assert (reply["seed"], reply["num_candidates"], reply["ranked_by"]) == (7, 4, "clip")
    assert (reply["size"], reply["output_format"], reply["background"]) == ("8x8", "png", "opaque")
    assert reply["usage"]["output_tokens"] == 2 * 4 * 4
    assert type(reply["created"]) is int
    (request,) = engine.asked
    assert (request.caption, request.num_images, request.guidance_scale) == ("a", 2, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_n_pictures_are_n_however_alike_they_are_unless_distinct_ones_are_asked_for(client, stream):
    for fields, numbers in (({}, [0, 1, 2, 3]), ({"distinct": True}, [0])):
        body = {"prompt": "alike", "n": 4, "num_candidates": 6, "stream": stream, **fields}
        reply = post(client, ROUTE, body)
        pictures = [data for _, data in events(reply.data)] if stream else reply.json["data"]
        assert [each["candidate"] for each in pictures] == numbers
        assert {each["copies"] for each in pictures} == {6}


def test_a_silent_request_gets_the_best_of_the_default_number_of_candidates(client, engine):
    reply = post(client, ROUTE, {"prompt": "a"}).json
    assert [each["candidate"] for each in reply["data"]] == [7]
    assert engine.asked[0].num_candidates == 8  # the limit of this server; 16 by default


def test_so_many_candidates_are_generated_as_pictures_are_asked_for(engine_core, engine):
    app = create_app(engine_core, replace(SETTINGS, limits=Limits()))
    for n, candidates in ((4, 16), (20, 20)):
        post(app.test_client(), ROUTE, {"prompt": "a", "n": n})
        assert engine.asked[-1].num_candidates == candidates


def test_null_is_the_default_of_every_field(client, engine):
    names = ["n", "size", "quality", "style", "background", "moderation", "response_format"]
    names += ["output_format", "output_compression", "partial_images", "stream", "user", "model"]
    names += ["safety_identifier", "seed", "num_candidates", "top_k", "deadline_seconds"]
    reply = post(client, ROUTE, {"prompt": "a", **dict.fromkeys(names)})
    assert reply.status_code == 200, reply.json
    assert engine.asked[0] == (post(client, ROUTE, {"prompt": "a"}), engine.asked[1])[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "gpt-image-2"},
        {"model": ""},
        {"size": "auto"},
        {"size": "8x8"},
        {"quality": "high"},
        {"quality": "hd"},
        {"style": "vivid"},
        {"background": "opaque"},
        {"moderation": "low"},
        {"response_format": "b64_json"},
        {"output_compression": 100},
        {"partial_images": 0},
        {"user": "somebody", "safety_identifier": "0a1b"},
    ],
)
def test_values_that_mean_nothing_here_change_no_picture(client, engine, fields):
    assert post(client, ROUTE, {"prompt": "a", "seed": 7, **fields}).status_code == 200
    assert post(client, ROUTE, {"prompt": "a", "seed": 7}).status_code == 200
    assert engine.asked[0] == engine.asked[1]


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "says"),
    [
        (b"{", 400, None, "malformed_body", "not JSON"),
        ({}, 400, "prompt", "invalid_request", "prompt is missing"),
        ({"prompt": " "}, 400, "prompt", "invalid_request", "prompt"),
        ({"prompt": 3}, 400, "prompt", "invalid_request", "prompt must be a valid string, got 3"),
        ({"prompt": "endless"}, 400, "prompt", "caption_too_long", "the model reads 8"),
        ({"n": 0}, 400, "n", "invalid_request", "n must be 1 or more, got 0"),
        ({"n": 9}, 400, "n", "invalid_request", "n must be 1 to 8, got 9"),
        ({"n": "2"}, 400, "n", "invalid_request", 'n must be a valid integer, got "2"'),
        ({"n": 3, "num_candidates": 2}, 400, "n", "invalid_request", "n must be 1 to num_cand"),
        ({"num_candidates": 9}, 400, "num_candidates", "invalid_request", "must be 1 to 8, got 9"),
        ({"size": "1024x1024"}, 400, "size", "invalid_request", "must be auto or 8x8, got"),
        ({"response_format": "url"}, 400, "response_format", "invalid_request", "b64_json: the s"),
        ({"output_format": "svg"}, 400, "output_format", "invalid_request", "'png', 'jpeg' or 'w"),
        ({"output_compression": 50}, 400, "output_compression", "invalid_request", "must be 100"),
        ({"background": "transparent"}, 400, "background", "invalid_request", "'auto' or 'opaq"),
        ({"quality": "best"}, 400, "quality", "invalid_request", "'hd', got \"best\""),
        ({"partial_images": 1}, 400, "partial_images", "invalid_request", "give stream true"),
        ({"partial_images": 4, "stream": True}, 400, "partial_images", "invalid_request", "0 to 3"),
        ({"num_candidate": 2}, 400, "num_candidate", "invalid_request", "you mean num_candidates"),
        ({"caption": "a"}, 400, "caption", "invalid_request", "caption is unknown"),
        ({"num_images": 2}, 400, "num_images", "invalid_request", "num_images is unknown"),
        ({"frame_count": 2}, 400, "frame_count", "invalid_request", "frame_count is unknown"),
        ({"prime_rows": 1}, 400, "prime_rows", "invalid_request", "prime_image and prime_rows go"),
    ],
)
def test_a_refusal_has_the_form_of_openai_and_its_names(
    client, engine, body, status, param, code, says
):
    if isinstance(body, dict) and body:
        body = {"prompt": "a", **body}
    response = post(client, ROUTE, body)
    assert response.status_code == status
    error = response.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert says in error["message"]
    assert engine.asked == [], "no device time may be spent on a refused request"


def test_a_body_that_no_prompt_needs_is_a_413(engine_core):
    app = create_app(engine_core, replace(SETTINGS, limits=Limits()))
    response = post(app.test_client(), ROUTE, b" " * 300_000)
    assert (response.status_code, response.json["error"]["code"]) == (413, "payload_too_large")


def test_another_content_type_is_a_415_that_names_json(client):
    response = post(client, ROUTE, b"a", Content_Type="text/plain")
    assert (response.status_code, response.json["error"]["param"]) == (415, "Content-Type")
    assert "application/json" in response.json["error"]["message"]


def test_an_internal_error_is_a_server_error_without_its_traceback(client):
    response = post(client, ROUTE, {"prompt": "bug"})
    assert (response.status_code, response.json["error"]["type"]) == (500, "server_error")
    assert b"secret" not in response.data


def test_a_deadline_before_anything_is_a_504_that_clients_do_not_repeat(client, engine):
    engine.gate.clear()
    response = post(client, ROUTE, {"prompt": "a", "deadline_seconds": 0.05})
    assert (response.status_code, response.json["error"]["type"]) == (504, "server_error")
    assert response.headers["x-should-retry"] == "false"


def test_a_full_queue_is_a_rate_limit_with_retry_after(client, engine, engine_core):
    engine.gate.clear()
    threads = [in_background(lambda: post(client, ROUTE, {"prompt": "a"}))]
    assert engine.begun.acquire(timeout=PATIENCE)
    for _ in range(SETTINGS.queue_size):
        threads.append(in_background(lambda: post(client, ROUTE, {"prompt": "a"})))
    while engine_core.queue_depth < 1 + SETTINGS.queue_size:
        pass
    response = post(client, ROUTE, {"prompt": "a"})
    engine.gate.set()
    for thread, _ in threads:
        thread.join(PATIENCE)
    assert (response.status_code, response.json["error"]["type"]) == (429, "rate_limit_error")
    assert int(response.headers["Retry-After"]) >= 1


def test_a_stream_ends_with_the_best_pictures(client, with_grid):
    body = {"prompt": "a", "n": 2, "num_candidates": 3, "stream": True, "output_format": "webp"}
    response = post(client, ROUTE, body)
    assert response.content_type.startswith("text/event-stream")
    found = events(response.data)
    assert [name for name, _ in found] == ["image_generation.completed"] * 2
    assert [data["type"] for _, data in found] == ["image_generation.completed"] * 2
    assert [data["candidate"] for _, data in found] == [2, 1]
    first = found[0][1]
    assert (pixels_of(first["b64_json"]) == 2).all()
    assert (first["size"], first["output_format"], first["seed"]) == ("8x8", "webp", 5)
    assert first["usage"]["output_tokens"] == 16


def test_a_stream_sends_a_picture_before_it_makes_all(client, encoded):
    body = {"prompt": "a", "n": 8, "num_candidates": 8, "stream": True}
    parts = streaming(client, ROUTE, body)
    assert len(events(next(parts))) == 1
    assert len(encoded) <= 2
    assert [len(events(part)) for part in parts] == [1] * 7
    assert len(encoded) == 8


def test_partial_images_are_those_of_the_first_candidate(client, with_grid):
    body = {"prompt": "a", "num_candidates": 2, "stream": True, "partial_images": 3}
    found = events(post(client, ROUTE, body).data)
    assert [data["type"].partition(".")[2] for _, data in found] == ["partial_image", "completed"]
    assert found[0][1]["partial_image_index"] == 0
    assert (pixels_of(found[0][1]["b64_json"]) == 128).all()
    assert with_grid.asked[0].preview_rows == 1  # of four, so that there are three


def test_only_the_candidate_whose_partial_images_are_sent_is_previewed(
    client, engine_core, engine, monkeypatch
):
    def prepare(request, **times):
        return PreparedGeneration(
            caption=request.caption,
            text_tokens=torch.zeros(1, 8),
            seed=0,
            num_candidates=request.num_candidates,
            options=SamplingOptions(),
            preview_rows=1,
            **times,
        )

    def refuse(prepared, **_):
        submitted.append(prepared)
        raise UserError("enough is known")

    submitted: list[PreparedGeneration] = []
    monkeypatch.setattr(engine, "prepare", prepare)
    monkeypatch.setattr(engine_core, "submit", refuse)
    post(client, ROUTE, {"prompt": "a", "stream": True, "partial_images": 3})
    assert [each.num_previewed for each in submitted] == [1]


@pytest.mark.parametrize(("grid", "partial", "rows"), [(4, 1, 2), (8, 2, 3), (16, 3, 4), (2, 3, 1)])
def test_partial_images_are_evenly_spaced(client, engine, grid, partial, rows):
    engine.card = engine.card.model_copy(update={"grid_size": grid})
    body = {"prompt": "a", "num_candidates": 1, "stream": True, "partial_images": partial}
    post(client, ROUTE, body)
    assert engine.asked[0].preview_rows == rows
    assert len(range(rows, grid, rows)) <= partial


def test_a_stream_that_breaks_off_ends_with_an_error(client):
    body = {"prompt": "breaks", "num_candidates": 2, "stream": True}
    ((name, data),) = events(post(client, ROUTE, body).data)
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "server_error")
    assert "secret" not in json.dumps(data)


def test_a_reply_that_could_be_too_large_is_refused_in_openais_names(engine_core, engine):
    engine.image_size = 1024
    client = create_app(engine_core, SETTINGS).test_client()
    error = post(client, ROUTE, {"prompt": "a", "n": 8}).json["error"]
    assert (error["code"], error["param"]) == ("reply_too_large", "n")
    assert error["message"].startswith("n must be at most 1 for 1024 x 1024 png images")
    assert "output_format jpeg or webp, or for a stream" in error["message"]
    assert post(client, ROUTE, {"prompt": "a", "n": 8, "stream": True}).status_code == 200


@pytest.mark.parametrize(
    ("attributes", "is_openai"),
    [
        (f"route={ROUTE}", True),
        (f"foo=bar,route={ROUTE},baz=1", True),
        (f"trace=1;route={ROUTE};x=2", True),
        (f"adapter=mine, route={ROUTE}", True),
        ("foo=bar", False),
        ("adapter=mine", False),
        (f"enroute={ROUTE}", False),
        ("route=v1", False),
        ("route=/invocations", False),
    ],
)
def test_an_invocation_takes_the_route_that_its_attributes_name(client, attributes, is_openai):
    body = {"prompt": "a"} if is_openai else {"caption": "a"}
    response = post(client, "/invocations", body, **{ATTRIBUTES: attributes})
    assert response.status_code == 200, response.json
    assert ("data" in response.json) is is_openai
    assert response.headers[ATTRIBUTES] == attributes


def test_errors_of_a_route_by_attributes_have_its_form(client):
    headers = {ATTRIBUTES: f"route={ROUTE}"}
    response = post(client, "/invocations", {"caption": "a"}, **headers)
    assert (response.status_code, response.json["error"]["param"]) == (400, "prompt")


def test_an_unknown_route_by_attributes_is_a_404_that_lists_the_known(client):
    response = post(client, "/invocations", {}, **{ATTRIBUTES: "route=/v1/audio/speech"})
    assert (response.status_code, response.json["error"]["code"]) == (404, "not_found")
    assert ROUTE in response.json["error"]["message"]


def test_attributes_decide_nothing_on_other_routes(client):
    response = post(client, ROUTE, {"prompt": "a"}, **{ATTRIBUTES: "route=/v1/models"})
    assert "data" in response.json
    assert client.get("/ping", headers={ATTRIBUTES: f"route={ROUTE}"}).json == {"status": "ready"}


def test_unknown_paths_and_methods_below_v1_are_errors_in_openais_form(client):
    for response, status in (
        (client.get("/v1/nothing"), 404),
        (client.get(ROUTE), 405),
        (client.post("/v1/models"), 405),
    ):
        assert response.status_code == status
        assert response.json["error"]["type"] == "invalid_request_error"


def test_the_model_is_listed_and_found_by_its_name(client):
    listed = client.get("/v1/models").json
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == [MODEL]
    assert client.get(f"/v1/models/{MODEL}").json == listed["data"][0]
    response = client.get("/v1/models/gpt-5")
    assert (response.status_code, response.json["error"]["code"]) == (404, "model_not_found")
    by_route = post(client, "/invocations", {}, **{ATTRIBUTES: "route=/v1/models"})
    assert by_route.json == listed


@pytest.mark.parametrize(
    ("finished_at", "created"),
    [
        ("2026-11-30T12:00:00+00:00", 1_796_040_000),
        ("2026-11-30T12:00:00Z", 1_796_040_000),
        ("", 0),
        ("yesterday", 0),
        ("2026-11-30T12:00:00", 0),  # without a zone
        ("0001-01-01T00:00:00", 0),
        ("0001-01-01T00:00:00+14:00", 0),
        ("9999-12-31T23:59:59-14:00", 253_402_351_199),
        ("1969-12-31T23:00:00+00:00", 0),
    ],
)
def test_a_model_was_created_when_it_is_known_to_have_been(client, engine, finished_at, created):
    component = ComponentCard(
        name="dvae", description="dVAE", parameters=1, sizes={}, finished_at=finished_at
    )
    engine.card = engine.card.model_copy(update={"components": [component]})
    response = client.get("/v1/models")
    assert response.status_code == 200, response.json
    assert response.json["data"][0]["created"] == created


def test_requests_of_openais_routes_are_counted_as_invocations(client):
    post(client, ROUTE, {"prompt": "a", "num_candidates": 2})
    text = client.get("/metrics").text
    assert 'dalle_invocations_total{status="200"} 1.0' in text
    assert "dalle_candidates_total 2.0" in text


def test_null_leaves_sampling_to_the_model_and_the_reply_says_what_was_used(client, engine):
    body = {"prompt": "a", "temperature": None, "top_p": 0.5}
    reply = post(client, ROUTE, body).json
    (request,) = engine.asked
    assert {"temperature", "top_p"} & request.model_fields_set == {"top_p"}
    assert {*reply["sampling"]} == {"temperature", "top_k", "top_p", "guidance_scale"}


def test_the_documents_defaults_are_those_of_the_model(client, engine):
    defaults = {"temperature": 0.7, "top_k": None, "top_p": 0.9, "guidance_scale": 2.0}
    engine.card = engine.card.model_copy(update={"sampling_defaults": defaults})
    schemas = client.get("/openapi.json").json["components"]["schemas"]
    for kind in ("GenerateRequest", "ImagesRequest", "EditRequest", "ChatRequest"):
        fields = schemas[kind]["properties"]
        assert {name: fields[name]["default"] for name in defaults} == defaults
    assert schemas["CompleteRequest"]["properties"]["temperature"]["default"] == 1.0
