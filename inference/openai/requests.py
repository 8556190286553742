"""Bodies of OpenAI's clients to this project's own request: one way through the engine for both.

    body -> fields of OpenAI's API -> Call(fields, GenerateRequest)

Faults name the fields as OpenAI's API does. Knows nothing of torch or Flask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dalle.errors import UserError
from inference.api.parsing import JSON, body_kind, read_object, validate
from inference.api.schema import GenerateRequest, Limits
from inference.openai.schema import DEFAULTS, PASSED, ImagesRequest

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
ROUTES: Mapping[str, str] = {
    GENERATIONS: JSON,
    EDITS: "multipart/form-data",
    CHAT: JSON,
}
"""Routes of POST, and the media type of their bodies."""

MAX_JSON_BYTES = 1 << 18  # of a body without a history: no prompt and no settings need as many

# Our names for what OpenAI's API has names for, at the beginning of a message.
_OF_IMAGES = {
    "caption": "prompt",
    "num_images": "n",
    "format": "output_format",
    "preview_rows": "partial_images",
}
_NAMES: Mapping[str, Mapping[str, str]] = {
    GENERATIONS: _OF_IMAGES,
    EDITS: {**_OF_IMAGES, "prime_image": "image", "prime_rows": "mask"},
    CHAT: {"caption": "messages", "format": "output_format"},
}


@dataclass(frozen=True, slots=True)
class Call:
    """One request for pictures in OpenAI's form.

    fields: as they were sent, which the form of the reply depends on; request: what is generated.
    """

    fields: ImagesRequest
    request: GenerateRequest


def check_route(route: str, content_type: str | None) -> None:
    """Refuse a route of POST that there is not, and a Content-Type that it does not read.

    Raises `UserError` 404 or 415.
    """
    if route not in ROUTES:
        raise UserError(
            f"{route[:100]} is no route of this server: it has {', '.join((*ROUTES, MODELS))}",
            status=404,
            code="not_found",
        )
    wanted = ROUTES[route]
    name = (content_type or JSON).partition(";")[0].strip().lower()
    if name != wanted:
        raise UserError(
            f"{route} reads {wanted}, got Content-Type {name[:100]!r}",
            field="Content-Type",
            status=415,
            code="unsupported_media_type",
        )
    if wanted == JSON:
        body_kind(content_type)  # refuses a character set other than UTF-8


def read_generation(
    body: bytes, *, limits: Limits, image_size: int | None, grid_size: int | None
) -> Call:
    """Return the call in the body of POST /v1/images/generations.

    image_size: side of the model's pictures in pixels; grid_size: of the image-token grid. None
    where the model generates none, which the engine says.
    Raises `UserError`: 413 for a body over 262,144 bytes, 400 for one that is no JSON object, 422
    for faults of its fields.
    """
    if len(body) > MAX_JSON_BYTES:
        raise UserError(
            f"the body is larger than {MAX_JSON_BYTES:,} bytes, which no prompt needs; send images "
            "to /v1/images/edits",
            status=413,
            code="payload_too_large",
        )
    fields = read_object(body)
    own, passed = parted(fields, PASSED)
    images = validate(ImagesRequest, own, limits, image_size=image_size, also=PASSED)
    return images_call(images, passed, limits=limits, grid_size=grid_size)


def parted(
    fields: Mapping[str, Any], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields without those of the names, and those of the names that are not null."""
    own = {name: value for name, value in fields.items() if name not in names}
    passed = {name: fields[name] for name in names if fields.get(name) is not None}
    return own, passed


def images_call(
    images: ImagesRequest, passed: Mapping[str, Any], *, limits: Limits, grid_size: int | None
) -> Call:
    """Return the call that generates pictures.

    passed: fields of the project's own request. Raises `UserError` 422 for faults of them.
    """
    own = {
        "caption": images.prompt,
        "num_images": images.n,
        "format": images.output_format,
        "preview_rows": preview_rows(images.partial_images, grid_size),
    }
    fields = {**DEFAULTS, **enough(images.n, limits), **passed, **own}
    return Call(images, validate(GenerateRequest, fields, limits))


def enough(num_images: int, limits: Limits) -> dict[str, int]:
    """Return num_candidates where the default is lower than the number of pictures asked for."""
    default = min(GenerateRequest.model_fields["num_candidates"].default, limits.max_candidates)
    if default < num_images <= limits.max_candidates:
        return {"num_candidates": num_images}
    return {}


def preview_rows(partial_images: int, grid_size: int | None) -> int | None:
    """Return after how many rows a preview is made, so that there are `partial_images` at most."""
    if not partial_images or grid_size is None or grid_size < 2:
        return None
    return -(-grid_size // (partial_images + 1))


def in_their_words(message: str, field: str | None, route: str) -> tuple[str, str | None]:
    """Return a message and a field with OpenAI's names for what a route calls otherwise."""
    names = _NAMES.get(route, {})
    if not names or f"{field} is unknown" in message:  # our name, where theirs is known
        return message, field
    return renamed(message, names), names.get(field or "", field)


def renamed(message: str, names: Mapping[str, str]) -> str:
    """Return a message with other names of fields where they begin what is said of one."""
    ours = "|".join(names)
    return re.sub(rf"(^|; )({ours})(?= )", lambda found: found[1] + names[found[2]], message)
