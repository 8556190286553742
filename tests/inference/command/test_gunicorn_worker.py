"""The real `serve` and clients that are slow, incomplete or gone, over plain sockets."""

import json
import os
import select
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from inference.server import gunicorn_worker as worker
from inference.server.gunicorn_worker import _Socket
from inference.settings import read_settings
from tests.inference.served import PATIENCE, Served, running

pytestmark = pytest.mark.slow

CROWD = 64
PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def root(tiny_artefact: Path, tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    return root


@pytest.fixture(scope="module")
def served(root) -> Iterator[Served]:
    with running(root, DALLE_MAX_REQUEST_MB="1") as served:
        yield served.ready()


@pytest.fixture(scope="module")
def impatient(root) -> Iterator[Served]:
    with running(root, DALLE_BODY_SECONDS="1") as served:
        yield served.ready()


@pytest.fixture
def client(served) -> Iterator[socket.socket]:
    with connect(served) as connection:
        yield connection


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


@pytest.mark.parametrize(
    ("content_type", "length", "status"),
    [("application/json", 2_000_000, 413), ("text/html", len(PING), 415)],
)
def test_a_body_that_is_refused_unread_is_not_the_next_request(
    client, content_type, length, status
):
    client.sendall(header(length, content_type=content_type) + PING)
    reply = Reply(client)
    assert (reply.status, reply.fields["connection"]) == (status, "close")
    assert has_ended(client)


def test_a_refusal_while_loading_closes_the_connection_of_an_unread_body(root):
    with running(root) as served, connect(served.listening()) as client:
        client.sendall(header(len(PING)) + PING)
        reply = Reply(client)
        assert (reply.status, reply.fields["connection"]) == (503, "close")
        assert has_ended(client)


def test_a_connection_goes_on_after_a_refusal_whose_body_was_read(client):
    for framing in (header(2) + b"{]", header(None) + b"2\r\n{]\r\n0\r\n\r\n"):
        client.sendall(framing)
        reply = Reply(client)
        assert (reply.status, reply.fields["connection"]) == (400, "keep-alive")
    client.sendall(PING)
    assert Reply(client).status == 200


def test_the_reply_to_a_refused_body_reaches_a_client_that_is_still_sending(served):
    with connect(served) as client:
        client.sendall(header(30_000_000))
        client.sendall(bytes(30_000_000))
        reply = Reply(client)
    assert (reply.status, reply.json["error"]["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    "request_", [header(1000) + b"{", header(None) + b"5\r\n{", header(None) + b"5\r\n{123}\r\n"]
)
def test_a_body_that_stops_in_the_middle_is_a_408(impatient, request_):
    with connect(impatient) as client:
        client.sendall(request_)
        reply = Reply(client)
        assert (reply.status, reply.json["error"]["code"]) == (408, "request_timeout")
        assert reply.fields["connection"] == "close"
        assert has_ended(client)


def test_a_body_sent_byte_by_byte_has_no_more_time(impatient):
    with connect(impatient) as client:
        client.sendall(header(1_000_000))
        for _ in range(1000):  # far fewer than were announced
            if select.select([client], [], [], 0.05)[0]:
                break
            client.sendall(b" ")
        assert Reply(client).status == 408


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (header(1000) + b"{", "the body ended after 1 of 1,000 bytes"),
        (header(None) + b"5\r\n{", "the body ended in the middle"),
        (header(None) + b"zz\r\n{}\r\n0\r\n\r\n", "its chunks cannot be read"),
    ],
)
def test_a_body_that_ends_too_early_is_a_400(client, request_, says):
    client.sendall(request_)
    client.shutdown(socket.SHUT_WR)
    reply = Reply(client)
    assert (reply.status, reply.json["error"]["code"]) == (400, "malformed_body")
    assert says in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"GET /ping HTTP/1.1\r\nHost x\r\n\r\n", 400, "bad_request"),
        (b"GET /ping HTTP/1.1\r\nX: %s\r\n\r\n" % (b"x" * 9000), 431, None),
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 5000), 414, None),
        (b"POST /invocations HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n", 501, "not_implemented"),
        (b"POST /invocations HTTP/1.1\r\nExpect: miracles\r\n\r\n", 417, "expectation_failed"),
        (b"GET /ping HTTP/1.1\r\n" + b"X: 1\r\n" * 20_000 + b"\r\n", 431, None),
    ],
)
def test_a_header_that_cannot_be_read_is_refused_in_json(client, request_, status, code):
    client.sendall(request_)
    reply = Reply(client)
    assert (reply.status, reply.fields["connection"]) == (status, "close")
    error = reply.json["error"]
    assert set(error) == {"code", "message", "field"}
    assert code is None or error["code"] == code


def test_a_header_may_come_in_pieces(client):
    for piece in (b"GET /pi", b"ng HTTP/1.1\r\nHo", b"st: x\r\n\r", b"\n"):
        client.sendall(piece)
    assert Reply(client).status == 200


def test_a_header_that_does_not_come_in_time_ends_its_connection(monkeypatch):
    ours, theirs = socket.socketpair()
    with _Socket(fileno=ours.detach()) as reader, theirs:
        theirs.sendall(b"GET /ping HTTP/1.1\r\n")
        assert not reader.take_header()
        monkeypatch.setattr(worker, "_HEADER_SECONDS", -1.0)
        theirs.sendall(b"X")
        with pytest.raises(TimeoutError, match="header did not arrive"):
            reader.take_header()


@pytest.mark.parametrize("sent", [b"", b"GET /ping HTTP/1.1\r\nHost: "])
def test_ping_is_answered_beside_many_connections_without_a_whole_header(served, sent):
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(served)) for _ in range(CROWD)]
        for client in crowd:
            client.sendall(sent)
        assert served.get("/ping").status_code == 200
        assert select.select(crowd, [], [], 0)[0] == [], "they still wait for the rest"


def test_ping_is_answered_beside_many_bodies_that_are_never_sent_whole(served):
    allowed = read_settings({}).max_invocations
    assert allowed < CROWD
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(served)) for _ in range(CROWD)]
        for client in crowd:
            client.sendall(header(1000) + b"{")
        assert served.get("/ping").status_code == 200
        assert served.get("/metrics").status_code == 200
        while len(refused := select.select(crowd, [], [], PATIENCE)[0]) < CROWD - allowed:
            pass
        assert len(refused) == CROWD - allowed, "the others are still read"
        for client in refused:
            reply = Reply(client)
            assert (reply.status, reply.json["error"]["code"]) == (429, "queue_full")
            assert (reply.fields["connection"], reply.fields["retry-after"]) == ("close", "1")
            assert has_ended(client)
        assert served.get("/ping").status_code == 200
    # Their places are free again as soon as they have gone.
    while served.ask().status_code == 429:
        pass
    assert served.ask().status_code == 200


def test_a_client_that_never_closes_its_half_is_closed(served):
    before = open_sockets(served)
    with ExitStack() as stack:
        for _ in range(16):
            client = stack.enter_context(connect(served))
            client.sendall(header(2_000_000))
            assert Reply(client).status == 413
        while open_sockets(served) > before:
            pass


def open_sockets(served: Served) -> int:
    """How many sockets the worker process has open."""
    pid = served.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = 0
    for descriptor in Path(f"/proc/{child}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed while we look
            found += os.readlink(descriptor).startswith("socket:")
    return found
