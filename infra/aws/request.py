"""One request to AWS as plain data, and its check against botocore's model before it is sent.

Pure functions build the requests of a command, so that a plan can be printed, compared and tested
without AWS. Knows nothing of boto3: `infra.aws.client` passes the shapes in.
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


@dataclass(init=False)
class Request:
    """One request: `Request("s3", "HeadBucket", Bucket="pictures")`.

    service: boto3's name of it. operation: the API's.
    """

    service: str
    operation: str
    parameters: dict[str, Any]

    def __init__(self, service: str, operation: str, /, **parameters: Any) -> None:
        self.service, self.operation, self.parameters = service, operation, parameters

    def as_json(self) -> dict[str, Any]:
        return {
            "service": self.service,
            "operation": self.operation,
            "parameters": printable(self.parameters),
        }


def describe(kind: str, name: str) -> Request:
    """Return the request that describes a SageMaker resource. kind: such as TrainingJob."""
    return Request("sagemaker", f"Describe{kind}", **{f"{kind}Name": name})


def newest_first(kind: str, name: str, **filters: str) -> Request:
    """Return the request that lists SageMaker resources whose names contain `name`."""
    order = {"SortBy": "CreationTime", "SortOrder": "Descending"}
    return Request("sagemaker", f"List{kind}s", NameContains=name, **order, **filters)


def placeholder(name: str) -> str:
    """Return the stand-in that a dry run shows for a value of AWS's response."""
    return f"<{name}>"


def has_placeholder(value: str) -> bool:
    return _PLACEHOLDER.search(value) is not None


def includes(there: Any, wanted: Any) -> bool:
    """Return whether a description by AWS has the wanted values; AWS adds further fields."""
    if isinstance(wanted, Mapping):
        return isinstance(there, Mapping) and all(
            key in there and includes(there[key], value) for key, value in wanted.items()
        )
    return bool(there == wanted)


def digest(value: Any) -> str:
    """Return ten hexadecimal characters that are equal for equal JSON values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]


def printable(value: Any) -> Any:
    """Return `value` with everything that JSON cannot hold, such as bytes, described in words."""
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
    """Yield what the service would reject: lengths, numbers, words and patterns out of bounds.

    shape: botocore's, of a whole request or of a part. Types, missing and unknown members are left
    to botocore's validator, which in turn checks no maximum, word or pattern.
    A value with a placeholder in it passes.
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
    """Return the pattern compiled; None for a Java expression without counterpart in Python."""
    try:
        return re.compile(pattern)
    except re.error:
        return None
