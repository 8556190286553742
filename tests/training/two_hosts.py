"""Training jobs on several hosts for tests: one directory like /opt/ml and one process for each.

A host's name is its address: of the loopback interface, or in a network of
`tests.training.host_networks`."""

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress

from PIL import Image

from infra.local.opt_ml import OptMl
from tests.forked import Forked
from tests.training.host_networks import enter
from training import rainbow
from training.__main__ import main
from training.distributed.topology import Timeouts
from training.report import page

TINY = {
    "size": "tiny",
    "tokenizer_kind": "word",
    "text_length": 8,
    "batch_size": 8,
    "warmup_steps": 2,
    "log_every": 1,
    "num_validations": 1,
}
ENDLESS = TINY | {"stage": "clip", "max_steps": 1_000_000}
LOOPBACK = ("127.0.0.1", "127.0.0.2")
SAMPLES = rainbow.samples()[::300]

# Upper bounds that only a failing test waits for: the machine may be busy with others.
LONG_TIMEOUTS = Timeouts(join=300, silence=30, collective=300)
# For tests that wait for a silent host to be noticed. A busy machine must not silence the others.
SHORT_TIMEOUTS = Timeouts(join=300, silence=10, collective=300)


def fill(directory, samples=SAMPLES):
    for number, sample in enumerate(samples):
        Image.fromarray(sample.picture()).save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text(sample.caption)
    return directory


def job_tree(root, *, host="algo-1", hosts=("algo-1",), samples=SAMPLES, **hyperparameters):
    """A tree as the SDK's local mode lays it out: with an interface that does not exist."""
    tree = OptMl(root, "local")
    resources = {"current_host": host, "hosts": list(hosts), "network_interface_name": "ethwe"}
    tree.write("resourceconfig", resources)
    for name, chosen in (("train", samples), ("validation", samples[:4])):
        fill(tree.add_channel(name), chosen)
    tree.set_hyperparameters(**hyperparameters)
    return tree


def job_trees(root, hosts=LOOPBACK, **hyperparameters):
    """A tree for each host."""
    return [job_tree(root / h, host=h, hosts=hosts, **hyperparameters) for h in hosts]


def free_port():
    with socket.create_server((LOOPBACK[0], 0)) as server:
        return server.getsockname()[1]


@contextmanager
def started(trees, network=None):
    """The command itself on all hosts, as processes that are killed at the end if they still run.

    network: of `tests.training.host_networks`, whose namespaces the hosts are in.
    """
    port = str(free_port())
    with _ended_at_last() as processes:
        for tree, namespace in zip(trees, _namespaces(trees, network), strict=True):
            with (tree.root / "log").open("w") as log:
                words = [] if namespace is None else ["ip", "netns", "exec", namespace]
                words += [sys.executable, "-m", "training", "--root", str(tree.root)]
                processes.append(
                    subprocess.Popen(
                        [*words, "--rendezvous-port", port],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"OMP_NUM_THREADS": "1", "DALLE_DEVICE": "cpu"},
                    )
                )
        yield processes


@contextmanager
def forked(trees, network=None, *, timeouts=LONG_TIMEOUTS, work=None):
    """The same as `started`, sooner: forks of a process that has torch, see
    `tests.forked`.

    work: a function of a module to run in place of `train`.
    """
    port = str(free_port())
    with _ended_at_last() as processes:
        for tree, namespace in zip(trees, _namespaces(trees, network), strict=True):
            words = ["--root", str(tree.root), "--rendezvous-port", port]
            (tree.root / "log").unlink(missing_ok=True)
            processes.append(
                Forked(
                    work or train,
                    words,
                    timeouts,
                    namespace,
                    log=tree.root / "log",
                    environment=os.environ | {"DALLE_DEVICE": "cpu"},
                )
            )
        yield processes


def train(words, timeouts, namespace):
    """Main function of a fork. Its report has no charts: they take most of a tiny job's time."""
    vars(page).update(dict.fromkeys(("plot_curves", "plot_usage"), lambda _: ""))
    return train_with_charts(words, timeouts, namespace)


def train_with_charts(words, timeouts, namespace):
    if namespace is not None:
        enter(namespace)
    return main(words, timeouts=timeouts)


def _namespaces(trees, network):
    return (None,) * len(trees) if network is None else network.namespaces


@contextmanager
def _ended_at_last():
    processes = []
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def log_of(tree):
    log = tree.root / "log"
    return log.read_text() if log.exists() else ""


def wait_for_step(trees, processes, stage, step):
    """Wait until the first host has reported a step; the end of any process is an error."""
    pattern = re.compile(rf"{stage}_step={step};")
    while not pattern.search(log_of(trees[0])):
        for tree, process in zip(trees, processes, strict=True):
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.05)
                logs = "\n".join(log_of(each) for each in trees)
                raise AssertionError(f"{tree.root.name} ended with {code}: {logs}")


def exit_codes(processes, seconds=300):
    return [process.wait(timeout=seconds) for process in processes]


def run(trees, network=None, *, work=None):
    with forked(trees, network, work=work) as processes:
        codes = exit_codes(processes)
    assert codes == [0] * len(trees), "\n".join(log_of(tree) for tree in trees)


def metrics_of(tree):
    """(stage, step, name) -> number, without what depends on the clock."""
    records = [
        json.loads(line)
        for line in (tree.root / "output/data/metrics.jsonl").read_text().splitlines()
    ]
    keys = {"stage", "step", "seconds", "samples_per_second"}
    return {
        (record["stage"], record["step"], name): value
        for record in records
        for name, value in record.items()
        if name not in keys
    }


def written(tree):
    """Paths under its root that a host wrote."""
    paths = (path.relative_to(tree.root) for path in tree.root.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != "input" and str(path) != "log"}
