"""Clients of a running `serve` over plain sockets, which can do what no HTTP library does."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from tests.inference.served import PATIENCE, Served

PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE)


def header(length: int | None, *, content_type: str = "application/json") -> bytes:
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = ["POST /invocations HTTP/1.1", "Host: x", f"Content-Type: {content_type}", framing]
    return "\r\n".join([*lines, "", ""]).encode()


class Reply:
    """One reply read from a socket: its status, header fields and JSON body."""

    def __init__(self, client: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._more(client)
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.fields = dict(line.lower().split(": ", 1) for line in lines)
        length = int(self.fields["content-length"])
        while len(body) < length:
            body += self._more(client)
        assert len(body) == length, "more than one reply was sent"
        self.json = json.loads(body)

    def _more(self, client: socket.socket) -> bytes:
        data = client.recv(65_536)
        assert data, "the connection ended before the reply"
        return data


def has_ended(client: socket.socket) -> bool:
    """Whether the server closed the connection without sending anything more."""
    return client.recv(1) == b""


def open_sockets(served: Served) -> int:
    """How many sockets the worker process has open."""
    pid = served.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = 0
    for descriptor in Path(f"/proc/{child}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed while we look
            found += os.readlink(descriptor).startswith("socket:")
    return found
