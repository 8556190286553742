"""What a client sends: Content-Type, Accept and body, to a request or to an error that helps.

Messages name the field, its value and the remedy. Knows nothing of torch, Flask or the platform.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dalle.errors import UserError
from inference.api.schema import DEFAULT_LIMITS, REQUEST_KINDS, GenerateRequest, Limits, Request

JSON = "application/json"
JSON_LINES = "application/jsonlines"
# The first is the platform's name; the others are in use among its clients.
JSON_LINES_NAMES = (
    JSON_LINES,
    "application/json-lines",
    "application/x-jsonlines",
    "application/jsonl",
    "application/x-ndjson",
)
TEXT = "text/plain"
IMAGES = ("image/png", "image/jpeg", "image/webp")

# In order of preference, which decides between equal weights.
OFFERED_WITHOUT_IMAGE = (JSON, *JSON_LINES_NAMES)
OFFERED = (*OFFERED_WITHOUT_IMAGE, *IMAGES)

_PIECE_CHARACTERS = 2**18  # of base64 decoded at once, in about a millisecond; a multiple of 4
MAX_LINES = 10_000  # of a JSON-lines body
_MAX_KEYS = 64  # of an object; no request has so many
_MAX_DIGITS = 1_000  # of an integer; Python's time to read one grows with the square of its length

Model = TypeVar("Model", bound=BaseModel)


class BodyKind(StrEnum):
    """How the body of a request is read."""

    JSON = "json"
    JSON_LINES = "json lines"
    TEXT = "text"


def body_kind(content_type: str | None) -> BodyKind:
    """Return how to read a body of this Content-Type; without one it is JSON.

    Raises `UserError` 415 for another type and for a character set other than UTF-8.
    """
    name, *parameters = [part.strip() for part in (content_type or JSON).lower().split(";")]
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        charset = value.strip().strip('"')
        if key.strip() == "charset" and charset not in ("utf-8", "utf8", "us-ascii", "ascii"):
            raise _unsupported(f"charset {charset!r} is not read; send UTF-8")
    if name == JSON:
        return BodyKind.JSON
    if name in JSON_LINES_NAMES:
        return BodyKind.JSON_LINES
    if name == TEXT:
        return BodyKind.TEXT
    raise _unsupported(f"Content-Type {name!r} is not read; send {JSON}, {JSON_LINES} or {TEXT}")


@dataclass(frozen=True, slots=True)
class Accept:
    """A parsed Accept header (RFC 9110, section 12.5.1).

    header: as it was sent, for messages; weights: 0 to 1 of each media range, such as `image/*`.
    """

    header: str
    weights: Mapping[str, float]

    @classmethod
    def parse(cls, header: str | None) -> Accept:
        """Read a header; a missing or empty one accepts everything.

        Raises `UserError` 406 for an element that is not a media range.
        """
        weights: dict[str, float] = {}
        for element in (header or "").split(","):
            if element.strip():
                name, weight = _parse_range(element)
                weights[name] = max(weight, weights.get(name, 0.0))
        return cls(header or "", weights or {"*/*": 1.0})

    def best(self, offered: Sequence[str] = OFFERED, *, what: str = "a request") -> str:
        """Return the media type of `offered` with the greatest weight, the first of equal ones.

        what: the kind of request that is answered, for the message.
        Raises `UserError` 406 when none is acceptable.
        """
        best = max(offered, key=self._weight)
        if self._weight(best) > 0:
            return best
        names = [name for name in offered if name not in JSON_LINES_NAMES[1:]]
        raise _not_acceptable(
            f"Accept {self.header[:200]!r} admits no type that {what} is answered in: "
            f"{', '.join(names)}"
        )

    def _weight(self, media_type: str) -> float:
        """The most specific range that covers a type decides, so that q=0 can exclude one."""
        ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
        return next((self.weights[each] for each in ranges if each in self.weights), 0.0)


def _parse_range(element: str) -> tuple[str, float]:
    """Return name and weight of one element of an Accept header, such as `image/*;q=0.5`."""
    name, *parameters = [part.strip().lower() for part in element.split(";")]
    if name == "*":  # not in the standard, but old clients send it
        name = "*/*"
    weight = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                weight = float(value)
            except ValueError:
                weight = -1.0
    main, _, sub = name.partition("/")
    if not (main and sub and 0.0 <= weight <= 1.0):
        raise _not_acceptable(
            f"Accept has {element.strip()[:100]!r}, which is not a media range such as "
            "'image/*;q=0.5'"
        )
    return name, weight


def _unsupported(message: str) -> UserError:
    return UserError(message, field="Content-Type", status=415, code="unsupported_media_type")


def _not_acceptable(message: str) -> UserError:
    return UserError(message, field="Accept", status=406, code="not_acceptable")


def parse_request(
    body: bytes, kind: BodyKind = BodyKind.JSON, *, limits: Limits = DEFAULT_LIMITS
) -> Request:
    """Return the request in a JSON object or, for `BodyKind.TEXT`, in a bare caption.

    Raises `UserError`: 413 for a body over the limit, 400 for one that cannot be read, 422 for one
    that can be read but not done, with all faults in one message. `split_lines` parts JSON lines.
    """
    if len(body) > limits.max_request_bytes:
        raise too_large(limits)
    if kind is BodyKind.TEXT:
        return validate(GenerateRequest, {"caption": _decode(body)}, limits)
    fields = read_object(body)
    kinds = [key for key in REQUEST_KINDS if key in fields]
    if len(kinds) != 1:
        problem = (
            f"{' and '.join(kinds)} exclude each other"
            if kinds
            else "caption, images or complete is missing"
        )
        raise UserError(
            f"{problem}: give one of caption (generate images), images with classes (classify) "
            f"or complete (continue a caption), got keys {_as_json(sorted(fields))}",
            field=kinds[0] if kinds else "caption",
            status=422,
            code="invalid_request",
        )
    return validate(REQUEST_KINDS[kinds[0]], fields, limits)


def split_lines(body: bytes) -> list[bytes]:
    """Return the lines of a JSON-lines body. An empty line counts, unless it is the last.

    Raises `UserError` 400 for a blank body, 413 for more than `MAX_LINES`.
    """
    if not body.strip():
        raise UserError("the body has no lines; send one JSON object a line", code="malformed_body")
    if (count := body.count(b"\n") + (not body.endswith(b"\n"))) > MAX_LINES:
        raise UserError(
            f"the body has {count:,} lines, more than {MAX_LINES:,}; send them in several bodies",
            status=413,
            code="payload_too_large",
        )
    return body.removesuffix(b"\n").split(b"\n")


def decode_base64(text: str, *, field: str) -> bytes:
    """Return the bytes of a base64 value; line breaks and a `data:…;base64,` prefix are allowed.

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
    text = "".join("".join(piece.split()) for piece in _pieces(text))
    try:
        if "=" in text[:-2]:  # padding in the middle: an error that a piece could not see
            return base64.b64decode(text, validate=True)
        return b"".join(base64.b64decode(piece, validate=True) for piece in _pieces(text))
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"{field} is not base64 ({error}), got {_short(text)}", field=field, code="bad_base64"
        ) from error


def _pieces(text: str) -> Iterator[str]:
    """Return a long text piece by piece; between two of them other threads can run."""
    return (text[at : at + _PIECE_CHARACTERS] for at in range(0, len(text), _PIECE_CHARACTERS))


def too_large(limits: Limits) -> UserError:
    """Return the error for a body over the limit."""
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


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises `UserError` 400, and 422 for too many keys."""
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
    if len(fields) > _MAX_KEYS:
        raise UserError(
            f"the body has {len(fields):,} keys, more than any request: {_as_json([*fields][:5])} "
            "are the first",
            status=422,
            code="invalid_request",
        )
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _read_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits is too long to be one")
    return int(digits)


def validate(
    kind: type[Model],
    fields: Mapping[str, Any],
    limits: Limits,
    *,
    also: Sequence[str] = (),
    image_size: int | None = None,
) -> Model:
    """Return the request of a kind that fields make.

    also: fields that are known beside those of the kind, for the message about an unknown one.
    image_size: side of the model's images in pixels, where a field depends on it.
    Raises `UserError` 422 with all faults in one message.
    """
    try:
        return kind.model_validate(fields, context={"limits": limits, "image_size": image_size})
    except ValidationError as error:
        details = error.errors(include_url=False)
        shown = [_explain(kind, detail, limits, also) for detail in details[:10]]
        if len(details) > len(shown):
            shown.append(f"and {len(details) - len(shown)} more")
        raise UserError(
            "; ".join(shown), field=_name(details[0]), status=422, code="invalid_request"
        ) from error


def _explain(
    kind: type[BaseModel], detail: ErrorDetails, limits: Limits, also: Sequence[str]
) -> str:
    """Return the message of one pydantic error: the field, its range and the value."""
    name, code = _name(detail), detail["type"]
    if code == "missing":
        return f"{name} is missing"
    if code == "extra_forbidden":
        known = (*kind.model_fields, *also)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        return f"{name} is unknown: {hint}"
    if not detail["loc"]:  # from a model validator, whose message is complete
        return detail["msg"]
    wanted = detail["msg"].replace("Input should be", "must be")
    if code in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        wanted = f"must be {_range(name, kind.model_fields[str(detail['loc'][0])], limits)}"
    if code in ("too_short", "too_long"):
        field = kind.model_fields[name]
        low, high = bound(field, "min_length"), bound(field, "max_length")
        return f"{name} must have {low:,} to {high:,} items, got {len(detail['input']):,}"
    if code in ("string_too_short", "string_too_long"):
        wanted = wanted.replace("String should", "must")
    if code == "string_pattern_mismatch":
        wanted = "must not be blank"
    return f"{name} {wanted}, got {_as_json(detail['input'])}"


def _name(detail: ErrorDetails) -> str:
    """Return a field's name, such as `images[2]`; a model validator gives it as error type.

    The name of an unknown field is the client's: it is shortened as values are.
    """
    first, *rest = detail["loc"] or (detail["type"],)
    return _cut(_encodable(str(first))) + "".join(
        f"[{part}]" for part in rest if isinstance(part, int)
    )


def bound(field: FieldInfo, name: str) -> Any:
    """Return a bound of a field, such as `ge` or `max_length`; None where there is none."""
    bounds = (getattr(each, name, None) for each in field.metadata)
    return next((each for each in bounds if each is not None), None)


def _range(name: str, field: FieldInfo, limits: Limits) -> str:
    """Return the range of a number in words, such as `1 to 8`."""
    of_server = {"num_candidates": limits.max_candidates, "num_images": limits.max_images}
    upper = of_server.get(name, bound(field, "le"))
    above = bound(field, "gt")
    if above is not None:
        return f"above {above} and at most {upper}"
    lower = bound(field, "ge")
    return f"{lower} or more" if upper is None else f"{lower} to {upper}"


def _as_json(value: object) -> str:
    """Return a value as JSON, shortened."""
    return _cut(_encodable(json.dumps(value, ensure_ascii=False, default=repr)))


def _encodable(text: str) -> str:
    """Return a text with halves of surrogate pairs, which no reply can hold, written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:60]!r}… ({len(text):,} characters)"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"
