"""Bodies to requests, or to errors that name the remedy."""

import base64
import json
from typing import Any

import pytest

from dalle.errors import UserError
from inference.api import parsing
from inference.api.parsing import (
    OFFERED_WITHOUT_IMAGE,
    Accept,
    BodyKind,
    body_kind,
    decode_base64,
    parse_request,
    split_lines,
)
from inference.api.schema import GenerateRequest, Limits

LIMITS = Limits(max_candidates=8, max_images=4, max_request_bytes=10_000)


def parse(fields: object, limits: Limits = LIMITS) -> Any:
    return parse_request(json.dumps(fields).encode(), limits=limits)


def test_plain_text_is_the_caption():
    request = parse_request("zwei Würfel\n".encode(), BodyKind.TEXT)
    assert isinstance(request, GenerateRequest)
    assert request.caption == "zwei Würfel"


def test_a_number_of_too_many_digits_is_refused_without_pythons_advice():
    with pytest.raises(UserError, match="a number of 5,000 digits is too long") as caught:
        parse_request(b'{"caption": "a", "seed": ' + b"1" * 5_000 + b"}")
    assert caught.value.code == "malformed_body"
    assert "sys." not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_body():
    body = b'\xef\xbb\xbf{"caption": "a"}'
    assert parse_request(body) == parse({"caption": "a"}, Limits())


def test_all_faults_are_in_one_message():
    with pytest.raises(UserError) as caught:
        parse({"caption": "a", "temperature": -1, "top_k": 0, "colour": 1})
    assert all(name in str(caught.value) for name in ("temperature", "top_k", "colour"))


def test_a_long_value_is_not_repeated_whole():
    with pytest.raises(UserError) as caught:
        parse({"caption": "a", "format": "x" * 5000})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"[1]", "the body must be a JSON object, got '[1]'"),
        (b'"a"', "the body must be a JSON object"),
        (b'{"caption": "\xff"}', "the body is not UTF-8: byte 13 is 0xff"),
        (b'{"caption": "a", "temperature": NaN}', "NaN is not a JSON number"),
        (b"[" * 9_000, "the body is nested too deeply"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_400(body, says):
    with pytest.raises(UserError) as caught:
        parse_request(body, limits=LIMITS)
    assert says in str(caught.value)
    assert (caught.value.status, caught.value.code) == (400, "malformed_body")


@pytest.mark.parametrize(
    "caption", ["\u200b", "\ufeff\u2060", "\x07", "\u3164 \u2800", "a\0b", "a star\0", "\0"]
)
def test_a_caption_that_cannot_be_seen_or_holds_nul_is_refused_by_its_field(caption):
    image = base64.b64encode(b"x").decode()
    for body, field in (
        ({"caption": caption}, "caption"),
        ({"images": [image], "classes": ["a", caption]}, "classes[1]"),
    ):
        with pytest.raises(UserError, match=r"must hold (no NUL|a character)") as caught:
            parse(body)
        assert (caught.value.status, caught.value.field) == (422, field)


def test_a_bare_caption_in_utf16_is_refused():
    with pytest.raises(UserError, match="NUL"):
        parse_request("a star".encode("utf-16-le"), BodyKind.TEXT, limits=LIMITS)


def test_the_beginning_of_a_caption_may_be_empty_but_holds_no_nul():
    assert parse({"complete": ""}).complete == ""
    with pytest.raises(UserError, match="complete must hold no NUL"):
        parse({"complete": "a\0"})


def test_a_body_over_the_limit_is_a_413():
    with pytest.raises(UserError, match="larger than 10,000 bytes") as caught:
        parse({"caption": "a", "prime_image": "a" * 10_000})
    assert caught.value.status == 413


def test_every_line_counts_but_the_end_of_the_last():
    assert split_lines(b"a\nb\n") == [b"a", b"b"]
    assert split_lines(b"a\n\nb") == [b"a", b"", b"b"]


def test_a_body_without_lines_is_refused():
    with pytest.raises(UserError, match="has no lines"):
        split_lines(b" \n\n")


def test_base64_may_be_wrapped_or_a_data_url():
    text = base64.b64encode(b"hello" * 30).decode()
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    assert decode_base64(wrapped, field="x") == b"hello" * 30
    assert decode_base64(f"data:image/png;base64,{text}", field="x") == b"hello" * 30


@pytest.mark.parametrize("size", [0, 1, 5, 6, 7, 11, 12, 13])
def test_base64_longer_than_a_piece_is_decoded_whole(monkeypatch, size):
    monkeypatch.setattr(parsing, "_PIECE_CHARACTERS", 8)
    data = bytes(range(size))
    text = base64.b64encode(data).decode()
    assert decode_base64(text, field="x") == data
    assert decode_base64("\n".join(text), field="x") == data


@pytest.mark.parametrize("text", ["AAAAAA==AAAA", "AAAAAAA=AAAAAAA=", "AAAAAAAAA", "AAAAAAAA="])
def test_base64_that_ends_in_its_middle_is_refused(monkeypatch, text):
    monkeypatch.setattr(parsing, "_PIECE_CHARACTERS", 8)
    with pytest.raises(UserError, match="is not base64"):
        decode_base64(text, field="x")


@pytest.mark.parametrize(
    ("text", "says"),
    [("a", "is not base64"), ("!!!!", "is not base64"), ("https://x/y.png", "not fetched")],
)
def test_what_is_not_base64_names_its_field(text, says):
    with pytest.raises(UserError, match=says) as caught:
        decode_base64(text, field="images[1]")
    assert (caught.value.status, caught.value.field) == (400, "images[1]")


def test_a_request_survives_its_own_json():
    request = GenerateRequest(caption="a", seed=3, num_candidates=2)
    assert parse_request(request.model_dump_json().encode()) == request


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        (None, BodyKind.JSON),
        ("", BodyKind.JSON),
        ("application/json", BodyKind.JSON),
        ("Application/JSON; charset=UTF-8", BodyKind.JSON),
        ("text/plain", BodyKind.TEXT),
        ("application/jsonlines", BodyKind.JSON_LINES),
        ("application/json-lines", BodyKind.JSON_LINES),
        ("application/x-jsonlines", BodyKind.JSON_LINES),
        ("application/x-ndjson", BodyKind.JSON_LINES),
    ],
)
def test_content_types_and_their_aliases_are_known(content_type, kind):
    assert body_kind(content_type) is kind


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "application/x-www-form-urlencoded", "application/json; charset=latin-1"],
)
def test_another_content_type_is_a_415(content_type):
    with pytest.raises(UserError) as caught:
        body_kind(content_type)
    assert (caught.value.status, caught.value.field) == (415, "Content-Type")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "application/json"),
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("image/*", "image/png"),
        ("image/webp", "image/webp"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("image/png;q=0.5, image/jpeg", "image/jpeg"),
        ("image/png, application/json;q=0.9", "image/png"),
        ("image/png;q=0.2, */*;q=0.1", "image/png"),
        ("image/*, image/png;q=0", "image/jpeg"),
        ("text/html, */*;q=0.1", "application/json"),
        ("IMAGE/PNG", "image/png"),
    ],
)
def test_the_greatest_weight_wins(accept, chosen):
    assert Accept.parse(accept).best() == chosen


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image", "*/*;q=2", "a/"])
def test_an_accept_that_admits_nothing_is_a_406(accept):
    with pytest.raises(UserError) as caught:
        Accept.parse(accept).best()
    assert (caught.value.status, caught.value.field) == (406, "Accept")


def test_a_type_that_is_not_offered_leaves_the_next_one():
    accept = "image/png, application/x-ndjson;q=0.2, application/json;q=0.7"
    assert Accept.parse(accept).best() == "image/png"
    assert Accept.parse(accept).best(OFFERED_WITHOUT_IMAGE) == "application/json"


def test_a_refusal_names_each_offered_type_once():
    with pytest.raises(UserError) as caught:
        Accept.parse("image/png").best(OFFERED_WITHOUT_IMAGE, what="a line")
    assert str(caught.value) == (
        "Accept 'image/png' admits no type that a line is answered in: "
        "application/json, application/jsonlines"
    )


@pytest.mark.parametrize("name", ["n" * 20_000, "\ud800" * 20_000, "\n" * 20_000])
@pytest.mark.parametrize("fields", [{"caption": "a"}, {}])
def test_a_long_unknown_field_is_shortened_in_the_message(name, fields):
    with pytest.raises(UserError) as caught:
        parse_request(json.dumps({**fields, name: 1}).encode())
    assert len(str(caught.value)) < 1_000
    assert len(caught.value.field or "") < 100
    str(caught.value).encode()
