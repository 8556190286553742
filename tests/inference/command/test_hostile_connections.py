"""The real `serve` beside clients that are many, silent, slow, half-closed or in a hurry."""

import json
import resource
import select
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from inference.server.worker import connection
from inference.settings import read_settings
from tests.inference.raw_http import PING, Reply, connect, has_ended, header
from tests.inference.served import PATIENCE, Served, running, serve

pytestmark = pytest.mark.slow

CAPTION = json.dumps({"caption": "a red square", "num_candidates": 2, "seed": 7}).encode()
VARIABLES = {"DALLE_MAX_REQUEST_MB": "1", "DALLE_CHUNK_SIZE": "1", "DALLE_QUEUE_SIZE": "1"}
FEW_DESCRIPTORS = 64
UNREAD_BYTES = 16_000_000  # more than the system keeps of a connection for a client that reads none


@pytest.fixture(scope="module")
def root(tiny_artefact: Path, tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    return root


def serve_with_patient_writes(words: list[str]) -> int:
    connection._SEND_SECONDS = 10 * PATIENCE
    return serve(words)


@pytest.fixture(scope="module")
def served(root) -> Iterator[Served]:
    """A server of whose threads each waits longer for its client than a test for a reply."""
    with running(root, work=serve_with_patient_writes, **VARIABLES) as served:
        yield served.ready()


def serve_narrowly(words: list[str]) -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, hard))
    return serve(words)


@pytest.fixture(scope="module")
def narrow(root) -> Iterator[Served]:
    """A server that may open few files."""
    with running(root, work=serve_narrowly) as served:
        yield served.ready()


@pytest.fixture
def client(served) -> Iterator[socket.socket]:
    with connect(served) as client:
        yield client


def chunked(body: bytes, *, size: int, end: bytes = b"0\r\n\r\n") -> bytes:
    parts = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x;extension=1\r\n%b\r\n" % (len(part), part) for part in parts) + end


def whole_replies(client: socket.socket) -> bytes:
    """What is sent until the server closes the connection."""
    received = b""
    while data := client.recv(65_536):
        received += data
    return received


def test_bodies_that_trickle_leave_their_places_to_requests_that_have_arrived(served):
    places = read_settings(VARIABLES).max_invocations
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(served)) for _ in range(3 * places)]
        for number, client in enumerate(crowd):
            client.sendall(header(900_000) if number % 2 else header(None))
        for _ in range(20):
            for number, client in enumerate(crowd):
                client.sendall(b" " if number % 2 else b"1\r\n \r\n")
            assert served.ask().status_code == 200
            assert served.get("/ping").status_code == 200
        assert select.select(crowd, [], [], 0)[0] == []


def test_bodies_that_fill_the_memory_while_they_arrive_give_way_by_name(served):
    length = 990_000
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(served)) for _ in range(16)]
        for client in crowd:
            client.sendall(header(length) + bytes(length - 1))
        refused = select.select(crowd, [], [], PATIENCE)[0]
        while len(refused) < len(crowd) - 8:
            refused = select.select(crowd, [], [], PATIENCE)[0]
        for client in refused:
            reply = Reply(client)
            assert (reply.status, reply.json["error"]["code"]) == (503, "too_many_bodies")
            assert (reply.fields["connection"], reply.fields["retry-after"]) == ("close", "1")
        assert served.ask().status_code == 200
        for client in set(crowd) - set(refused):
            client.sendall(b" ")
            assert Reply(client).json["error"]["code"] == "malformed_body"


def test_more_silent_connections_than_the_server_holds_do_not_stop_pings(served):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with ExitStack() as stack, connect(served) as first:
            first.sendall(b"GET /ping HTTP/1.1\r\nHost")
            for _ in range(1_060):
                stack.enter_context(connect(served)).sendall(b"GET /ping HTTP/1.1\r\nX")
            assert served.get("/ping").status_code == 200
            assert has_ended(first), "the oldest is closed for a new one"
            assert served.ask().status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("sent", [b"", b"GET /ping HTTP/1.1\r\nX", header(1000) + b"{"])
def test_more_connections_than_file_descriptors_leave_the_model_loaded(narrow, sent):
    with ExitStack() as stack:
        for _ in range(2 * FEW_DESCRIPTORS):
            stack.enter_context(connect(narrow)).sendall(sent)
        assert narrow.get("/ping").status_code == 200
        narrow.http.close()  # the server may close a connection that is idle, for one that waits
        assert narrow.ask().status_code == 200
    narrow.http.close()
    assert narrow.ask().status_code == 200
    assert sum("Booting worker" in line for line in narrow.lines) == 1


@pytest.mark.parametrize(
    "requests",
    [
        [PING, PING],
        [header(len(CAPTION)) + CAPTION, PING, PING],
        [header(None) + chunked(CAPTION, size=5), PING, header(2) + b"{]", PING],
        [PING.replace(b"/ping", b"/metrics"), PING] * 20,
    ],
)
def test_requests_that_are_sent_together_are_all_answered_in_order(client, requests):
    client.sendall(b"".join(requests))
    client.shutdown(socket.SHUT_WR)
    assert whole_replies(client).count(b"HTTP/1.1 ") == len(requests)


def test_clients_that_never_read_their_replies_take_no_thread(served):
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500
    size = len(served.get("/openapi.json").content)
    with ExitStack() as stack:
        for _ in range(read_settings(VARIABLES).http_threads + 8):
            client = stack.enter_context(connect(served))
            client.setblocking(False)
            with suppress(BlockingIOError):
                while client.send(request):
                    pass
        # Requests take turns, so each client's replies have filled its connection after these.
        for _ in range(UNREAD_BYTES // size):
            assert served.get("/ping").status_code == 200
        assert served.ask().status_code == 200


@pytest.mark.parametrize(
    "end",
    [
        b"0\r\nDigest: abc\r\n\r\n",
        b"0\r\nA: b\r\nC:d\r\n\r\n",
        b"0\r\nHost: y\r\nContent-Length: 3\r\n\r\n",
        b"0;x=y\r\n\r\n",
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_chunks_with_fields_behind_them_are_a_request(client, end, size):
    client.sendall(header(None) + chunked(CAPTION, size=size, end=end))
    assert Reply(client).status == 200
    client.sendall(PING)
    assert Reply(client).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"-1\r\n\r\n",
        b"0x2\r\n{}\r\n0\r\n\r\n",
        b"2\n{}\n0\n\n",
        b"1\r\n{}\r\n0\r\n\r\n",
        b"2\r\n{}\r\n0\r\nno field\r\n\r\n",
        b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
        b"2;" + b"x" * 10_000,
        b"f" * 17 + b"\r\n",
    ],
)
def test_chunks_that_cannot_be_read_are_a_400(client, body):
    client.sendall(header(None) + body)
    reply = Reply(client)
    assert (reply.status, reply.json["error"]["code"]) == (400, "malformed_body")
    assert reply.fields["connection"] == "close"


def test_chunks_over_the_limit_are_a_413(client):
    client.sendall(header(None) + chunked(bytes(1_000_001), size=100_000, end=b""))
    assert Reply(client).status == 413


@pytest.mark.parametrize(
    ("length", "content_type", "status"),
    [
        (len(CAPTION), "application/json", 200),
        (2_000_000, "application/json", 413),
        (len(CAPTION), "text/html", 415),
    ],
)
def test_a_client_that_waits_to_send_its_body_is_told_to_or_refused(
    client, length, content_type, status
):
    request = header(length, content_type=content_type)
    client.sendall(request.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
    if status == 200:
        told = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert client.recv(len(told), socket.MSG_WAITALL) == told
        client.sendall(CAPTION)
    assert Reply(client).status == status


@pytest.mark.parametrize("accept", ["application/json", "application/jsonlines"])
def test_a_client_that_closes_its_half_gets_its_whole_reply(served, accept):
    fields = {"caption": "a red square", "num_candidates": 512, "deadline_seconds": 1}
    body = json.dumps(fields).encode()
    request = header(len(body)).replace(b"Host: x", b"Host: x\r\nAccept: " + accept.encode())
    with connect(served) as client:
        client.sendall(request + body)
        client.shutdown(socket.SHUT_WR)
        reply = whole_replies(client)
    assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"completed_candidates":' in reply or b'"event":"ranking"' in reply
    if b"chunked" in reply.partition(b"\r\n\r\n")[0]:
        assert reply.endswith(b"0\r\n\r\n")


def test_a_method_that_a_route_has_not_is_a_405_that_names_those_it_has(served):
    reply = served.get("/invocations")
    assert (reply.status_code, reply.headers["Allow"]) == (405, "OPTIONS, POST")


@pytest.mark.parametrize(
    "body",
    [
        {"caption": "a", "n\nFORGED 1": 1},
        {"caption": "a", "n\x1b[2J\x85\u2028FORGED 2": 1},
        {"caption": "FORGED \n 3", "num_candidates": "secret"},
        {"secret": "secret"},
        ["secret"],
    ],
)
def test_the_log_has_no_text_of_a_refused_request(served, body):
    before = len(served.lines)
    reply = served.http.post(f"{served.url}/invocations", json=body, timeout=PATIENCE)
    assert reply.status_code in (400, 422)
    assert served.ask(seed=None).status_code == 200
    served.wait_until(lambda lines: any("_status=200" in line for line in lines[before:]))
    lines = served.lines[before:]
    assert any(f"refused: status={reply.status_code}; code=" in line for line in lines)
    assert not [line for line in lines if "FORGED" in line or "secret" in line]


def test_a_header_that_cannot_be_read_forges_no_line_of_the_log(served):
    with connect(served) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\nFORGED\x1b\rFORGED\r\n\r\n")
        assert Reply(client).status == 400
    with connect(served) as client:
        client.sendall(b"GET /ping HTTP/1.1\r\n" + b"x" * 8_000 + b"\r\n\r\n")
        assert len(json.dumps(Reply(client).json)) < 1_000
    assert not any("FORGED" in line for line in served.lines)
