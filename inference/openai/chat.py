"""Bodies of POST /v1/chat/completions: the last user message is the caption.

    body, reduced where its history is large -> ChatRequest -> ChatCall(fields, GenerateRequest)

Knows nothing of torch or Flask.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dalle.errors import UserError
from inference.api.parsing import read_object, validate
from inference.api.schema import GenerateRequest, Limits
from inference.openai.requests import MAX_JSON_BYTES, enough, parted, renamed
from inference.openai.schema import DEFAULTS, PASSED_BY_CHATS, ChatRequest


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One request of a chat. fields: as they were sent; request: what is generated."""

    fields: ChatRequest
    request: GenerateRequest


def read_chat(body: bytes, *, limits: Limits) -> ChatCall:
    """Return the call in the body of POST /v1/chat/completions.

    body: as `without_history` leaves it. Raises `UserError`: 413 for a body over 262,144 bytes, 400
    for one that is no JSON object, 422 for faults of its fields.
    """
    if len(body) > MAX_JSON_BYTES:
        raise UserError(
            f"the body has more than {MAX_JSON_BYTES:,} bytes without the messages before the last "
            "one of the user; send a shorter one",
            status=413,
            code="payload_too_large",
        )
    own, passed = parted(read_object(body), PASSED_BY_CHATS)
    chat = validate(ChatRequest, own, limits, also=PASSED_BY_CHATS)
    num_images = chat.n * chat.num_images
    request = {
        **DEFAULTS,
        **enough(num_images, limits),
        **passed,
        "caption": _caption(chat.messages),
        "num_images": num_images,
        "format": chat.output_format,
    }
    with naming_what_was_sent(chat):
        return ChatCall(chat, validate(GenerateRequest, request, limits))


@contextmanager
def naming_what_was_sent(chat: ChatRequest) -> Iterator[None]:
    """Name n in errors of `UserError` about num_images, unless it was num_images that was sent."""
    try:
        yield
    except UserError as error:
        if chat.num_images > 1:
            raise
        names = {"num_images": "n"}
        raise UserError(
            renamed(str(error), names),
            field=names.get(error.field or "", error.field),
            status=error.status,
            code=error.code,
        ) from error


def without_history(body: bytes) -> bytes:
    """Return a body with the last user message alone, less the images in it.

    Raises `UserError` 400 and 422 for a body that is no JSON object.
    """
    fields = read_object(body)
    messages = fields.get("messages")
    if isinstance(messages, list):
        last = _last_of_user([each for each in messages if isinstance(each, dict)])
        fields["messages"] = [] if last is None else [{"role": "user", "content": _cut(last)}]
    return json.dumps(fields).encode()


def _cut(message: Mapping[str, Any]) -> Any:
    """Return the content of a message without what is not text, of which the kind remains."""
    content = message.get("content")
    if not isinstance(content, list):
        return content
    return [
        part
        if not isinstance(part, dict) or part.get("type") == "text"
        else {"type": part.get("type")}
        for part in content
    ]


def _last_of_user(messages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((each for each in reversed(messages) if each.get("role") == "user"), None)


def _caption(messages: Sequence[Mapping[str, Any]]) -> str:
    message = _last_of_user(messages)
    if message is None:
        raise _wrong("messages must have one whose role is user: its content is the caption")
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _wrong("messages: the content of the last one of the user must be a text or parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _wrong(
                f"messages: the last one of the user has a part of type {str(kind)[:60]!r}; the "
                "model reads parts of type text, and /v1/images/edits continues an image"
            )
        if not isinstance(text := part.get("text"), str):
            raise _wrong("messages: a part of type text has no text")
        texts.append(text)
    return " ".join(texts)


def _wrong(message: str) -> UserError:
    return UserError(message, field="messages", status=422, code="invalid_request")
