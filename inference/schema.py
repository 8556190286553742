"""What may be asked of POST /invocations: the models, and bytes into them.

Knows nothing of torch, Flask or the platform, so that a laptop can build requests from it. The
OpenAPI document is generated from these models: a description here is documentation there.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Self

import annotated_types
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from dalle.errors import UserError
from inference.media import JSON, BodyKind, body_kind

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exactly
MAX_DEADLINE_SECONDS = 3600.0  # the longest that an asynchronous or batch invocation may take
MAX_CAPTION_CHARACTERS = 2_000
_MAX_DIGITS = 1_000  # of an integer; longer ones take Python a time to read that grows as a square


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server allows; `serve --help` names the variables that change it."""

    max_candidates: int = 64
    max_images: int = 16
    max_request_bytes: int = 25_000_000  # the platform's own limit for a real-time endpoint
    max_reply_bytes: int = 5_000_000  # below the 6 MB that older clients stop at
    deadline_seconds: float = 55.0  # when a request names none; a real-time call ends at 60


DEFAULT_LIMITS = Limits()


# A length makes pydantic look at the characters, so that half a surrogate pair, which JSON can
# carry and no tokenizer can read, is refused too.
Text = Annotated[str, Field(max_length=MAX_CAPTION_CHARACTERS)]
Caption = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_CAPTION_CHARACTERS),
]
# A class comes back as it was written, so it is not stripped; but it may not be blank either.
Class = Annotated[str, Field(min_length=1, max_length=MAX_CAPTION_CHARACTERS, pattern=r"\S")]
Format = Literal["png", "jpeg", "webp"]


class _Request(BaseModel):
    # strict: "3" is not 3 and true is not 1; what is asked is then exactly what is meant.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class GenerateRequest(_Request):
    """Draw candidates for a caption, rank them, and return the best."""

    caption: Caption = Field(
        description="What the pictures should show. 1 to 2,000 characters without the blanks "
        "around them, and no more text tokens than the model reads."
    )
    num_candidates: int = Field(
        default=16,
        ge=1,
        description="How many pictures are drawn for the caption before ranking. At least 1; the "
        "server's own limit is the maximum. Default 16, or the server's limit where it is lower.",
    )
    num_images: int = Field(
        default=4,
        ge=1,
        description="How many of the candidates are returned, best first. At least 1, at most "
        "num_candidates and the server's own limit; a stream sends all of them, an image reply "
        "the best one. Default 4, or num_candidates where that is fewer.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.0,
        le=10.0,
        description="Logits are divided by it; 0 always takes the likeliest token, so that all "
        "candidates are alike. 0 to 10.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Sample from the k likeliest image tokens only. At least 1; null: from all.",
    )
    top_p: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Sample from the smallest set of image tokens whose probabilities reach p. "
        "Above 0, at most 1; null: from all.",
    )
    guidance_scale: float = Field(
        default=1.0,
        ge=0.0,
        le=100.0,
        description="How far the picture is pushed towards the caption: "
        "unconditional + scale x (conditional - unconditional). 0 to 100; 1 is off and costs half.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Candidate k of a seed is always the same picture. 0 to 2**53 - 1; null: one "
        "is drawn, and the reply says which.",
    )
    format: Format = Field(
        default="png",
        description="File format of the pictures in the reply: png, jpeg or webp; an image type "
        "in Accept goes before it.",
    )
    prime_image: str | None = Field(
        default=None,
        min_length=1,
        description="A base64 image file whose top rows every candidate keeps; its centre square "
        "is used. Needs prime_rows. Null: none.",
    )
    prime_rows: int = Field(
        default=0,
        ge=0,
        description="How many rows of the image-token grid are kept from prime_image. 0 to one "
        "fewer than the grid has; above 0 it needs prime_image.",
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0.0,
        le=MAX_DEADLINE_SECONDS,
        description="Answer with the best so far after this time, counted from the request's "
        "arrival. Above 0, at most 3600; null: the server's default (55, for batch jobs 590).",
    )

    @field_validator("num_candidates", "num_images")
    @classmethod
    def _within_the_servers_limits(cls, value: int, info: ValidationInfo) -> int:
        if info.context is not None:
            limits: Limits = info.context["limits"]
            is_drawn = info.field_name == "num_candidates"
            limit = limits.max_candidates if is_drawn else limits.max_images
            if value > limit:
                raise PydanticCustomError("limit", "must be 1 to {limit}", {"limit": limit})
        return value

    @model_validator(mode="after")
    def _belongs_together(self, info: ValidationInfo) -> Self:
        if info.context is not None and "num_candidates" not in self.model_fields_set:
            limits: Limits = info.context["limits"]
            self._set_default(num_candidates=min(self.num_candidates, limits.max_candidates))
        if "num_images" not in self.model_fields_set:
            self._set_default(num_images=min(self.num_images, self.num_candidates))
        if self.num_images > self.num_candidates:
            raise PydanticCustomError(
                "num_images",
                "num_images must be 1 to num_candidates, which is {candidates}, got {images}",
                {"candidates": self.num_candidates, "images": self.num_images},
            )
        if (self.prime_image is None) != (self.prime_rows == 0):
            raise PydanticCustomError(
                "prime_rows",
                "prime_image and prime_rows go together: give both, prime_rows 1 or more, or "
                "neither; got prime_rows {rows} {with_or_without} prime_image",
                {
                    "rows": self.prime_rows,
                    "with_or_without": "without" if self.prime_image is None else "with",
                },
            )
        return self

    def _set_default(self, **values: int) -> None:
        """Fill defaults that depend on other fields, once, before anybody sees the request."""
        for name, value in values.items():
            self.__dict__[name] = value


class ClassifyRequest(_Request):
    """Say for each image which of the classes fit it best. The request of svpino/clip-container."""

    images: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1,
        max_length=64,
        description="Base64 image files, 1 to 64. Addresses are not fetched.",
    )
    classes: list[Class] = Field(
        min_length=1,
        max_length=1_000,
        description="Captions to choose from, 1 to 1,000, none blank, each compared "
        "exactly as written.",
    )
    top: int = Field(
        default=3,
        ge=1,
        le=1_000,
        description="How many classes are returned for each image, likeliest first; all of them "
        "when there are fewer. 1 to 1,000.",
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0.0,
        le=MAX_DEADLINE_SECONDS,
        description="Give up after this time, counted from the request's arrival. Above 0, at "
        "most 3600; null: the server's default.",
    )


class CompleteRequest(_Request):
    """Continue a caption as the transformer has learned captions to go on."""

    complete: Text = Field(
        description="The beginning of a caption; may be empty. 0 to 2,000 characters.",
    )
    num_completions: int = Field(
        default=4, ge=1, le=64, description="How many captions are drawn. 1 to 64."
    )
    temperature: float = Field(
        default=1.0, ge=0.0, le=10.0, description="As for pictures; 0 is the likeliest. 0 to 10."
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="The same seed gives the same captions. 0 to 2**53 - 1; null: one is drawn, "
        "and the reply says which.",
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0.0,
        le=MAX_DEADLINE_SECONDS,
        description="Give up after this time, counted from the request's arrival. Above 0, at "
        "most 3600; null: the server's default.",
    )


Request = GenerateRequest | ClassifyRequest | CompleteRequest

# Each kind of request is known by the one key that only it has.
REQUEST_KINDS: Mapping[str, type[Request]] = {
    "caption": GenerateRequest,
    "images": ClassifyRequest,
    "complete": CompleteRequest,
}


def parse_request(
    body: bytes, content_type: str | None = JSON, *, limits: Limits = DEFAULT_LIMITS
) -> Request:
    """One request from a JSON object or, as text/plain, from a bare caption.

    Raises `UserError`: 415 for another media type, 400 for what cannot be read, 422 for what can
    be read but not done; all faults of a body in one message. JSON lines go through
    `split_lines` first.
    """
    kind = body_kind(content_type)
    if len(body) > limits.max_request_bytes:
        raise too_large(limits)
    if kind is BodyKind.TEXT:
        return _validate(GenerateRequest, {"caption": _decode(body)}, limits)
    fields = _read_object(body)
    kinds = [key for key in REQUEST_KINDS if key in fields]
    if len(kinds) != 1:
        problem = (
            f"{' and '.join(kinds)} exclude each other"
            if kinds
            else "caption, images or complete is missing"
        )
        raise UserError(
            f"{problem}: give one of caption (draw pictures), images with classes (classify) "
            f"or complete (continue a caption), got keys {_as_json(sorted(fields))}",
            field=kinds[0] if kinds else "caption",
            status=422,
            code="invalid_request",
        )
    return _validate(REQUEST_KINDS[kinds[0]], fields, limits)


def split_lines(body: bytes) -> list[bytes]:
    """The lines of a JSON-lines body; an empty line in the middle is a line, one at the end not."""
    lines = body.removesuffix(b"\n").split(b"\n")
    if not body.strip():
        raise UserError("the body has no lines; send one JSON object a line", code="malformed_body")
    return lines


def decode_base64(text: str, *, field: str) -> bytes:
    """The bytes of a base64 value; line breaks and a `data:…;base64,` prefix are allowed.

    Raises `UserError` 400 that names the field.
    """
    if re.match(r"(https?|file|s3)://", text):
        raise UserError(
            f"{field} is an address, {_short(text)}; addresses are not fetched, send the image "
            "file itself in base64",
            field=field,
            code="bad_base64",
        )
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"{field} is not base64 ({error}), got {_short(text)}", field=field, code="bad_base64"
        ) from error


def too_large(limits: Limits) -> UserError:
    """The refusal of a body over the limit."""
    return UserError(
        f"the body is larger than {limits.max_request_bytes:,} bytes; send smaller images or fewer",
        status=413,
        code="payload_too_large",
    )


def _decode(body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}",
            code="malformed_body",
        ) from error


def _read_object(body: bytes) -> dict[str, Any]:
    text = _decode(body)
    try:
        fields = json.loads(text, parse_constant=_refuse_constant, parse_int=_read_integer)
    except RecursionError as error:
        raise UserError("the body is nested too deeply", code="malformed_body") from error
    except ValueError as error:
        raise UserError(
            f"the body is not JSON ({error}), got {_short(text)}", code="malformed_body"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(
            f"the body must be a JSON object, got {_short(text)}", code="malformed_body"
        )
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _read_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits is too long to be one")
    return int(digits)


def _validate(kind: type[Request], fields: dict[str, Any], limits: Limits) -> Request:
    try:
        return kind.model_validate(fields, context={"limits": limits})
    except ValidationError as error:
        details = error.errors(include_url=False)
        shown = [_explain(kind, detail, limits) for detail in details[:10]]
        if len(details) > len(shown):
            shown.append(f"and {len(details) - len(shown)} more")
        raise UserError(
            "; ".join(shown), field=_name(details[0]), status=422, code="invalid_request"
        ) from error


def _explain(kind: type[Request], detail: ErrorDetails, limits: Limits) -> str:
    """One pydantic error in our words: the thing, what would be right, the value it had."""
    name, code = _name(detail), detail["type"]
    if code == "missing":
        return f"{name} is missing"
    if code == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(kind.model_fields)}"
        return f"{name} is unknown: {hint}"
    if not detail["loc"]:  # from a model validator, whose message is whole
        return detail["msg"]
    wanted = detail["msg"].replace("Input should be", "must be")
    if code in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        wanted = f"must be {_range(name, kind.model_fields[str(detail['loc'][0])], limits)}"
    if code in ("too_short", "too_long"):
        low, high = _lengths(kind.model_fields[name])
        return f"{name} must have {low:,} to {high:,} items, got {len(detail['input']):,}"
    if code in ("string_too_short", "string_too_long"):
        wanted = wanted.replace("String should", "must")
    if code == "string_pattern_mismatch":
        wanted = "must not be blank"
    return f"{name} {wanted}, got {_as_json(detail['input'])}"


def _name(detail: ErrorDetails) -> str:
    """`images[2]` of a location; a model validator's errors carry the field's name as type."""
    first, *rest = detail["loc"] or (detail["type"],)
    return str(first) + "".join(f"[{part}]" for part in rest if isinstance(part, int))


def _lengths(field: FieldInfo) -> tuple[int, int]:
    """How many items a list may have."""
    low = high = 0
    for bound in field.metadata:
        if isinstance(bound, annotated_types.MinLen):
            low = bound.min_length
        elif isinstance(bound, annotated_types.MaxLen):
            high = bound.max_length
    return low, high


def _range(name: str, field: FieldInfo, limits: Limits) -> str:
    lower = ""
    servers = {"num_candidates": limits.max_candidates, "num_images": limits.max_images}
    upper = str(servers.get(name, ""))
    for bound in field.metadata:
        if isinstance(bound, annotated_types.Ge):
            lower = f"{bound.ge}"
        elif isinstance(bound, annotated_types.Gt):
            lower = f"above {bound.gt}"
        elif isinstance(bound, annotated_types.Le):
            upper = f"{bound.le}"
    if not upper:
        return f"{lower} or more"
    return f"{lower} and at most {upper}" if lower.startswith("above") else f"{lower} to {upper}"


def _as_json(value: object) -> str:
    """A value as the request wrote it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    # Half a surrogate pair could not be sent back.
    return _cut(text.encode("utf-8", "backslashreplace").decode())


def _short(text: str) -> str:
    return _cut(repr(text))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"
