"""One request to AWS as plain data, and what botocore's own model says about it before it is sent.

A command is built from such calls by pure functions, so that a plan can be printed, compared and
tested without AWS. Knows no AWS library: the shapes are handed in by `infra.aws.client`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_PLACEHOLDER = re.compile(r"<[^<>]+>")
DIGEST_CHARACTERS = 10


@dataclass(frozen=True)
class Call:
    """service: as boto3 names it. operation: as the API does, such as CreateModel."""

    service: str
    operation: str
    parameters: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "service": self.service,
            "operation": self.operation,
            "parameters": printable(self.parameters),
        }


def placeholder(name: str) -> str:
    """What a dry run shows in place of something that only AWS's answer would tell."""
    return f"<{name}>"


def has_placeholder(value: str) -> bool:
    return _PLACEHOLDER.search(value) is not None


def digest(value: Any) -> str:
    """Ten hexadecimal characters that stand for a JSON value: the same value, the same name."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]


def printable(value: Any) -> Any:
    """`value` with everything that JSON cannot hold, such as the bytes of a file, described."""
    if isinstance(value, Mapping):
        return {str(key): printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    if isinstance(value, bytes):
        return placeholder(f"{len(value):,} bytes")
    if value is None or isinstance(value, str | int | float):
        return value
    name = getattr(value, "name", None)
    return placeholder(f"the file {name}") if name else str(value)


def problems(shape: Any, value: Any, where: str) -> Iterator[str]:
    """What the service would refuse: lengths, numbers, words and patterns out of bounds.

    shape: botocore's, of a whole request or of a part. Types, missing and unknown members are not
    looked at: botocore's own validator does that, but checks no maximum, word or pattern.
    A value with a placeholder in it is taken to be right.
    """
    kind = shape.type_name
    limits = shape.metadata
    if kind == "structure" and isinstance(value, Mapping):
        for name, item in value.items():
            if name in shape.members:
                yield from problems(shape.members[name], item, f"{where}.{name}")
    elif kind == "list" and isinstance(value, list | tuple):
        yield from _bounds(limits, len(value), where, "items")
        for index, item in enumerate(value):
            yield from problems(shape.member, item, f"{where}[{index}]")
    elif kind == "map" and isinstance(value, Mapping):
        yield from _bounds(limits, len(value), where, "entries")
        for name, item in value.items():
            yield from problems(shape.key, name, f"{where}.{name}")
            yield from problems(shape.value, item, f"{where}.{name}")
    elif kind == "string" and isinstance(value, str) and not has_placeholder(value):
        yield from _bounds(limits, len(value), where, "characters", value)
        yield from _words(limits, value, where)
    elif kind in ("integer", "long", "float", "double") and isinstance(value, int | float):
        yield from _bounds(limits, value, where, "")


def _bounds(
    limits: Mapping[str, Any], size: float, where: str, unit: str, value: str = ""
) -> Iterator[str]:
    low, high = limits.get("min"), limits.get("max")
    if (low is None or size >= low) and (high is None or size <= high):
        return
    words = f"at least {low:,}" if high is None else f"{low or 0:,} to {high:,}"
    shown = f" ({value[:60]!r})" if value else ""
    yield f"{where} must be {words} {unit}".rstrip() + f", got {size:,}{shown}"


def _words(limits: Mapping[str, Any], value: str, where: str) -> Iterator[str]:
    known = limits.get("enum")
    if known and value not in known:
        near = difflib.get_close_matches(value, known, n=3)
        if near:
            yield f"{where} is {value!r}, which this service does not offer; near: {' '.join(near)}"
        else:
            yield f"{where} must be one of {', '.join(known[:12])}, got {value!r}"
    pattern = limits.get("pattern")
    compiled = _compiled(pattern) if pattern else None
    if compiled is not None and not compiled.fullmatch(value):
        yield f"{where} must match {pattern}, got {value[:100]!r}"


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str] | None:
    """None for those of Java's expressions that have no counterpart in Python."""
    try:
        return re.compile(pattern)
    except re.error:
        return None
