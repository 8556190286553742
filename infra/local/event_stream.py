"""AWS's event-stream frames, of which an endpoint's streamed reply consists.

    total length | headers length | CRC-32 of both | headers | payload | CRC-32 of all before

Lengths and checksums are four bytes, big-endian. A header is the length of its name, its name,
the type of its value (7, a text), the length of its value and its value. Standard library only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from zlib import crc32

MEDIA_TYPE = "application/vnd.amazon.eventstream"
TEXT = 7


def frame(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return one frame. Names of headers are at most 255 bytes, values at most 65,535."""
    head = b"".join(_header(name.encode(), value.encode()) for name, value in headers.items())
    prelude = struct.pack(">II", 16 + len(head) + len(payload), len(head))
    message = prelude + struct.pack(">I", crc32(prelude)) + head + payload
    return message + struct.pack(">I", crc32(message))


def payload_part(part: bytes) -> bytes:
    """Return the frame that carries a part of the reply's body."""
    headers = {
        ":event-type": "PayloadPart",
        ":content-type": "application/octet-stream",
        ":message-type": "event",
    }
    return frame(headers, part)


def exception(kind: str, fields: Mapping[str, str]) -> bytes:
    """Return the frame that ends a failed stream. kind: the error's name, such as
    ModelStreamError; fields: its members."""
    headers = {
        ":exception-type": kind,
        ":content-type": "application/json",
        ":message-type": "exception",
    }
    return frame(headers, json.dumps(dict(fields)).encode())


def _header(name: bytes, value: bytes) -> bytes:
    return struct.pack(">B", len(name)) + name + struct.pack(">BH", TEXT, len(value)) + value
