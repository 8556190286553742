"""Hostile HTTP requests at the real `serve`, from a seed, beside honest ones.

Whatever arrives, the server answers with a status of its document or closes the connection, within
seconds; it never writes a traceback; honest requests get their images and pings their 200.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from tests.fuzz.openai import openai_request
from tests.inference.served import Served

NUM_CLIENTS = 4
HANG_SECONDS = 60.0  # far beyond any deadline of these requests, on a machine that is shared
STATUSES = {200, 400, 404, 405, 406, 408, 411, 413, 414, 415, 417, 422, 429, 431, 501, 503, 504}
"""What a client may be told. 500 and 499 are not among them."""

_METHODS = (b"POST",) * 12 + (b"GET", b"PUT", b"HEAD", b"OPTIONS", b"post", b"\xff", b"")
_PATHS = (b"/invocations",) * 10 + (b"/ping", b"/metrics", b"/", b"/../etc/passwd", b"/%00", b"*")
_TYPES = (
    *("application/json",) * 6,
    *("application/jsonlines", "text/plain", "text/plain; charset=utf-16", "image/png"),
    *("multipart/form-data; boundary=a", "application/json; charset=\x7f", "", ";"),
)
_ACCEPTS = (
    *("*/*",) * 4,
    *("application/jsonlines", "image/png", "image/*;q=0.5", "text/html", "a/b;q=2", ",,,", "\t"),
)
_SETTINGS = [
    *("num_candidates", "seed", "temperature", "top_k", "top_p", "guidance_scale", "prime_rows"),
]
_BODIES = (b"[" * 10_000, b"\n" * 5_000, b"null", b"1" * 10_000, b"\xff\xfe")
_ENDS = (*(b"0\r\n\r\n",) * 6, b"0\r\nX-Sum: 1\r\n\r\n", b"-1\r\n", b"zz\r\n\r\n", b"")
_TEXTS = ("", " ", "a red square", "\0", "\ud800", "\u200b", "é" * 50, "a" * 3000, "\x1b[31m\r\nx")
_NUMBERS = (0, 1, -1, 2, 0.5, 1e308, -1e308, 2**31, 2**63, 2**200, True, None, "1", [], {})


def hostile_request(chance: random.Random, files: list[str]) -> tuple[bytes, bool]:
    """Return the bytes of a request, and whether its client then waits for a reply.

    files: base64 texts of image files, sound and damaged ones.
    """
    body, kind, path = _body(chance, files), chance.choice(_TYPES), chance.choice(_PATHS)
    attributes = "a=1"
    if chance.random() < 0.3:
        route, kind, body = openai_request(chance, files)
        path, attributes = route.encode(), f"a=1,route={route}"
        if chance.random() < 0.1:
            path = b"/invocations"
    headers = [
        ("Host", "localhost"),
        ("Content-Type", kind),
        ("Accept", chance.choice(_ACCEPTS)),
    ]
    if chance.random() < 0.1:
        headers.append(("X-Amzn-SageMaker-Custom-Attributes", chance.choice((*_TEXTS, attributes))))
    if chance.random() < 0.05:
        headers.append((chance.choice(("Content-Encoding", "Expect", "Upgrade", "")), "gzip"))
    if chance.random() < 0.03:
        headers += [(f"X-{number}", "a" * 100) for number in range(chance.choice((10, 200, 2000)))]
    waits = True
    match chance.randrange(10):
        case 0 | 1:
            headers.append(("Transfer-Encoding", chance.choice(("chunked",) * 5 + ("gzip", "x"))))
            body, waits = _chunked(chance, body)
        case 2:
            stated = chance.choice((len(body) + 1, 0, -1, "x", 10**12, f"{len(body)}, 1", "+1"))
            headers.append(("Content-Length", str(stated)))
            waits = False
        case 3:
            headers += [("Content-Length", str(len(body)))] * 2
        case _:
            headers.append(("Content-Length", str(len(body))))
    lines = [f"{name}: {value}".encode("utf-8", "replace") for name, value in headers]
    version = chance.choice((b"HTTP/1.1",) * 12 + (b"HTTP/1.0", b"HTTP/9.9", b"HTTP"))
    first = b" ".join((chance.choice(_METHODS), path, version))
    request = b"\r\n".join([first, *lines, b"", b""]) + body
    match chance.randrange(30):
        case 0:
            return request[: chance.randrange(len(request))], False
        case 1:
            return _flipped(chance, request), False
        case 2:
            return request * 2, waits
        case _:
            return request, waits


def _body(chance: random.Random, files: list[str]) -> bytes:
    fields: dict[str, Any] = {}
    match chance.randrange(4):
        case 0:
            fields |= {"images": chance.choices(files, k=chance.randint(0, 5))}
            fields |= {"classes": chance.choices(_TEXTS, k=chance.randint(0, 5))}
        case 1:
            fields |= {"complete": chance.choice(_TEXTS), "num_completions": 1}
        case _:
            fields |= {"caption": chance.choice(_TEXTS), "num_candidates": 1, "num_images": 1}
    for name in chance.sample(_SETTINGS, k=chance.choice((0, 0, 1, 2))):
        fields[name] = chance.choice(_NUMBERS)
    if chance.random() < 0.1:
        fields |= {"prime_image": chance.choice(files), "prime_rows": 1}
    if chance.random() < 0.1:
        fields[chance.choice(_TEXTS)] = chance.choice(_NUMBERS)
    if chance.random() < 0.2:
        fields["deadline_seconds"] = chance.choice((0.001, 0.1, 5, -1, 1e9))
    text = json.dumps(fields).encode()
    match chance.randrange(20):
        case 0:
            return _flipped(chance, text)
        case 1:
            return text[: chance.randrange(len(text))]
        case 2:
            return chance.choice(_BODIES)
        case 3:
            return b"\n".join([text] * chance.randint(2, 6))
        case 4:
            return text.replace(b"}", b', "seed": 1, "seed": 2}')
        case _:
            return text


def _flipped(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _chunked(chance: random.Random, body: bytes) -> tuple[bytes, bool]:
    parts, at = [], 0
    while at < len(body):
        size = chance.randint(1, max(1, len(body) // 2))
        piece = body[at : at + size]
        parts.append(b"%x\r\n%s\r\n" % (len(piece), piece))
        at += size
    end = chance.choice(_ENDS)
    return b"".join(parts) + end, bool(end)


def image_files(chance: random.Random) -> list[str]:
    """Return base64 image files: sound, damaged, giant when decoded, and none."""
    files = []
    for format, mode, size in (
        *(("PNG", "RGB", (20, 20)), ("JPEG", "RGB", (64, 30)), ("GIF", "P", (9, 9))),
        *(("WEBP", "RGB", (8, 8)), ("PNG", "P", (6_000, 1_000)), ("PNG", "P", (50_000, 1_000))),
    ):
        file = io.BytesIO()
        Image.new(mode, size).save(file, format=format)
        content = file.getvalue()
        files += [content, content[: len(content) // 2], _flipped(chance, content)]
    return [base64.b64encode(each).decode() for each in (*files, b"", b"hello")]


@dataclass
class Outcome:
    """How often each thing happened, and the slowest of each kind of exchange in seconds."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.slowest[kind] = max(self.slowest[kind], round(time.monotonic() - began, 2))


def fuzz(served: Served, num_requests: int, seed: int) -> Outcome:
    """Send so many hostile requests, with honest ones and pings beside them.

    Raises AssertionError for the first fault, with the seed and number of its request.
    """
    outcome = Outcome()
    counts = outcome.counts
    errors: list[BaseException] = []
    numbers = iter(range(num_requests))
    lock = threading.Lock()
    files = image_files(random.Random(seed))

    def each_number(act: Callable[[int], str]) -> None:
        while not errors:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                what = act(number)
            except BaseException as error:
                error.add_note(f"request {number} of seed {seed}")
                errors.append(error)
                return
            with lock:
                counts[what] += 1

    def hostile(number: int) -> str:
        request, waits = hostile_request(random.Random(f"{seed} {number}"), files)
        with outcome.timed("hostile"):
            status = _exchange(served.url, request, waits)
        assert status in STATUSES or status is None, f"status {status} to {request[:300]!r}"
        return f"status {status}"

    over = threading.Event()

    def honest() -> None:
        while not over.is_set() and not errors:
            try:
                with outcome.timed("ping"):
                    assert served.get("/ping").status_code == 200
                with outcome.timed("honest"):
                    reply = served.ask(num_candidates=1)
                assert reply.status_code in (200, 429), reply.text
                counts["honest"] += 1
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=each_number, args=(hostile,)) for _ in range(NUM_CLIENTS)]
    beside = threading.Thread(target=honest)
    for thread in (*threads, beside):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    beside.join()
    if errors:
        raise errors[0]
    faults = [line for line in served.lines if "Traceback" in line or "internal error" in line]
    assert faults == [], "\n".join(served.lines[-60:])
    return outcome


def _exchange(url: str, request: bytes, waits: bool) -> int | None:
    """Send a request; return the status of its reply, None where the connection ends before it."""
    parts = urlsplit(url)
    began = time.monotonic()
    with socket.create_connection((parts.hostname, parts.port), timeout=HANG_SECONDS) as connection:
        try:
            connection.sendall(request)
            if not waits:
                connection.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(connection)
            response.begin()
            response.read()
            return response.status
        except TimeoutError as error:
            raise AssertionError(
                f"no reply within {time.monotonic() - began:.0f} s to {request[:300]!r}"
            ) from error
        except (http.client.HTTPException, OSError):
            return None
