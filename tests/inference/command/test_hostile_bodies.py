"""The real `serve`, asked for much by few bytes: others are answered, and its memory stays."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image

from tests.inference.served import PATIENCE, Served, running

pytestmark = pytest.mark.slow


def giant() -> str:
    """A palette PNG of 5 kB and 39 megapixels."""
    file = io.BytesIO()
    Image.new("P", (39_000, 1_000)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def served(tiny_artefact: Path, tmp_path_factory) -> Iterator[Served]:
    root: Path = tmp_path_factory.mktemp("ml")
    shutil.copytree(tiny_artefact, root / "model")
    with running(root) as served:
        yield served.ready()


def post(served: Served, body: object, content_type: str = "application/json") -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(
        f"{served.url}/invocations",
        data=data,
        headers={"Content-Type": content_type},
        timeout=PATIENCE,
    )


def worker(served: Served) -> int:
    """The process that holds the model."""
    parent = served.process.pid
    (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)


def peak_bytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def test_giant_images_in_small_bodies_take_no_memory_of_the_model_and_stop_no_ping(served):
    post(served, {"images": [giant()], "classes": ["a"]})
    before = peak_bytes(worker(served))
    statuses: list[int] = []
    body = {"images": [giant()] * 3, "classes": ["a", "b"], "deadline_seconds": 600}
    threads = [
        threading.Thread(target=lambda: statuses.append(post(served, body).status_code))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    pings = 0
    while any(thread.is_alive() for thread in threads):
        assert served.get("/ping").status_code == 200
        pings += 1
    assert statuses == [200] * 6
    assert pings > 0
    assert peak_bytes(worker(served)) - before < 100 << 20


def test_a_deadline_holds_while_images_are_decoded_and_a_small_request_does_not_wait(served):
    done: list[tuple[str, int]] = []

    def ask(name: str, **body: object) -> None:
        done.append((name, post(served, body).status_code))

    images = [giant()] * 40
    requests_ = [
        threading.Thread(
            target=ask,
            args=(f"giant {number}",),
            kwargs={"images": images, "classes": ["a"], "deadline_seconds": 2},
        )
        for number in range(3)
    ]
    for thread in requests_:
        thread.start()
    ask("small", images=[giant()], classes=["a"], deadline_seconds=600)
    for thread in requests_:
        thread.join(PATIENCE)
    assert sorted(done) == [("giant 0", 504), ("giant 1", 504), ("giant 2", 504), ("small", 200)]


def test_a_stopped_child_blocks_nobody_whose_client_has_left(served):
    """As many clients as there are places wait for a hung child, and close: places are free."""
    body = {"images": [giant()], "classes": ["a"], "deadline_seconds": 600}
    assert post(served, body).status_code == 200
    parent = worker(served)
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"body_process" in command:
            os.kill(int(child), signal.SIGSTOP)
    address = served.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    header = f"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
    clients = [socket.create_connection((address[0], int(address[1]))) for _ in range(24)]
    for client in clients:
        client.sendall(header.encode() + data)
    for client in clients:
        client.close()
    while (response := post(served, body)).status_code == 429:
        pass  # until the server has seen that they are gone
    assert response.status_code == 200


def test_a_body_of_line_breaks_is_refused_whole(served):
    response = post(served, b"\n" * 200_000, "application/jsonlines")
    assert response.status_code == 400
    response = post(served, b"x\n" * 100_000, "application/jsonlines")
    assert response.status_code == 413
    assert response.json()["error"]["message"].startswith("the body has 100,000 lines, more than")


def test_refused_lines_have_one_line_of_the_log(served):
    before = len(served.lines)
    response = post(served, b"{}\n" * 1_000, "application/jsonlines")
    assert response.status_code == 200
    assert len(response.text.splitlines()) == 1_000
    served.wait_for("refused: 1000 of 1000 lines")
    assert len(served.lines) - before < 10


def test_thousands_of_keys_are_refused_in_words(served):
    body = {f"key {number}": number for number in range(200_000)}
    response = post(served, body)
    assert response.status_code == 422
    assert response.json()["error"]["message"].startswith("the body has 200,000 keys, more than")
