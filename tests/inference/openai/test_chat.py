"""POST /v1/chat/completions: the last user message becomes pictures."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inference.openai.chat import without_history
from inference.openai.schema import MODEL
from inference.server.app import create_app
from tests.inference.openai.posting import events, post, streaming
from tests.inference.server.app_fixtures import ATTRIBUTES, SETTINGS

ROUTE = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "a"}]}
JSON_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def pixels_of(part: dict[str, Any]) -> np.ndarray:
    prefix, _, data = part["image_url"]["url"].partition(",")
    assert prefix == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_content_of_the_reply_is_the_best_picture(client, engine):
    engine.card = engine.card.model_copy(update={"image_size": 8, "grid_size": 4})
    body = ASKED | {"num_candidates": 3, "seed": 7, "temperature": 0.5, "top_p": 0.9}
    reply = post(client, ROUTE, body).json
    assert (reply["object"], reply["model"], reply["seed"]) == ("chat.completion", MODEL, 7)
    (choice,) = reply["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["message"]["role"] == "assistant"
    (part,) = choice["message"]["content"]
    assert (part["type"], part["candidate"], part["rank"]) == ("image_url", 2, 1)
    assert (pixels_of(part) == 2).all()
    assert reply["usage"]["completion_tokens"] == 16
    (request,) = engine.asked
    assert (request.temperature, request.top_p) == (0.5, 0.9)


def test_each_of_n_choices_has_a_picture(client):
    choices = post(client, ROUTE, ASKED | {"n": 2, "num_candidates": 3}).json["choices"]
    found = [[part["candidate"] for part in each["message"]["content"]] for each in choices]
    assert found == [[2], [1]]
    assert [each["index"] for each in choices] == [0, 1]


def test_n_choices_are_n_however_alike_their_pictures_are(client):
    asked = {"messages": [user("alike")], "n": 4, "num_candidates": 6}
    for fields, indices in (({}, [0, 1, 2, 3]), ({"distinct": True}, [0])):
        choices = post(client, ROUTE, asked | fields).json["choices"]
        assert [each["index"] for each in choices] == indices


def test_num_images_are_in_the_content_of_one_choice(client):
    (choice,) = post(client, ROUTE, ASKED | {"num_images": 2, "num_candidates": 3}).json["choices"]
    parts = choice["message"]["content"]
    assert [(part["index"], part["candidate"]) for part in parts] == [(0, 2), (1, 1)]


@pytest.mark.parametrize(
    ("messages", "caption"),
    [
        ([user("a")], "a"),
        ([{"role": "system", "content": "b"}, user("a")], "a"),
        ([user("b"), {"role": "assistant", "content": "c"}, user("a")], "a"),
        ([user("a"), {"role": "assistant", "content": [{"type": "image_url"}]}], "a"),
        ([user([{"type": "text", "text": "red"}, {"type": "text", "text": "star"}])], "red star"),
        ([user([{"type": "image_url"}]), user("a")], "a"),
    ],
)
def test_the_last_message_of_the_user_is_the_caption(client, engine, messages, caption):
    assert post(client, ROUTE, {"messages": messages}).status_code == 200
    assert engine.asked[0].caption == caption


def test_what_means_nothing_for_pictures_changes_none(client, engine):
    without_effect = {
        "model": "",
        "max_tokens": 100,
        "max_completion_tokens": 100,
        "stop": ["\n"],
        "response_format": {"type": "text", "strict": True},
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "store": False,
        "metadata": {"a": "b"},
        "modalities": ["text", "image"],
        "service_tier": "auto",
        "reasoning_effort": "low",
        "user": "somebody",
        "functions": None,
    }
    assert post(client, ROUTE, ASKED | without_effect).status_code == 200
    assert post(client, ROUTE, ASKED).status_code == 200
    assert engine.asked[0] == engine.asked[1]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "one whose role is user"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages", "whose role is user"),
        ({"messages": ["a"]}, "messages[0]", "must be a valid dictionary"),
        ({"messages": [user(None)]}, "messages", "must be a text or parts"),
        ({"messages": [user([])]}, "messages", "must be a text or parts"),
        ({"messages": [user([{"type": "text"}])]}, "messages", "has no text"),
        ({"messages": [user([{"type": "image_url"}])]}, "messages", "/v1/images/edits continues"),
        ({"messages": [user(" ")]}, "messages", "messages"),
        ({"messages": [user("endless")]}, "messages", "the model reads 8"),
        ({"n": 9}, "n", "n must be 1 to 8, got 9"),
        ({"num_images": 9}, "num_images", "num_images must be 1 to 8, got 9"),
        ({"num_images": 0}, "num_images", "num_images must be 1"),
        ({"n": 3, "num_candidates": 2}, "n", "n must be 1 to num_candidates"),
        ({"n": 2, "num_images": 2}, "n", "exclude each other"),
        ({"tools": [{"type": "function"}]}, "tools", "must be empty"),
        ({"response_format": {"type": "json_object"}}, "response_format", "'text'"),
        (JSON_SCHEMA, "response_format", "response_format must be 'text', got \"json_schema\""),
        ({"modalities": ["audio"]}, "modalities[0]", "'text' or 'image'"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "must be 0"),
        ({"logprobs": True}, "logprobs", "must be False"),
        ({"store": True}, "store", "must be False"),
        ({"temperature": 11}, "temperature", "0.0 to 10.0"),
        ({"audio": {"voice": "a"}}, "audio", "audio is unknown"),
        ({"size": "8x8"}, "size", "size is unknown"),
    ],
)
def test_a_refusal_names_the_field(client, engine, fields, param, says):
    response = post(client, ROUTE, ASKED | fields)
    error = response.json["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert says in error["message"]
    assert "did you mean response_format" not in error["message"]
    assert engine.asked == []


def test_a_stream_has_the_role_then_the_pictures_then_the_end(client):
    body = ASKED | {"n": 2, "num_candidates": 3, "stream": True}
    response = post(client, ROUTE, body | {"stream_options": {"include_usage": True}})
    assert response.content_type.startswith("text/event-stream")
    *chunks, usage, done = [data for _, data in events(response.data)]
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"]  # no grid here
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(each["index"], each["finish_reason"]) for each in choices] == [
        *((0, None), (0, None), (0, "stop")),
        *((1, None), (1, None), (1, "stop")),
    ]
    assert [choices[at]["delta"] for at in (0, 3)] == [{"role": "assistant"}] * 2
    assert [choices[at]["delta"]["content"][0]["candidate"] for at in (1, 4)] == [2, 1]


def test_every_choice_that_a_cut_short_stream_begins_is_finished(client):
    body = {"messages": [user("half")], "n": 3, "num_candidates": 3, "stream": True}
    *chunks, _ = [data for _, data in events(post(client, ROUTE, body).data)]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert {each["index"] for each in choices} == {0, 1}
    assert [each["index"] for each in choices if each["finish_reason"]] == [0, 1]


@pytest.mark.parametrize("counts", [{"n": 8}, {"num_images": 8}])
def test_a_stream_of_a_chat_sends_a_picture_before_it_makes_all(client, encoded, counts):
    body = ASKED | {"num_candidates": 8, "stream": True, **counts}
    parts = streaming(client, ROUTE, body)
    assert b"image_url" in next(part for part in parts if b"image_url" in part)
    assert len(encoded) <= 2
    assert sum(b"image_url" in part for part in parts) == 7
    assert len(encoded) == 8


@pytest.mark.parametrize("field", ["n", "num_images"])
def test_a_reply_that_could_be_too_large_is_refused_by_the_field_that_was_sent(
    engine_core, engine, field
):
    engine.image_size = 1024
    client = create_app(engine_core, SETTINGS).test_client()
    error = post(client, ROUTE, ASKED | {field: 8}).json["error"]
    assert (error["code"], error["param"]) == ("reply_too_large", field)
    assert error["message"].startswith(f"{field} must be at most 1 for")


def test_a_stream_without_the_option_has_no_usage(client):
    found = events(post(client, ROUTE, ASKED | {"stream": True}).data)
    assert all("usage" not in data for _, data in found[:-1])


def test_a_stream_that_breaks_off_ends_with_an_error(client):
    body = {"messages": [user("breaks")], "num_candidates": 2, "stream": True}
    *_, (_, data) = events(post(client, ROUTE, body).data)
    assert data["error"]["type"] == "server_error"
    assert "secret" not in json.dumps(data)


def test_chats_are_reached_by_an_invocations_attributes(client):
    response = post(client, "/invocations", ASKED, **{ATTRIBUTES: f"route={ROUTE}"})
    assert response.json["object"] == "chat.completion"


def test_what_is_no_chat_stays_so_without_its_history():
    for fields in ({}, {"messages": 3}, {"messages": [3]}, {"messages": []}, {"n": 2}):
        left = json.loads(without_history(json.dumps(fields).encode()))
        assert left == fields | ({"messages": []} if fields.get("messages") == [3] else {})


def test_of_a_history_the_last_message_of_the_user_is_left_without_its_pictures():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    text = {"type": "text", "text": "a"}
    messages = [user("b"), {"role": "assistant", "content": [image]}, user([text, image])]
    left = json.loads(without_history(json.dumps({"messages": messages, "n": 2}).encode()))
    assert left == {"messages": [user([text, {"type": "image_url"}])], "n": 2}
