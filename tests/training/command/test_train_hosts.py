"""Whole training jobs on several hosts, by the real command: equal numbers, one writer, no hang."""

import shutil
import signal
from contextlib import nullcontext

import pytest

from dalle import artefact
from tests.training import host_networks
from tests.training.two_hosts import (
    ENDLESS,
    SAMPLES,
    SHORT_TIMEOUTS,
    TINY,
    exit_codes,
    forked,
    free_port,
    job_tree,
    job_trees,
    log_of,
    metrics_of,
    run,
    started,
    wait_for_step,
    written,
)
from training.__main__ import main
from training.distributed.topology import Timeouts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def three():
    """Three hosts in network namespaces of their own, or on loopback addresses."""
    with host_networks.network(3) as network:
        yield network


@pytest.fixture(scope="module")
def two(three):
    return three.first(2)


@pytest.fixture(scope="module")
def finished(two, tmp_path_factory):
    """The trees of two hosts that have trained all three models for 50 steps."""
    trees = job_trees(tmp_path_factory.mktemp("finished"), two.hosts, **TINY, max_steps=50)
    with started(trees, two) as processes:
        assert processes[1].wait(timeout=300) == 0, log_of(trees[1])
        # Whoever started the containers may end all of them now.
        assert {"model/manifest.json", "output/data/report.html"} < written(trees[0])
        assert exit_codes(processes) == [0, 0]
    return trees


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The tree of one host that has trained on the same."""
    tree = job_tree(tmp_path_factory.mktemp("alone") / "ml", **TINY, max_steps=50)
    run([tree])
    return tree


def test_two_hosts_have_the_losses_of_one(finished, alone):
    of_one, of_two = metrics_of(alone), metrics_of(finished[0])
    assert of_two.keys() == of_one.keys()
    assert {stage for stage, _, _ in of_one} == {"dvae", "transformer", "clip"}
    assert of_two == pytest.approx(of_one, rel=1e-4)


def test_only_the_first_host_writes_and_the_others_say_so_in_a_line(finished):
    first, second = finished
    assert artefact.load(first.root / "model").components() == [
        "dvae",
        "transformer",
        "clip",
        "tokenizer",
    ]
    assert {"output/data/report.html", "output/data/metrics.jsonl"} < written(first)
    assert any(path.startswith("checkpoints/clip/") for path in written(first))
    assert written(second) == set()
    assert log_of(second).count("this rank trains along") == 1
    assert "wrote" not in log_of(second)


def test_the_interface_is_the_one_that_has_the_hosts_address(finished, two):
    for tree, address in zip(finished, two.hosts, strict=True):
        assert f"over {two.interface} at {address}" in log_of(tree)


def interrupted(trees, network=None):
    """Stop a job during its second stage by SIGTERM to its last host."""
    with forked(trees, network) as processes:
        wait_for_step(trees, processes, "transformer", 20)
        processes[-1].terminate()
        assert exit_codes(processes) == [0] * len(trees)
    components = artefact.load(trees[0].root / "model").components()
    assert components == ["dvae", "transformer", "tokenizer"]
    last = max(step for stage, step, _ in metrics_of(trees[0]) if stage != "dvae")
    assert 20 <= last < 50, "the stop came too late to show anything"


def resumed(trees, checkpoints, network=None):
    """Let a job on other hosts go on from the checkpoints; those of its first host."""
    shutil.copytree(checkpoints, trees[0].root / "checkpoints")
    run(trees, network)
    assert "transformer continues at step" in log_of(trees[0])
    return metrics_of(trees[0])


def test_a_signal_to_one_host_stops_all_and_one_or_two_go_on(finished, two, tmp_path):
    trees = job_trees(tmp_path / "two", two.hosts, **TINY, max_steps=50)
    interrupted(trees, two)
    assert written(trees[1]) == set()
    checkpoints = trees[0].root / "checkpoints"
    one = job_tree(tmp_path / "one", **TINY, max_steps=50)
    assert resumed([one], checkpoints) == pytest.approx(metrics_of(finished[0]), rel=1e-4)
    again = job_trees(tmp_path / "again", two.hosts, **TINY, max_steps=50)
    assert resumed(again, checkpoints, two) == metrics_of(finished[0])


def test_a_job_of_one_host_goes_on_on_two(alone, two, tmp_path):
    one = job_tree(tmp_path / "one", **TINY, max_steps=50)
    interrupted([one])
    trees = job_trees(tmp_path / "two", two.hosts, **TINY, max_steps=50)
    metrics = resumed(trees, one.root / "checkpoints", two)
    assert metrics == pytest.approx(metrics_of(alone), rel=1e-4)


SILENT = f"is lost: no sign of life for {SHORT_TIMEOUTS.silence:g} s"


@pytest.mark.parametrize(
    ("how", "lost", "says"),
    [
        ("killed", 0, "is lost: the connection broke"),
        ("killed", 2, SILENT),
        ("frozen", 0, SILENT),
        ("frozen", 2, SILENT),
        ("cut off", 0, SILENT),
        ("cut off", 2, SILENT),
    ],
)
def test_a_lost_host_is_named_by_the_others_which_end(three, tmp_path, how, lost, says):
    trees = job_trees(tmp_path, three.hosts, samples=SAMPLES[:18], **ENDLESS | {"batch_size": 6})
    others = [number for number in range(3) if number != lost]
    with forked(trees, three, timeouts=SHORT_TIMEOUTS) as processes:
        wait_for_step(trees, processes, "clip", 3)
        if how != "cut off":
            processes[lost].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        with three.cut(lost) if how == "cut off" else nullcontext():
            assert [processes[number].wait(timeout=300) for number in others] == [1, 1]
            if how == "cut off":  # it misses the others as they miss it
                assert processes[lost].wait(timeout=300) == 1
                either = tuple(f"host {three.hosts[number]} {SILENT}" for number in others)
                assert trees[lost].failure.startswith(either)
    for number in others:
        assert trees[number].failure.startswith(f"host {three.hosts[lost]} {says}")


def test_a_failure_of_one_host_is_in_the_failure_files_of_all(two, tmp_path):
    trees = job_trees(tmp_path, two.hosts, **ENDLESS)
    (trees[1].root / "input/data/train/0.txt").write_text("another caption than the first host's")
    with forked(trees, two) as processes:
        assert exit_codes(processes) == [1, 1]
    assert trees[1].failure.startswith("this host differs from the first one: its ")
    says = f"host {two.hosts[1]} failed: this host differs from the first"
    assert trees[0].failure.startswith(says)


def test_a_host_that_does_not_come_is_named(tmp_path, monkeypatch):
    for library in ("GLOO", "NCCL"):  # otherwise set, in this process, by the command
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("DALLE_DEVICE", "cpu")
    tree = job_trees(tmp_path, **TINY)[0]
    arguments = ["--root", str(tree.root), "--rendezvous-port", str(free_port())]
    assert main(arguments, timeouts=Timeouts(join=0.5)) == 1
    assert tree.failure.startswith("these hosts did not come within 0.5 s: 127.0.0.2")
