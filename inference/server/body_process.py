"""Large bodies made small by a child process, so that they do not hold up pings and the model.

    body -> child process: parse, decode the images, crop and scale -> small JSON body -> Request

A body of 25 MB holds Python's lock for tenths of a second while its JSON and base64 are read and
its images decoded. So a child process returns the same request with every image cut to its centre
square and scaled to the size that the model reads: a few kB. The child imports no torch. The first
large body starts it, it is restarted when it has died, and it ends with its parent.

Message on both pipes: a line of JSON with the length of the rest, then so many bytes.
"""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO, Any

from dalle.errors import DalleError, PlatformError, UserError
from dalle.preprocess.images import decode_image, encode_image, to_square
from inference.api.parsing import BodyKind, decode_base64, parse_request
from inference.api.schema import ClassifyRequest, GenerateRequest, Limits, Request

LARGE_BYTES = 2**18  # of a body; a smaller one is parsed in a few milliseconds
_ATTEMPTS = 2  # the child may have died since the last body


class BodyProcess:
    """Parser of large bodies in a child process. Any thread may call `parse`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # one body at a time: reading is bound by the processor
        self._child: subprocess.Popen[bytes] | None = None

    def parse(
        self,
        body: bytes,
        kind: BodyKind,
        *,
        limits: Limits,
        prime_size: int | None,
        clip_size: int | None,
    ) -> Request:
        """Return the request in a body, as `parse_request` does, with its images scaled.

        prime_size, clip_size: side in pixels of a prime image and of an image to classify; None
        where the model refuses such requests. Raises what `parse_request` raises, and
        `PlatformError` 503 when the child dies of a body.
        """
        order = {
            "kind": kind,
            "limits": asdict(limits),
            "prime_size": prime_size or 1,
            "clip_size": clip_size or 1,
        }
        return parse_request(self._scale_images(order, body), BodyKind.JSON, limits=limits)

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end_child()

    def _scale_images(self, order: Mapping[str, Any], body: bytes) -> bytes:
        with self._lock:
            for _ in range(_ATTEMPTS):
                child = self._child or self._start_child()
                assert child.stdin is not None
                assert child.stdout is not None
                try:
                    _write(child.stdin, order, body)
                    reply, small = _read(child.stdout)
                except (EOFError, OSError):
                    self._end_child()
                    continue
                if "message" in reply:
                    raise UserError(**reply)
                return small
        raise PlatformError(
            "the process that reads large bodies died of this one, probably out of memory; "
            "send smaller images or fewer"
        )

    def _start_child(self) -> subprocess.Popen[bytes]:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "inference.server.body_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self._child

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


def scale_images(
    body: bytes, kind: BodyKind, *, limits: Limits, prime_size: int, clip_size: int
) -> bytes:
    """Return the same request as JSON, with its images as PNG squares of those sides.

    Raises `UserError` for any fault, those of the images included.
    """
    request = parse_request(body, kind, limits=limits)
    fields = request.model_dump(exclude_unset=True)
    if isinstance(request, GenerateRequest) and request.prime_image is not None:
        fields["prime_image"] = _scaled(request.prime_image, "prime_image", prime_size)
    if isinstance(request, ClassifyRequest):
        fields["images"] = [
            _scaled(text, f"images[{number}]", clip_size)
            for number, text in enumerate(request.images)
        ]
    return json.dumps(fields).encode()


def _scaled(text: str, field: str, size: int) -> str:
    try:
        data = decode_base64(text, field=field)
        pixels = to_square(decode_image(data, what=field, min_side=size), size)
    except UserError as error:
        error.field = error.field or field
        raise
    return base64.b64encode(encode_image(pixels, "png")).decode("ascii")


def _write(pipe: IO[bytes], header: Mapping[str, Any], body: bytes) -> None:
    pipe.write(json.dumps({**header, "length": len(body)}).encode() + b"\n")
    pipe.write(body)
    pipe.flush()


def _read(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Return header and body of a message. Raises `EOFError` when the other process has ended."""
    line = pipe.readline()
    if not line:
        raise EOFError
    header: dict[str, Any] = json.loads(line)
    length = header.pop("length")
    body = pipe.read(length)
    if len(body) < length:
        raise EOFError
    return header, body


def _serve(orders: IO[bytes], replies: IO[bytes]) -> None:
    """Main loop of the child process."""
    while True:
        try:
            order, body = _read(orders)
        except EOFError:
            return
        limits = Limits(**order.pop("limits"))
        try:
            small = scale_images(body, BodyKind(order.pop("kind")), limits=limits, **order)
        except DalleError as error:
            fields = {name: getattr(error, name) for name in ("field", "status", "code")}
            _write(replies, {"message": str(error), **fields}, b"")
        else:
            _write(replies, {}, small)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this
    _serve(sys.stdin.buffer, sys.stdout.buffer)
