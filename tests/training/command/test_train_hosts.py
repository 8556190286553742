"""Whole training jobs on several hosts, by the real command: equal numbers, one writer, no hang."""

import shutil
import signal
from contextlib import ExitStack

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


def until_endless(stack, trees, network):
    """Start an endless job on three hosts, and wait until it trains."""
    processes = stack.enter_context(forked(trees, network, timeouts=SHORT_TIMEOUTS))
    wait_for_step(trees, processes, "clip", 3)
    return processes


def endless_trees(root, network):
    settings = ENDLESS | {"batch_size": 6}
    return job_trees(root, network.hosts, samples=SAMPLES[:18], **settings)


def assert_named_by_the_others(trees, processes, lost, says, network):
    others = [number for number in range(3) if number != lost]
    assert [processes[number].wait(timeout=300) for number in others] == [1, 1]
    for number in others:
        assert trees[number].failure.startswith(f"host {network.hosts[lost]} {says}")


LOST = [
    (signal.SIGKILL, 0, "is lost: the connection broke"),
    (signal.SIGKILL, 2, SILENT),
    (signal.SIGSTOP, 0, SILENT),
    (signal.SIGSTOP, 2, SILENT),
]


def test_a_killed_or_frozen_host_is_named_by_the_others_which_end(three, tmp_path):
    jobs = []
    with ExitStack() as stack:  # all of them wait for the silence together
        for number, (sent, lost, says) in enumerate(LOST):
            trees = endless_trees(tmp_path / str(number), three)
            processes = until_endless(stack, trees, three)
            processes[lost].send_signal(sent)
            jobs.append((trees, processes, lost, says))
        for job in jobs:
            assert_named_by_the_others(*job, three)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_host_that_is_cut_off_is_named_by_the_others_and_misses_them(three, tmp_path, lost):
    trees = endless_trees(tmp_path, three)
    with ExitStack() as stack:
        processes = until_endless(stack, trees, three)
        with three.cut(lost):
            assert_named_by_the_others(trees, processes, lost, SILENT, three)
            assert processes[lost].wait(timeout=300) == 1
            others = (three.hosts[number] for number in range(3) if number != lost)
            either = tuple(f"host {host} {SILENT}" for host in others)
            assert trees[lost].failure.startswith(either)


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
