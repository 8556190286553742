"""Bodies to requests, with whatever takes time or memory done in child processes.

    body -> parsed here, or in a child where it is large
         -> images decoded here, or one by one in a child where they are large -> Request

A child decodes one image at a time and then takes the next task of any request, in the order of
their arrival, so that a small request does not wait for a large one, and at most `NUM_PROCESSES`
images are in memory. A child that takes too long, is stopped by a signal, or whose request has no
time left or no client any more, is killed; the next task starts a new one.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dalle.errors import PlatformError, UserError
from dalle.preprocess.images import ImageError, count_pixels
from dalle.preprocess.square import Square
from inference.api.parsing import BodyKind, decode_base64, parse_request
from inference.api.schema import ClassifyRequest, GenerateRequest, Limits, Request
from inference.server.body_process import FILE_MARK
from inference.server.stop_watch import StopWatch

LARGE_BYTES = 1 << 18  # of a body; a smaller one is parsed in a few milliseconds
LARGE_PIXELS = 1 << 20  # of an image; a smaller one is decoded in some ten milliseconds
NUM_PROCESSES = 2
MEMORY_BYTES = 768 << 20  # of a child; 40 megapixels take at most some 500 MB
TASK_SECONDS = 30.0  # far more than the largest body or image takes
_CHECK_SECONDS = 0.25
_ATTEMPTS = 2  # the child may have died or been stopped since its last task
_PIECE_BYTES = 1 << 16

Check = Callable[[], None]
"""Raises where a request is not worth more work: its client has gone, or its time is over."""


class BodyReader:
    """Reader of bodies, with its child processes. Any thread may call `read`."""

    def __init__(
        self, task_seconds: float = TASK_SECONDS, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._processes = _Processes(task_seconds, memory_bytes)

    def read(
        self,
        body: bytes,
        kind: BodyKind,
        *,
        request: Request | None = None,
        limits: Limits,
        prime_size: int | None,
        clip_square: Square | None,
        check: Callable[[float | None], None],
    ) -> Request:
        """Return the request in a body, as `parse_request` does; large images are scaled down.

        request: the same, where the body has been parsed.
        prime_size, clip_square: side in pixels of a prime image, and what is read of an image to
            classify; None where the model refuses such requests.
        check: called again and again meanwhile with the request's `deadline_seconds`, None as long
            as it is not known; raises to give the request up.
        Raises what `parse_request` and `check` raise, `UserError` for an image that cannot be used,
        and `PlatformError` 503 when a child dies or does not answer.
        """
        files: list[bytes] = []
        if request is None and len(body) <= LARGE_BYTES:
            request = parse_request(body, kind, limits=limits)
        if request is None:
            order = {"task": "parse", "kind": kind, "limits": asdict(limits)}
            small, *files = self._processes.run(order, body, lambda: check(None))
            request = parse_request(small, BodyKind.JSON, limits=limits)

        deadline_seconds = request.deadline_seconds
        prime_square = None if prime_size is None else Square(prime_size)

        def scaled(text: str, field: str, square: Square | None) -> str:
            if square is None:
                return text
            if files:
                data = files[int(text.removeprefix(FILE_MARK))]
            else:
                data = decode_base64(text, field=field)
                try:
                    is_large = count_pixels(data, what=field) > LARGE_PIXELS
                except ImageError:
                    is_large = False  # `Engine.prepare` refuses it
                if not is_large:
                    return text
            order = {"task": "scale", "field": field, **asdict(square)}
            (png,) = self._processes.run(order, data, lambda: check(deadline_seconds))
            return base64.b64encode(png).decode("ascii")

        if isinstance(request, GenerateRequest) and request.prime_image is not None:
            image = scaled(request.prime_image, "prime_image", prime_square)
            return request.model_copy(update={"prime_image": image})
        if isinstance(request, ClassifyRequest):
            images = [
                scaled(text, f"images[{number}]", clip_square)
                for number, text in enumerate(request.images)
            ]
            return request.model_copy(update={"images": images})
        return request

    def without_history(self, body: bytes, *, check: Callable[[float | None], None]) -> bytes:
        """Return the body of a large chat as `openai.chat.without_history` does.

        check: as for `read`. Raises what that function and `check` raise, and `PlatformError` 503.
        """
        (small,) = self._processes.run({"task": "chat"}, body, lambda: check(None))
        return small

    def close(self) -> None:
        """End the child processes."""
        self._processes.close()


class _Processes:
    """At most `NUM_PROCESSES` children, which take tasks first come, first served."""

    def __init__(self, task_seconds: float, memory_bytes: int) -> None:
        self._task_seconds = task_seconds
        self._lock = threading.Lock()
        self._idle = [_Child(memory_bytes) for _ in range(NUM_PROCESSES)]
        self._children = tuple(self._idle)
        self._waiting: deque[_Waiter] = deque()

    def run(self, order: dict[str, Any], part: bytes, check: Check) -> list[bytes]:
        """Have a child do a task; return the parts of its reply."""
        child = self._take(check)
        try:
            for _ in range(_ATTEMPTS):
                try:
                    reply, parts = child.run(order, part, check, self._task_seconds)
                except EOFError:
                    continue
                if "message" in reply:
                    raise UserError(**reply)
                return parts
        finally:
            self._give(child)
        raise PlatformError(
            f"the process that reads {order.get('field', 'large bodies')} died of it, probably out "
            "of memory; send smaller images or fewer"
        )

    def close(self) -> None:
        for child in self._children:
            child.end()

    def _take(self, check: Check) -> _Child:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            waiter = _Waiter()
            self._waiting.append(waiter)
        try:
            while not waiter.ready.wait(_CHECK_SECONDS):
                check()
        except BaseException:
            with self._lock:
                if waiter.child is None:
                    self._waiting.remove(waiter)
            if waiter.child is not None:
                self._give(waiter.child)
            raise
        assert waiter.child is not None
        return waiter.child

    def _give(self, child: _Child) -> None:
        with self._lock:
            if self._waiting:
                waiter = self._waiting.popleft()
                waiter.child = child
                waiter.ready.set()
            else:
                self._idle.append(child)


class _Waiter:
    """A thread that waits for a child."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.child: _Child | None = None


class _Child:
    """A child process, started by its first task and again after it has ended."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def run(
        self, order: dict[str, Any], part: bytes, check: Check, seconds: float
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Return header and parts of the reply to one task.

        Raises `EOFError` when the process has ended or is stopped by a signal, `PlatformError`
        after `seconds` without a whole reply, and what `check` raises. The process is ended then.
        """
        until = time.monotonic() + seconds
        connection = self._connection or self._start()
        assert self._process is not None
        watch = StopWatch(self._process.pid)

        def pause() -> None:
            check()
            if watch.is_stopped():
                raise EOFError
            if time.monotonic() > until:
                raise PlatformError(
                    f"{order.get('field', 'the body')} could not be read within {seconds:g} "
                    "seconds; send smaller images or fewer"
                )

        header = json.dumps({**order, "lengths": [len(part)]}).encode() + b"\n"
        try:
            _send(connection, header, pause)
            _send(connection, part, pause)
            return _receive(connection, pause)
        except ConnectionError as error:
            self.end()
            raise EOFError from error
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if process is not None:
            process.kill()
            process.wait()
        if connection is not None:
            connection.close()

    def _start(self) -> socket.socket:
        ours, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [
                    *(sys.executable, "-m", "inference.server.body_process"),
                    *(str(its.fileno()), str(self._memory_bytes)),
                ],
                pass_fds=[its.fileno()],
                # One thread: a pool for every processor would take address space only.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        ours.settimeout(_CHECK_SECONDS)
        self._connection = ours
        return ours


def _send(connection: socket.socket, content: bytes, pause: Callable[[], None]) -> None:
    view = memoryview(content)
    while view:
        try:
            view = view[connection.send(view[:_PIECE_BYTES]) :]
        except TimeoutError:
            pause()


def _receive(
    connection: socket.socket, pause: Callable[[], None]
) -> tuple[dict[str, Any], list[bytes]]:
    """Return header and parts of a message. Raises EOFError when the other end is closed."""
    received = bytearray()

    def receive_more() -> None:
        try:
            piece = connection.recv(_PIECE_BYTES)
        except TimeoutError:
            pause()
            return
        if not piece:
            raise EOFError
        received.extend(piece)

    while b"\n" not in received:
        receive_more()
    start = received.index(b"\n") + 1
    header: dict[str, Any] = json.loads(received[:start])
    parts = []
    for length in header.pop("lengths"):
        while len(received) < start + length:
            receive_more()
        parts.append(bytes(received[start : start + length]))
        start += length
    return header, parts
