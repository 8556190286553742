"""Whole training jobs on several hosts, by the real command: equal numbers, one writer, no hang."""

import os
import shutil
import signal
import subprocess

import pytest

from dalle import artefact
from tests.two_hosts import (
    ENDLESS,
    IMPATIENT,
    LOOPBACK,
    SAMPLES,
    TINY,
    exit_codes,
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
from training.hosts import Patience


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The trees of two hosts that have trained all three models for 50 steps."""
    trees = job_trees(tmp_path_factory.mktemp("finished"), **TINY, max_steps=50)
    with started(trees) as processes:
        assert processes[1].wait(timeout=60) == 0, log_of(trees[1])
        # Whoever started the containers may end all of them now.
        assert {"model/manifest.json", "output/data/report.html"} < written(trees[0])
        assert exit_codes(processes) == [0, 0]
    return trees


def test_two_hosts_have_the_losses_of_one(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("DALLE_DEVICE", "cpu")
    alone = job_tree(tmp_path / "alone", **TINY, max_steps=50)
    assert main(["--root", str(alone.root)]) == 0
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


def test_the_interface_is_the_one_that_has_the_hosts_address(finished):
    for tree, address in zip(finished, LOOPBACK, strict=True):
        assert f"over lo at {address}" in log_of(tree)


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_and_any_number_of_hosts_goes_on(
    finished, tmp_path, monkeypatch
):
    trees = job_trees(tmp_path, **TINY, max_steps=50)
    with started(trees) as processes:
        wait_for_step(trees, processes, "transformer", 20)
        processes[1].send_signal(signal.SIGTERM)
        assert exit_codes(processes) == [0, 0]
    assert artefact.load(trees[0].root / "model").components() == [
        "dvae",
        "transformer",
        "tokenizer",
    ]
    interrupted_at = max(step for stage, step, _ in metrics_of(trees[0]) if stage != "dvae")
    assert 20 <= interrupted_at < 50, "the stop came too late to show anything"

    monkeypatch.setenv("DALLE_DEVICE", "cpu")
    alone = job_tree(tmp_path / "alone", **TINY, max_steps=50)
    shutil.copytree(trees[0].root / "checkpoints", alone.root / "checkpoints")
    assert main(["--root", str(alone.root)]) == 0
    assert metrics_of(alone) == pytest.approx(metrics_of(finished[0]), rel=1e-4)

    # The second host has no checkpoints: it goes on from the first one's.
    assert written(trees[1]) == set()
    run(trees)
    assert metrics_of(trees[0]) == metrics_of(finished[0])


@pytest.mark.parametrize(
    ("lost", "number", "says"),
    [
        (0, signal.SIGKILL, "host 127.0.0.1 is lost: the connection broke"),
        (1, signal.SIGSTOP, "host 127.0.0.2 is lost: no sign of life for 3 s"),
    ],
)
def test_a_lost_host_is_named_by_the_other_which_ends(tmp_path, lost, number, says):
    trees = job_trees(tmp_path, **ENDLESS)
    with started(trees, program=("-c", IMPATIENT)) as processes:
        wait_for_step(trees, processes, "clip", 3)
        processes[lost].send_signal(number)
        assert processes[1 - lost].wait(timeout=60) == 1
    assert trees[1 - lost].failure.startswith(says)


def test_a_failure_of_one_host_is_in_the_failure_files_of_all(tmp_path):
    trees = job_trees(tmp_path, **ENDLESS)
    (trees[1].root / "input/data/train/0.txt").write_text("another caption than the first host's")
    with started(trees, program=("-c", IMPATIENT)) as processes:
        assert exit_codes(processes) == [1, 1]
    assert trees[1].failure.startswith("this host differs from the first one: its ")
    assert trees[0].failure.startswith("host 127.0.0.2 failed: this host differs from the first")


def test_a_host_that_does_not_come_is_named(tmp_path, monkeypatch):
    for library in ("GLOO", "NCCL"):  # otherwise set, in this process, by the command
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("DALLE_DEVICE", "cpu")
    tree = job_trees(tmp_path, **TINY)[0]
    arguments = ["--root", str(tree.root), "--rendezvous-port", str(free_port())]
    assert main(arguments, patience=Patience(join=0.5)) == 1
    assert tree.failure.startswith("these hosts did not come within 0.5 s: 127.0.0.2")


@pytest.fixture
def two_namespaces():
    """Two network namespaces with a link between them: names, and their addresses."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip` (iproute2)")
    names = [f"dalle-{os.getpid()}-{number}" for number in (1, 2)]
    links = [f"veth{os.getpid() % 100_000}{end}" for end in "ab"]
    addresses = ["192.0.2.1", "192.0.2.2"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)

    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1],
           "netns", names[1])  # fmt: skip
        for name, link, address in zip(names, links, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names, links, addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_hosts_in_their_own_networks_train_together_and_notice_a_cut(tmp_path, two_namespaces):
    names, links, addresses = two_namespaces
    trees = job_trees(tmp_path, hosts=addresses, samples=SAMPLES[:16], **ENDLESS)
    in_namespace = [("ip", "netns", "exec", name) for name in names]
    with started(
        trees, program=("-c", IMPATIENT), before=lambda number: in_namespace[number]
    ) as processes:
        wait_for_step(trees, processes, "clip", 3)
        subprocess.run(["ip", "-n", names[1], "link", "set", links[1], "down"], check=True)
        assert exit_codes(processes) == [1, 1]
    for tree, link, address in zip(trees, links, addresses, strict=True):
        assert f"over {link} at {address}" in log_of(tree)
    for tree, other in zip(trees, reversed(addresses), strict=True):
        assert tree.failure.startswith(f"host {other} is lost: ")
