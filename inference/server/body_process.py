"""Child process that parses large bodies and decodes large images.

    parse: body -> JSON without its images, and the bytes of each image file
    chat: body -> the same without the messages before the last one of the user
    scale: image file -> PNG of the square that the model reads

Both can hold Python's lock for seconds and take hundreds of megabytes, which the process that
answers pings must not. The child imports no torch. Its memory has a limit, and it ends with its
parent. `inference.server.bodies` is the parent's side.

Message in both directions: a line of JSON, then the parts whose lengths it gives.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from dalle.errors import DalleError, UserError
from dalle.preprocess.images import encode_image
from dalle.preprocess.square import Square
from inference.api.parsing import BodyKind, decode_base64, parse_request
from inference.api.schema import ClassifyRequest, GenerateRequest, Limits
from inference.openai.chat import without_history

FILE_MARK = "file "  # and a number, in place of each image's text


def parse(body: bytes, kind: BodyKind, limits: Limits) -> tuple[bytes, list[bytes]]:
    """Return the same request as JSON with marks in place of its images, and the image files.

    Raises `UserError` for any fault.
    """
    request = parse_request(body, kind, limits=limits)
    fields = request.model_dump(exclude_unset=True)
    files: list[bytes] = []

    def take(text: str, field: str) -> str:
        files.append(decode_base64(text, field=field))
        return f"{FILE_MARK}{len(files) - 1}"

    if isinstance(request, GenerateRequest) and request.prime_image is not None:
        fields["prime_image"] = take(request.prime_image, "prime_image")
    if isinstance(request, ClassifyRequest):
        fields["images"] = [
            take(text, f"images[{number}]") for number, text in enumerate(request.images)
        ]
    return json.dumps(fields).encode(), files


def scale(data: bytes, field: str, square: Square) -> bytes:
    """Return the square of an image file that a model reads, as a PNG.

    Raises `UserError` that names the field.
    """
    try:
        return encode_image(square.read(data, field), "png")
    except UserError as error:
        error.field = error.field or field
        raise


def _do(order: dict[str, Any], parts: list[bytes]) -> list[bytes]:
    match order.pop("task"):
        case "parse":
            small, files = parse(parts[0], BodyKind(order["kind"]), Limits(**order["limits"]))
            return [small, *files]
        case "chat":
            return [without_history(parts[0])]
        case "scale":
            square = Square(order["size"], order["method"])
            return [scale(parts[0], order["field"], square)]
        case task:
            raise ValueError(f"unknown task {task!r}")


def _reply(
    order: dict[str, Any], parts: list[bytes], memory_bytes: int
) -> tuple[dict[str, Any], list[bytes]]:
    try:
        return {}, _do(order, parts)
    except DalleError as error:
        fields = {name: getattr(error, name) for name in ("field", "status", "code")}
        return {"message": str(error), **fields}, []
    except MemoryError:
        field = order.get("field")
        message = (
            f"{field or 'the body'} takes more than {memory_bytes >> 20:,} MiB of memory to "
            f"read; send {'a smaller image' if field else 'less in one request'}"
        )
        return {"message": message, "field": field, "status": 413, "code": "payload_too_large"}, []


def _serve(connection: socket.socket, memory_bytes: int) -> None:
    """Main loop of the child process: one task after the other, until the parent ends.

    It may end at any time, in the middle of a message too.
    """
    with suppress(ConnectionError), connection.makefile("rwb") as file:
        while (line := file.readline()).endswith(b"\n"):
            order = json.loads(line)
            lengths = order.pop("lengths")
            parts = [file.read(length) for length in lengths]
            if [len(part) for part in parts] != lengths:
                return
            header, answers = _reply(order, parts, memory_bytes)
            header["lengths"] = [len(part) for part in answers]
            file.write(json.dumps(header).encode() + b"\n")
            for part in answers:
                file.write(part)
            file.flush()


def _limit_memory(memory_bytes: int) -> None:
    """Limit the memory that tasks may take, beyond what the process has without any."""
    with open("/proc/self/statm", encoding="ascii") as file:
        present = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (present + memory_bytes,) * 2)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this
    descriptor, memory_bytes = map(int, sys.argv[1:])
    _limit_memory(memory_bytes)
    _serve(socket.socket(fileno=descriptor), memory_bytes)
