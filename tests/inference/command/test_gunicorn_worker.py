"""The real `serve` and clients that are slow, incomplete or gone, over plain sockets."""

import select
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from inference.server.worker import gunicorn_worker
from inference.settings import read_settings
from tests.inference.raw_http import PING, Reply, connect, has_ended, header, open_sockets
from tests.inference.served import PATIENCE, Served, running, serve

pytestmark = pytest.mark.slow

CROWD = 64


@pytest.fixture(scope="module")
def root(tiny_artefact: Path, tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    return root


def serve_patiently(words: list[str]) -> int:
    vars(gunicorn_worker).update(_HEADER_SECONDS=10 * PATIENCE, _PAUSE_SECONDS=10 * PATIENCE)
    return serve(words)


@pytest.fixture(scope="module")
def served(root) -> Iterator[Served]:
    """A server that waits for its clients longer than a test does for it."""
    with running(root, work=serve_patiently, DALLE_MAX_REQUEST_MB="1") as served:
        yield served.ready()


def serve_impatiently(words: list[str]) -> int:
    vars(gunicorn_worker).update(_HEADER_SECONDS=1.0, _LINGER_SECONDS=1.0)
    return serve(words)


@pytest.fixture(scope="module")
def impatient(root) -> Iterator[Served]:
    """A server that waits for a second for each thing."""
    variables = {"DALLE_BODY_SECONDS": "1", "DALLE_MAX_REQUEST_MB": "1"}
    with running(root, work=serve_impatiently, **variables) as served:
        yield served.ready()


@pytest.fixture
def client(served) -> Iterator[socket.socket]:
    with connect(served) as connection:
        yield connection


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


def test_a_body_that_stops_in_the_middle_is_a_408(impatient):
    bodies = (header(1000) + b"{", header(None) + b"5\r\n{", header(None) + b"5\r\n{123}\r\n")
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(impatient)) for _ in bodies]
        for client, request in zip(clients, bodies, strict=True):
            client.sendall(request)
        for client in clients:
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


def test_a_header_that_does_not_come_in_time_ends_its_connection(impatient):
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(impatient)) for _ in range(2)]
        for client, sent in zip(clients, (b"GET /ping HTTP/1.1\r\nHost", b"\r\n\r"), strict=True):
            client.sendall(sent)
        assert all(has_ended(client) for client in clients)


@pytest.mark.parametrize("sent", [b"", b"GET /ping HTTP/1.1\r\nHost: "])
def test_ping_is_answered_beside_many_connections_without_a_whole_header(served, sent):
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(served)) for _ in range(CROWD)]
        for client in crowd:
            client.sendall(sent)
        assert served.get("/ping").status_code == 200
        assert select.select(crowd, [], [], 0)[0] == [], "they still wait for the rest"


def test_requests_are_answered_beside_many_bodies_that_are_never_sent_whole(served):
    assert read_settings({}).http_threads < CROWD
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(served)) for _ in range(CROWD)]
        for client in crowd:
            client.sendall(header(1000) + b"{")
        assert served.get("/ping").status_code == 200
        assert served.get("/metrics").status_code == 200
        assert served.ask().status_code == 200
        assert select.select(crowd, [], [], 0)[0] == [], "they are still received"
        for client in crowd:
            client.sendall(b" " * 999)
        for client in crowd:
            assert Reply(client).json["error"]["code"] == "malformed_body"


def test_a_client_that_never_closes_its_half_is_closed(impatient):
    before = open_sockets(impatient)
    with ExitStack() as stack:
        for _ in range(16):
            client = stack.enter_context(connect(impatient))
            client.sendall(header(2_000_000))
            assert Reply(client).status == 413
        while open_sockets(impatient) > before:
            pass
