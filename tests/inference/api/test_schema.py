"""Requests: what is accepted, what is refused, and the messages."""

import json
from typing import Any

import pytest

from dalle.errors import UserError
from inference.api.parsing import BodyKind, parse_request
from inference.api.schema import ClassifyRequest, CompleteRequest, GenerateRequest, Limits

LIMITS = Limits(max_candidates=8, max_images=4, max_request_bytes=10_000)


def parse(fields: object, limits: Limits = LIMITS) -> Any:
    return parse_request(json.dumps(fields).encode(), limits=limits)


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


def test_blanks_around_a_caption_do_not_count_but_around_a_class_they_stay():
    assert parse({"caption": " a red\tsquare\n"}).caption == "a red\tsquare"
    assert parse({"images": ["aGk="], "classes": [" a"]}).classes == [" a"]


def test_a_blank_text_is_no_caption():
    with pytest.raises(UserError, match="caption must have at least 1 character") as caught:
        parse_request(b" \n", BodyKind.TEXT)
    assert caught.value.status == 422


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("caption", "", 'must have at least 1 character, got ""'),
        ("caption", " \n", "must have at least 1 character"),
        ("caption", "a" * 2001, "must have at most 2000 characters"),
        ("caption", 7, "must be a valid string, got 7"),
        ("caption", "\ud800", "must be a valid string"),
        ("num_candidates", 9, "must be 1 to 8, got 9"),
        ("num_candidates", 0, "must be 1 to 8, got 0"),
        ("num_candidates", "4", 'must be a valid integer, got "4"'),
        ("num_candidates", True, "must be a valid integer, got true"),
        ("num_images", 0, "must be 1 to 4, got 0"),
        ("num_images", 5, "must be 1 to 4, got 5"),
        ("num_images", None, "must be a valid integer, got null"),
        ("temperature", -1, "must be 0.0 to 10.0, got -1"),
        ("top_k", 0, "must be 1 or more, got 0"),
        ("top_p", 0, "must be above 0.0 and at most 1.0, got 0"),
        ("seed", -1, "must be 0 to 9007199254740991, got -1"),
        ("format", "gif", "must be 'png', 'jpeg' or 'webp'"),
        ("deadline_seconds", 3601, "must be above 0.0 and at most 3600.0, got 3601"),
        ("prime_rows", 1, "1 without prime_image"),
        ("truncate", "yes", 'must be a valid boolean, got "yes"'),
        ("guidance", 3, "is unknown: did you mean guidance_scale?"),
        ("zzz", 3, "is unknown: known are caption, num_candidates"),
    ],
)
def test_a_field_that_is_wrong_is_a_422_that_says_what_would_be_right(field, value, says):
    check_refused({"caption": "a", field: value}, field, f"{field} {says}")


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({}, "caption", "caption, images or complete is missing: give one of"),
        ({"num_images": 1}, "caption", "is missing: give one of caption (generate images)"),
        ({"caption": "a", "complete": "b"}, "caption", "caption and complete exclude each other"),
        (
            {"caption": "a", "num_candidates": 2, "num_images": 3},
            "num_images",
            "num_images must be 1 to num_candidates, which is 2, got 3",
        ),
        ({"caption": "a", "prime_image": "aGk="}, "prime_rows", "prime_rows 0 with prime_image"),
        (
            {"images": ["aGk="], "classes": ["a", "\t "]},
            "classes[1]",
            'classes[1] must not be blank, got "\\t "',
        ),
        ({"images": ["aGk="]}, "classes", "classes is missing"),
        ({"images": [], "classes": ["a"]}, "images", "images must have 1 to 64 items, got 0"),
        ({"images": ["aGk="] * 65, "classes": ["a"]}, "images", "1 to 64 items, got 65"),
        ({"images": ["aGk=", 3], "classes": ["a"]}, "images[1]", "images[1] must be a valid str"),
        ({"images": ["aGk="], "classes": ["a"], "top": 0}, "top", "top must be 1 to 1000, got 0"),
        ({"complete": "a", "num_completions": 65}, "num_completions", "must be 1 to 64, got 65"),
    ],
)
def test_fields_that_do_not_fit_together_are_a_422(fields, field, says):
    check_refused(fields, field, says)


def check_refused(fields: object, field: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(fields)
    assert says in str(caught.value)
    assert (caught.value.status, caught.value.field) == (422, field)


def test_num_images_is_at_most_the_servers_limit_by_default():
    assert parse({"caption": "a"}, Limits(max_images=2)).num_images == 2


def test_defaults_that_depend_on_one_another_are_as_if_they_had_been_sent():
    request = GenerateRequest(caption="a", num_candidates=2)
    sent = {"caption": "a", "num_candidates": 2, "num_images": 2}
    assert request.model_dump(exclude_unset=True) == sent


@pytest.mark.parametrize("candidates", ["4", True, None, 0])
def test_a_wrong_num_candidates_is_the_only_fault(candidates):
    with pytest.raises(UserError) as caught:
        parse({"caption": "a", "num_candidates": candidates})
    assert str(caught.value).startswith("num_candidates must be")
    assert "num_images" not in str(caught.value)
