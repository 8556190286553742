"""The real `serve` under load: a short soak, and an overload that is refused without a loss."""

import json
import shutil
import threading
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tests.inference.interruptions import KINDS, interrupt
from tests.inference.served import PATIENCE, running
from tests.inference.serving_work import CANDIDATES, Clients, Reference, Reply
from tests.inference.soak_serving import settle, soak

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tiny_artefact: Path) -> Reference:
    return Reference(tiny_artefact)


def test_clients_of_every_kind_leave_nothing_behind(tiny_artefact, reference):
    done = soak(tiny_artefact, reference, calls=150)
    assert done["counts"]["images compared"] > 150
    assert {"close_a_stream", "set_a_short_deadline", "send_a_large_image"} <= set(done["counts"])


def test_killed_and_stopped_processes_cost_their_requests_alone(tiny_artefact, reference):
    done = interrupt(tiny_artefact, reference, num_signals=len(KINDS), seed=0)
    assert list(done["signals"].values()) == [1] * len(KINDS)


def test_a_stopped_child_ends_with_its_worker(tiny_artefact, reference, tmp_path):
    shutil.copytree(tiny_artefact, tmp_path / "model")
    with running(tmp_path) as served:
        Clients(served.ready().url, reference, 1)._answer(reference.large)
        (worker,) = psutil.Process(served.process.pid).children()
        (child,) = worker.children()
        child.suspend()
        worker.kill()
        child.wait(PATIENCE)


def test_an_overload_is_refused_with_a_time_and_nothing_accepted_is_lost(
    tiny_artefact: Path, reference, tmp_path
):
    shutil.copytree(tiny_artefact, tmp_path / "model")
    num_clients = 40
    with running(tmp_path, DALLE_QUEUE_SIZE="2", DALLE_CHUNK_SIZE="1") as served:
        served.ready()
        clients = Clients(served.url, reference, 1)
        replies: list[Reply] = []
        fields = {
            "caption": "a red square",
            "seed": 1,
            "guidance_scale": 3.0,
            "num_candidates": CANDIDATES,
            "num_images": CANDIDATES,
        }
        threads = [
            threading.Thread(target=lambda: replies.append(clients._send(fields)))
            for _ in range(num_clients)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join(PATIENCE)
        settle(served, clients)
        metrics = served.get("/metrics").text
    answered = [each for each in replies if each.status == 200]
    assert len(replies) == num_clients
    assert 3 <= len(answered) < num_clients
    assert f'dalle_invocations_total{{status="200"}} {len(answered)}.0' in metrics
    for reply in replies:
        if reply.status == 200:
            clients._check_images(fields, json.loads(reply.body)["images"])
        else:
            clients._check_refusal(reply)
    assert clients.counts["images compared"] == len(answered) * CANDIDATES
