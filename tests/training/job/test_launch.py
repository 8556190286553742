"""training.job.launch: several devices of a host, here processes on the CPU, train as one."""

import json
import multiprocessing
import os
import signal
import threading

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dalle import artefact
from dalle.platform.environment import read_job
from dalle.platform.outputs import prepare_outputs
from tests.forked import CONTEXT
from tests.training.job import hung_heartbeat
from tests.training.two_hosts import (
    ENDLESS,
    LONG_TIMEOUTS,
    SHORT_TIMEOUTS,
    TINY,
    job_tree,
    metrics_of,
)
from training.__main__ import main
from training.config.hyperparameters import parse
from training.job.launch import run_on_devices

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("DALLE_DEVICE", "cpu")


class ForkedDevices:
    """What `launch` uses of multiprocessing's contexts, with devices that need not import torch."""

    def Process(self, *, target, args, name):  # noqa: N802 - as multiprocessing calls it
        given = (dict(os.environ), target, args)
        return CONTEXT.Process(target=work_with, args=given, name=name)


def work_with(environment, work, arguments):
    os.environ.update(environment)
    work(*arguments)


def run(tree, stop=None, timeouts=LONG_TIMEOUTS):
    job = read_job(tree.root)
    prepare_outputs(job.paths)
    return run_on_devices(
        job,
        parse(job.hyperparameters),
        num_devices=2,
        port=0,
        timeouts=timeouts,
        stop=stop or threading.Event(),
    )


def test_two_devices_have_the_losses_of_one(tmp_path):
    settings = TINY | {"stage": "clip", "max_steps": 10}
    one, two = (job_tree(tmp_path / name, **settings) for name in ("one", "two"))
    assert main(["--root", str(one.root)]) == 0
    assert run(two) == 0
    assert artefact.load(two.root / "model").components() == ["clip", "tokenizer"]
    assert metrics_of(two).keys() == metrics_of(one).keys()
    assert metrics_of(two) == pytest.approx(metrics_of(one), rel=1e-4)


def test_a_stop_reaches_processes_that_are_still_starting(tmp_path):
    tree = job_tree(tmp_path / "job", **ENDLESS)
    stop = threading.Event()
    stop.set()
    assert run(tree, stop) == 0
    assert not (tree.root / "output/failure").exists()


def test_a_killed_process_ends_the_host_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: ForkedDevices())
    tree = job_tree(tmp_path / "job", **ENDLESS)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run(tree, timeouts=SHORT_TIMEOUTS)))
    thread.start()
    metrics = tree.root / "output/data/metrics.jsonl"
    while not (metrics.exists() and json.dumps({"step": 3})[1:-1] in metrics.read_text()):
        thread.join(timeout=0.05)
        assert thread.is_alive()
    (second,) = (p for p in multiprocessing.active_children() if p.name == "device 1")
    os.kill(second.pid, signal.SIGKILL)
    thread.join(timeout=300)
    assert codes == [1]
    assert "were killed: device 1 by SIGKILL. After SIGKILL the machine's memory" in tree.failure


def test_a_device_that_has_trained_ends_with_0_though_a_thread_is_in_the_store(tmp_path, capfd):
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    device = context.Process(target=hung_heartbeat.run_device, args=(server.port,))
    device.start()
    device.join(timeout=300)
    assert device.exitcode == 0
    assert capfd.readouterr().out == "trained"
