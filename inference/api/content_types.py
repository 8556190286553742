"""Media types: what a body is (Content-Type) and what may be answered (Accept). Standard library.

Knows nothing of requests or replies, only of their names on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dalle.errors import UserError

JSON = "application/json"
JSON_LINES = "application/jsonlines"
# The first is the platform's own word; the others are what its users and tools also write.
JSON_LINES_NAMES = (
    JSON_LINES,
    "application/json-lines",
    "application/x-jsonlines",
    "application/jsonl",
    "application/x-ndjson",
)
TEXT = "text/plain"
IMAGES = ("image/png", "image/jpeg", "image/webp")

# In the order of our own preference, which decides between equal wishes. Only pictures can be
# answered as one; what answers every request is in the second.
OFFERED = (JSON, *JSON_LINES_NAMES, *IMAGES)
OFFERED_WITHOUT_PICTURE = (JSON, *JSON_LINES_NAMES)


class BodyKind(StrEnum):
    """How the body of a request is to be read."""

    JSON = "json"
    JSON_LINES = "json lines"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class _Range:
    """One element of an Accept header, such as `image/*;q=0.5`."""

    type: str
    subtype: str
    quality: float

    def specificity(self, media_type: str) -> int:
        """0 when this range does not cover the type, else 1 (`*/*`), 2 (`image/*`) or 3."""
        main, _, sub = media_type.partition("/")
        if (self.type, self.subtype) == (main, sub):
            return 3
        if (self.type, self.subtype) == (main, "*"):
            return 2
        return 1 if (self.type, self.subtype) == ("*", "*") else 0


def body_kind(content_type: str | None) -> BodyKind:
    """How to read a body of this Content-Type; one that is not stated is JSON.

    Raises `UserError` 415 for another type and for a character set that is not UTF-8.
    """
    name, *parameters = [part.strip() for part in (content_type or JSON).split(";")]
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        charset = value.strip().strip('"').lower()
        is_charset = key.strip().lower() == "charset"
        if is_charset and charset not in ("utf-8", "utf8", "us-ascii", "ascii"):
            raise UserError(
                f"charset {charset!r} is not read; send UTF-8",
                field="Content-Type",
                status=415,
                code="unsupported_media_type",
            )
    name = name.lower()
    if name == JSON:
        return BodyKind.JSON
    if name in JSON_LINES_NAMES:
        return BodyKind.JSON_LINES
    if name == TEXT:
        return BodyKind.TEXT
    raise UserError(
        f"Content-Type {name!r} is not read; send {JSON}, {JSON_LINES} or {TEXT}",
        field="Content-Type",
        status=415,
        code="unsupported_media_type",
    )


def negotiate(
    accept: str | None, offered: Sequence[str] = OFFERED, *, what: str = "a request"
) -> str:
    """The one of `offered` that an Accept header wishes most (RFC 9110 §12.5.1).

    No header, an empty one and `*/*` give the first; so do equal wishes. what: names in the message
    what is to be answered. Raises `UserError` 406 when nothing offered is acceptable or the header
    cannot be read.
    """
    if accept is None or not accept.strip():
        return offered[0]
    ranges = [_parse_range(element) for element in accept.split(",") if element.strip()]
    best, best_quality = None, 0.0
    for each in offered:
        # The most specific range that covers a type decides about it, so q=0 can exclude one.
        covering = [(r.specificity(each), r.quality) for r in ranges if r.specificity(each)]
        quality = max(covering)[1] if covering else 0.0
        if quality > best_quality:
            best, best_quality = each, quality
    if best is None:
        own = [name for name in offered if name not in JSON_LINES_NAMES[1:]]
        raise UserError(
            f"Accept {accept[:200]!r} admits no type that {what} is answered in: {', '.join(own)}",
            field="Accept",
            status=406,
            code="not_acceptable",
        )
    return best


def _parse_range(element: str) -> _Range:
    name, *parameters = [part.strip() for part in element.split(";")]
    main, slash, sub = name.lower().partition("/")
    if name == "*":  # not in the standard, but some clients of old send it
        main, slash, sub = "*", "/", "*"
    quality = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "q":
            try:
                quality = float(value)
            except ValueError:
                quality = -1.0
    if not (main and slash and sub) or not 0.0 <= quality <= 1.0:
        raise UserError(
            f"Accept has {element.strip()[:100]!r}, which is not a media range such as "
            "'image/*;q=0.5'",
            field="Accept",
            status=406,
            code="not_acceptable",
        )
    return _Range(main, sub, quality)
