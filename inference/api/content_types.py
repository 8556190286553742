"""Media types: how a body is read (Content-Type) and what a reply may be (Accept).

Knows nothing of requests or replies. Standard library alone: `infra` reads requests without Flask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dalle.errors import UserError

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
