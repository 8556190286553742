"""Captions and pictures are in no log above DEBUG, whatever becomes of their requests."""

import base64
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from inference.engine.error_log import log_unexpected
from tests.inference.server.app_fixtures import post

SECRET = "quetzalcoatl"
PICTURE = base64.b64encode(bytes(range(256)) * 2).decode()
STREAM = {"Accept": "application/jsonlines"}


@pytest.fixture
def logged(caplog) -> Callable[[int], str]:
    """A function: the lowest level -> what all loggers said so far, with tracebacks."""
    for name in ("", *logging.root.manager.loggerDict):
        caplog.set_level(logging.DEBUG, logger=name or None)

    def read(lowest: int) -> str:
        records = [record for record in caplog.records if record.levelno >= lowest]
        return "\n".join(map(logging.Formatter("%(name)s %(message)s").format, records))

    return read


BODIES: dict[str, object] = {
    "answered": {"caption": f"a {SECRET}"},
    "primed": {"caption": f"a {SECRET}", "prime_image": PICTURE, "prime_rows": 1},
    "classified": {"images": [PICTURE], "classes": [f"a {SECRET}"]},
    "completed": {"complete": f"a {SECRET}"},
    "late": {"caption": f"a {SECRET}", "deadline_seconds": 1e-9},
    "of a wrong value": {"caption": f"a {SECRET}", "num_candidates": 0},
    "of an unknown field": {"caption": "a", SECRET: SECRET},
    "of an unknown item": {"images": [PICTURE, 3], "classes": [f"a {SECRET}"]},
    "of a picture that is none": {"images": ["####"], "classes": [SECRET]},
    "too long": {"caption": SECRET * 200},
    "no JSON": f'{{"caption": "a {SECRET}'.encode(),
    "no object": f'"{SECRET}"'.encode(),
    "not UTF-8": f'{{"caption": "a {SECRET}\xff"'.encode("latin-1"),
    "failing": {"caption": f"quote {SECRET}"},
}


@pytest.mark.parametrize("headers", [{}, STREAM, {"Content_Type": "application/jsonlines"}])
@pytest.mark.parametrize("name", BODIES)
def test_no_log_has_a_caption_or_a_picture(client, logged, name, headers):
    response = post(client, BODIES[name], **headers)
    assert response.status_code in (200, 400, 422, 500, 504)
    assert "invocation_status=" in logged(logging.INFO), "the log itself is seen"
    assert SECRET not in logged(logging.INFO)
    assert PICTURE[:24] not in logged(logging.INFO)


OPENAI: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {"prompt": f"a {SECRET}"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": f"a {SECRET}"}]},
}


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": SECRET}, {SECRET: SECRET}])
@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize("kind", ["a", "quote"])
def test_no_log_has_a_caption_of_openais_clients(client, logged, path, more, kind):
    body = json.loads(json.dumps(OPENAI[path] | more).replace(f"a {SECRET}", f"{kind} {SECRET}"))
    client.post(path, json=body, buffered=True)
    client.post(f"/v1/models/{SECRET}")
    assert "invocation_status=" in logged(logging.INFO), "the log itself is seen"
    assert SECRET not in logged(logging.INFO)


def test_an_error_that_quotes_a_caption_keeps_its_kind_its_traceback_and_its_cause(client, logged):
    assert post(client, {"caption": f"quote {SECRET}"}).status_code == 500
    told = logged(logging.ERROR)
    assert "LookupError; its message is logged at DEBUG" in told
    assert "KeyError; its message" in told
    assert "in run\n" in told
    assert SECRET in logged(logging.DEBUG)


def test_an_error_that_quotes_no_caption_keeps_its_message(client, logged):
    assert post(client, {"caption": "bug"}).status_code == 500
    assert "ZeroDivisionError: secret detail" in logged(logging.ERROR)


@pytest.mark.parametrize(
    ("message", "texts", "is_shown"),
    [
        ("no kernel for this device", ["a red square"], True),
        ("no kernel for this device", ["a kernel"], False),
        ("no token for 'A CAT'", ["the cat"], False),
        ("'red'", ["big red cat"], False),
        ("no token of it", ["of it or no"], True),
        ("no id for 红色", ["红色的星星"], False),
        ("no token for 'a cat'", ["a cat"], False),
        ("no kernel for this device", [], True),
        ("no kernel for this device", None, False),
    ],
)
def test_a_message_is_shown_where_it_has_no_word_of_a_text(logged, message, texts, is_shown):
    error: Any = ValueError(message)
    log_unexpected(logging.getLogger("x"), "it failed", error, texts)
    assert (message in logged(logging.ERROR)) == is_shown
    assert message in logged(logging.DEBUG)
