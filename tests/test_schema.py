"""Requests: what is accepted, what is refused and how it is told; media types; the OpenAPI text."""

import base64
import json
from typing import Any

import pytest

from dalle.errors import UserError
from inference import openapi
from inference.media import BodyKind, body_kind, negotiate
from inference.schema import (
    ClassifyRequest,
    CompleteRequest,
    GenerateRequest,
    Limits,
    decode_base64,
    parse_request,
    split_lines,
)

LIMITS = Limits(max_candidates=8, max_images=4, max_request_bytes=10_000)


def parse(fields: object, limits: Limits = LIMITS) -> Any:
    return parse_request(json.dumps(fields).encode(), "application/json", limits=limits)


def test_a_caption_is_enough_for_a_request():
    request = parse({"caption": "a red square"})
    assert isinstance(request, GenerateRequest)
    assert request.caption == "a red square"
    assert request.num_candidates == 8, "the default is cut to the server's limit"
    assert request.num_images == 4
    assert (request.temperature, request.guidance_scale, request.seed) == (1.0, 1.0, None)


def test_num_images_is_at_most_num_candidates_by_default():
    assert parse({"caption": "a", "num_candidates": 1}).num_images == 1


def test_a_request_may_give_every_field():
    request = parse(
        {
            "caption": "big filled orange star",
            "num_candidates": 32,
            "num_images": 4,
            "temperature": 1.0,
            "top_k": None,
            "top_p": None,
            "guidance_scale": 1.0,
            "seed": 7,
            "format": "png",
            "prime_image": None,
            "prime_rows": 0,
            "deadline_seconds": 55,
        },
        Limits(),
    )
    assert (request.num_candidates, request.seed, request.deadline_seconds) == (32, 7, 55)


def test_images_with_classes_are_classified():
    request = parse({"images": ["aGk="], "classes": ["a", "b"], "top": 2})
    assert isinstance(request, ClassifyRequest)
    assert request.top == 2


def test_the_beginning_of_a_caption_is_completed():
    request = parse({"complete": "big filled"})
    assert isinstance(request, CompleteRequest)
    assert request.num_completions == 4


def test_plain_text_is_the_caption():
    request = parse_request("zwei Würfel\n".encode(), "text/plain; charset=utf-8")
    assert isinstance(request, GenerateRequest)
    assert request.caption == "zwei Würfel"


def test_blanks_around_a_caption_do_not_count_but_around_a_class_they_stay():
    assert parse({"caption": " a red\tsquare\n"}).caption == "a red\tsquare"
    assert parse({"images": ["aGk="], "classes": [" a"]}).classes == [" a"]


def test_a_blank_text_is_no_caption():
    with pytest.raises(UserError, match="caption must have at least 1 character") as caught:
        parse_request(b" \n", "text/plain")
    assert caught.value.status == 422


def test_a_number_too_long_to_be_read_is_told_without_pythons_advice():
    with pytest.raises(UserError, match="a number of 5,000 digits is too long") as caught:
        parse_request(b'{"caption": "a", "seed": ' + b"1" * 5_000 + b"}")
    assert caught.value.code == "malformed_body"
    assert "sys." not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_body():
    body = b'\xef\xbb\xbf{"caption": "a"}'
    assert parse_request(body, "application/json") == parse({"caption": "a"}, Limits())


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({}, "caption", "caption, images or complete is missing: give one of"),
        ({"num_images": 1}, "caption", "is missing: give one of caption (draw pictures)"),
        ({"caption": "a", "complete": "b"}, "caption", "caption and complete exclude each other"),
        ({"caption": ""}, "caption", 'caption must have at least 1 character, got ""'),
        ({"caption": " \n"}, "caption", "caption must have at least 1 character"),
        (
            {"images": ["aGk="], "classes": ["a", "\t "]},
            "classes[1]",
            'classes[1] must not be blank, got "\\t "',
        ),
        ({"caption": "a" * 2001}, "caption", "caption must have at most 2000 characters"),
        ({"caption": 7}, "caption", "caption must be a valid string, got 7"),
        ({"caption": "\ud800"}, "caption", "caption must be a valid string"),
        (
            {"caption": "a", "num_candidates": 9},
            "num_candidates",
            "num_candidates must be 1 to 8, got 9",
        ),
        (
            {"caption": "a", "num_candidates": 0},
            "num_candidates",
            "num_candidates must be 1 to 8, got 0",
        ),
        ({"caption": "a", "num_images": 0}, "num_images", "num_images must be 1 to 4, got 0"),
        ({"caption": "a", "num_images": None}, "num_images", "valid integer, got null"),
        (
            {"caption": "a", "num_candidates": "4"},
            "num_candidates",
            'num_candidates must be a valid integer, got "4"',
        ),
        (
            {"caption": "a", "num_candidates": True},
            "num_candidates",
            "num_candidates must be a valid integer, got true",
        ),
        ({"caption": "a", "num_images": 5}, "num_images", "num_images must be 1 to 4, got 5"),
        (
            {"caption": "a", "num_candidates": 2, "num_images": 3},
            "num_images",
            "num_images must be 1 to num_candidates, which is 2, got 3",
        ),
        (
            {"caption": "a", "temperature": -1},
            "temperature",
            "temperature must be 0.0 to 10.0, got -1",
        ),
        ({"caption": "a", "top_k": 0}, "top_k", "top_k must be 1 or more, got 0"),
        ({"caption": "a", "top_p": 0}, "top_p", "top_p must be above 0.0 and at most 1.0, got 0"),
        ({"caption": "a", "seed": -1}, "seed", "seed must be 0 to 9007199254740991, got -1"),
        ({"caption": "a", "format": "gif"}, "format", "format must be 'png', 'jpeg' or 'webp'"),
        (
            {"caption": "a", "deadline_seconds": 3601},
            "deadline_seconds",
            "deadline_seconds must be above 0.0 and at most 3600.0, got 3601",
        ),
        ({"caption": "a", "prime_rows": 1}, "prime_rows", "prime_rows 1 without prime_image"),
        ({"caption": "a", "prime_image": "aGk="}, "prime_rows", "prime_rows 0 with prime_image"),
        (
            {"caption": "a", "guidance": 3},
            "guidance",
            "guidance is unknown: did you mean guidance_scale?",
        ),
        ({"caption": "a", "zzz": 3}, "zzz", "zzz is unknown: known are caption, num_candidates"),
        ({"images": ["aGk="]}, "classes", "classes is missing"),
        ({"images": [], "classes": ["a"]}, "images", "images must have 1 to 64 items, got 0"),
        ({"images": ["aGk="] * 65, "classes": ["a"]}, "images", "1 to 64 items, got 65"),
        ({"images": ["aGk=", 3], "classes": ["a"]}, "images[1]", "images[1] must be a valid str"),
        ({"images": ["aGk="], "classes": ["a"], "top": 0}, "top", "top must be 1 to 1000, got 0"),
        (
            {"complete": "a", "num_completions": 65},
            "num_completions",
            "num_completions must be 1 to 64, got 65",
        ),
    ],
)
def test_a_field_that_is_wrong_is_a_422_that_says_what_would_be_right(fields, field, says):
    with pytest.raises(UserError) as caught:
        parse(fields)
    assert says in str(caught.value)
    assert (caught.value.status, caught.value.field) == (422, field)


def test_all_faults_are_told_at_once():
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
        parse_request(body, "application/json", limits=LIMITS)
    assert says in str(caught.value)
    assert (caught.value.status, caught.value.code) == (400, "malformed_body")


def test_a_body_over_the_limit_is_a_413():
    with pytest.raises(UserError, match="larger than 10,000 bytes") as caught:
        parse({"caption": "a", "prime_image": "a" * 10_000})
    assert caught.value.status == 413


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
def test_accept_chooses_what_is_wished_most(accept, chosen):
    assert negotiate(accept) == chosen


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "image", "*/*;q=2", "a/"])
def test_an_accept_that_admits_nothing_is_a_406(accept):
    with pytest.raises(UserError) as caught:
        negotiate(accept)
    assert (caught.value.status, caught.value.field) == (406, "Accept")


def test_every_line_counts_but_the_end_of_the_last():
    assert split_lines(b"a\nb\n") == [b"a", b"b"]
    assert split_lines(b"a\n\nb") == [b"a", b"", b"b"]


def test_a_body_without_lines_is_refused():
    with pytest.raises(UserError, match="has no lines"):
        split_lines(b" \n\n")


def test_base64_may_be_wrapped_or_a_data_address():
    text = base64.b64encode(b"hello" * 30).decode()
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    assert decode_base64(wrapped, field="x") == b"hello" * 30
    assert decode_base64(f"data:image/png;base64,{text}", field="x") == b"hello" * 30


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


def test_every_field_in_the_openapi_document_is_described():
    for name, schema in openapi.document(LIMITS)["components"]["schemas"].items():
        assert schema.get("description"), name
        for field, properties in schema.get("properties", {}).items():
            assert properties.get("description"), f"{name}.{field}"


def test_the_openapi_document_states_this_servers_limits():
    document = openapi.document(LIMITS)
    drawing = document["components"]["schemas"]["GenerateRequest"]["properties"]
    assert document["openapi"] == "3.1.0"
    assert (drawing["num_candidates"]["maximum"], drawing["num_images"]["maximum"]) == (8, 4)
    assert drawing["top_p"]["anyOf"][0] == {
        "type": "number",
        "exclusiveMinimum": 0.0,
        "maximum": 1.0,
    }


def test_every_reference_in_the_openapi_document_leads_somewhere():
    document = openapi.document(LIMITS)

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            inner = [each for value in node.values() for each in references(value)]
            return [*inner, node["$ref"]] if "$ref" in node else inner
        return (
            [each for value in node for each in references(value)] if isinstance(node, list) else []
        )

    found = references(document)
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]
