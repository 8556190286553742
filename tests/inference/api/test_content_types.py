"""Media types: which bodies are read, and what an Accept header selects."""

import pytest

from dalle.errors import UserError
from inference.api.content_types import OFFERED_WITHOUT_IMAGE, Accept, BodyKind, body_kind


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
