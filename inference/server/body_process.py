"""Large bodies made small by a process of their own, so that nothing else waits for them.

A body of 25 MB holds Python's lock for tenths of a second while its JSON and base64 are read and
its pictures decoded; pings and the model's thread would stand still meanwhile. So it goes to a
child process, which answers with the same request with every picture cut to its centre square and
scaled to what the model looks at: a few kB, read as any other body. The child knows no torch. It is
started by the first large body, again when it has died, and ends when its parent does.

Over both pipes: a line of JSON with the length of what follows, then so many bytes.
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
from inference.api.parsing import decode_base64, parse_request
from inference.api.schema import ClassifyRequest, GenerateRequest, Limits, Request

LARGE_BYTES = 2**18  # of a body; a smaller one is read in some milliseconds
_ATTEMPTS = 2  # a child may have died since the last body, for want of memory


class Shrinker:
    """Reads requests, large ones by its child process. `parse` may be called by any thread."""

    def __init__(self, large_bytes: int = LARGE_BYTES) -> None:
        self._large_bytes = large_bytes
        self._lock = threading.Lock()  # one body at a time: reading is bound by the processor
        self._child: subprocess.Popen[bytes] | None = None

    def parse(
        self,
        body: bytes,
        content_type: str | None,
        *,
        limits: Limits,
        prime_size: int | None,
        clip_size: int | None,
    ) -> Request:
        """As `parse_request`, whose errors it raises; pictures in a large body are made small.

        prime_size, clip_size: side in pixels that a prime image, and one to be classified, is
        scaled to; None where such a request will be refused anyway. Raises `PlatformError` 503
        when the child dies of a body.
        """
        if len(body) > self._large_bytes:
            order = {
                "content_type": content_type,
                "limits": asdict(limits),
                "prime_size": prime_size or 1,
                "clip_size": clip_size or 1,
            }
            body, content_type = self._shrink(order, body), None
        return parse_request(body, content_type, limits=limits)

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end_child()

    def _shrink(self, order: Mapping[str, Any], body: bytes) -> bytes:
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
            "the process that reads large bodies died of this one, probably for want of memory; "
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


def shrunk(
    body: bytes, content_type: str | None, *, limits: Limits, prime_size: int, clip_size: int
) -> bytes:
    """The same request as JSON, its pictures as PNG squares of those sides.

    Raises `UserError` for what is wrong in it, the pictures included.
    """
    request = parse_request(body, content_type, limits=limits)
    fields = request.model_dump(exclude_unset=True)
    if isinstance(request, GenerateRequest) and request.prime_image is not None:
        fields["prime_image"] = _small(request.prime_image, "prime_image", prime_size)
    if isinstance(request, ClassifyRequest):
        fields["images"] = [
            _small(text, f"images[{number}]", clip_size)
            for number, text in enumerate(request.images)
        ]
    return json.dumps(fields).encode()


def _small(text: str, field: str, size: int) -> str:
    try:
        pixels = to_square(decode_image(decode_base64(text, field=field), what=field), size)
    except UserError as error:
        error.field = error.field or field
        raise
    return base64.b64encode(encode_image(pixels, "png")).decode("ascii")


def _write(pipe: IO[bytes], header: Mapping[str, Any], body: bytes) -> None:
    pipe.write(json.dumps({**header, "length": len(body)}).encode() + b"\n")
    pipe.write(body)
    pipe.flush()


def _read(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Raises `EOFError` when the other side has gone."""
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
    """The child's life: answer until nobody asks any more."""
    while True:
        try:
            order, body = _read(orders)
        except EOFError:
            return
        limits = Limits(**order.pop("limits"))
        try:
            small = shrunk(body, limits=limits, **order)
        except DalleError as error:
            told = {"message": str(error), "field": error.field}
            _write(replies, told | {"status": error.status, "code": error.code}, b"")
        else:
            _write(replies, {}, small)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    _serve(sys.stdin.buffer, sys.stdout.buffer)
