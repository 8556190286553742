"""`serve` under load while its processes are killed and stopped by signals at random moments.

The processes: the worker, which holds the model, and the children that read large bodies. After
each signal the port answers a ping within seconds; a replaced worker says 503 until its model is
loaded. Each connection has one reply at most, with the images of the engine alone, or none where
its process was killed.
"""

import http.client
import io
import itertools
import json
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped]
import requests

from tests.inference.served import PATIENCE, Served, running
from tests.inference.serving_work import Clients, Reference, Reply

NUM_CLIENTS = 6
PING_SECONDS = 1.0
MOST_PAUSE = 0.5  # seconds under load before a signal
WHILE_LOADING = 0.1  # share of the signals that follow one before the model is loaded again
KINDS = tuple(
    (who, each) for who in ("worker", "child") for each in (signal.SIGKILL, signal.SIGSTOP)
)


class Lost(Exception):  # noqa: N818 - no error of the client's
    """A reply that did not come, or not whole, since its process has ended."""


class InterruptedClients(Clients):
    """Clients that read their connections to the end, and may lose a reply."""

    def one(self, number: int, seed: int) -> None:
        chance = random.Random(f"{seed} {number}")
        kinds = (self.request_images, self.stream, self.send_lines, self.send_a_large_image)
        kind = chance.choice(kinds)
        try:
            kind(chance)
            self.counts[kind.__name__] += 1
        except Lost:
            self.counts["lost"] += 1

    def _send(
        self, body: object, *, accept: str = "*/*", content_type: str = "application/json"
    ) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = (
            "POST /invocations HTTP/1.1",
            "Host: x",
            f"Accept: {accept}",
            f"Content-Type: {content_type}",
            f"Content-Length: {len(data)}",
            "Connection: close",
        )
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        try:
            with socket.create_connection((parts.hostname, parts.port or 80), PATIENCE) as client:
                client.sendall("\r\n".join([*lines, "", ""]).encode() + data)
                received = b"".join(iter(lambda: client.recv(1 << 16), b""))
        except ConnectionError as error:
            raise Lost from error
        return only_reply(received)

    def _check_refusal(self, reply: Reply) -> None:
        error = json.loads(reply.body)["error"]
        if error["code"] == "engine_loading":
            assert reply.status == 503
            self.counts["refused while loading"] += 1
        elif error["code"] == "platform_error":
            assert reply.status == 503
            assert "the process that reads" in error["message"]  # and the one that came after it
            self.counts["refused with its child"] += 1
        else:
            super()._check_refusal(reply)


class _Received(io.BytesIO):
    """What a connection has sent, in the place of a socket that `http.client` reads and closes."""

    def makefile(self, mode: str) -> io.BytesIO:
        return self

    def close(self) -> None:
        """Keep the rest."""


def only_reply(received: bytes) -> Reply:
    """Return the reply in all that a connection has sent.

    Raises `Lost` where it is not whole, and AssertionError where something follows it.
    """
    file = _Received(received)
    response = http.client.HTTPResponse(file, method="POST")  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ValueError) as error:
        raise Lost from error
    rest = file.read()
    assert rest == b"", f"a second reply: {rest[:200]!r}"
    return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, body)


def interrupt(artefact: Path, reference: Reference, num_signals: int, seed: int) -> dict[str, Any]:
    """Send so many signals to processes of a loaded `serve`; return counts and the slowest ping.

    Raises AssertionError for a wrong reply, a second one, or no answer to pings.
    """
    chance = random.Random(f"{seed} signals")
    kinds = [KINDS[number % len(KINDS)] for number in range(num_signals)]
    chance.shuffle(kinds)
    signals: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        shutil.copytree(artefact, root / "model")
        with running(root, DALLE_QUEUE_SIZE="4", DALLE_CHUNK_SIZE="4") as served:
            clients = InterruptedClients(served.ready().url, reference, 1_000_000)
            with load(clients, seed) as errors:
                is_ready = True
                for who, kind in kinds:
                    if errors:
                        break
                    # Three in a row before the model is ready would end the server.
                    is_ready = not is_ready or who == "child" or chance.random() >= WHILE_LOADING
                    if is_ready:
                        wait_until_ready(served)
                        time.sleep(chance.uniform(0, MOST_PAUSE))
                    send_signal(served, who, kind)
                    if who == "worker":
                        slowest = max(slowest, seconds_to_answer(served))
                    signals[f"{kind.name} to a {who}"] += 1
            if errors:
                raise errors[0]
            wait_until_ready(served)
            clients.request_images(chance)
    for number, line in enumerate(served.lines):
        fault = "Traceback" in line or "internal error" in line
        assert not fault, "\n".join(served.lines[max(0, number - 5) : number + 50])
    return {
        "signals": dict(sorted(signals.items())),
        "most_seconds_to_answer": round(slowest, 2),
        "counts": dict(sorted(clients.counts.items())),
    }


@contextmanager
def load(clients: Clients, seed: int) -> Iterator[list[BaseException]]:
    """Clients that send requests meanwhile; yields their errors, of which each ends one."""
    errors: list[BaseException] = []
    numbers = itertools.count()
    over = threading.Event()

    def client() -> None:
        try:
            while not over.is_set():
                clients.one(next(numbers), seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(NUM_CLIENTS)]
    for each in threads:
        each.start()
    try:
        yield errors
    finally:
        over.set()
        for each in threads:
            each.join()


def send_signal(served: Served, who: str, kind: signal.Signals) -> None:
    """Send a signal to the worker or to a child of it, once there is one."""
    until = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < until, f"there is no {who}"
        workers = psutil.Process(served.process.pid).children()
        with suppress(psutil.NoSuchProcess):
            found = workers if who == "worker" else [c for w in workers for c in w.children()]
            if found:
                found[0].send_signal(kind)
                return
        time.sleep(0.01)


def seconds_to_answer(served: Served) -> float:
    """Return the time until a ping is answered, with whatever status."""
    began = time.monotonic()
    while (seconds := time.monotonic() - began) < PATIENCE:
        with suppress(requests.RequestException):
            requests.get(f"{served.url}/ping", timeout=PING_SECONDS)
            return time.monotonic() - began
    raise AssertionError(f"no answer to pings for {seconds:.0f} seconds")


def wait_until_ready(served: Served) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with suppress(requests.RequestException):
            if requests.get(f"{served.url}/ping", timeout=PING_SECONDS).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the model is not loaded again:\n" + "\n".join(served.lines[-50:]))
