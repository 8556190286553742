"""Training jobs on several hosts for tests: one directory like /opt/ml and one process for each.

A host's name is an address of the loopback interface, or whatever a test gives.
"""

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress

from PIL import Image

from infra.local.opt_ml import OptMl
from training import rainbow

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

# The command itself, but sooner at the end of its patience.
IMPATIENT = """
import sys
from training.__main__ import main
from training.hosts import Patience
sys.exit(main(sys.argv[1:], patience=Patience(join=60, silence=3, collective=60)))
"""


def job_tree(root, *, host="algo-1", hosts=("algo-1",), samples=SAMPLES, **hyperparameters):
    """A tree as the SDK's local mode lays it out: with an interface that does not exist."""
    tree = OptMl(root, "local")
    resources = {"current_host": host, "hosts": list(hosts), "network_interface_name": "ethwe"}
    tree.write("resourceconfig", resources)
    for name, chosen in (("train", samples), ("validation", samples[:4])):
        channel = tree.add_channel(name)
        for number, sample in enumerate(chosen):
            Image.fromarray(sample.picture()).save(channel / f"{number}.png")
            (channel / f"{number}.txt").write_text(sample.caption)
    tree.set_hyperparameters(**hyperparameters)
    return tree


def job_trees(root, hosts=LOOPBACK, **hyperparameters):
    """A tree for each host."""
    return [job_tree(root / h, host=h, hosts=hosts, **hyperparameters) for h in hosts]


def free_port():
    with socket.create_server((LOOPBACK[0], 0)) as server:
        return server.getsockname()[1]


@contextmanager
def started(trees, *, program=("-m", "training"), before=lambda number: ()):
    """The processes of all hosts, killed at the end if they still run.

    before(number): words before a host's command, such as `ip netns exec`.
    """
    port = str(free_port())
    processes = []
    try:
        for number, tree in enumerate(trees):
            log = (tree.root / "log").open("w")
            command = [sys.executable, *program, "--root", str(tree.root)]
            processes.append(
                subprocess.Popen(
                    [*before(number), *command, "--rendezvous-port", port],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "DALLE_DEVICE": "cpu"},
                )
            )
            log.close()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def log_of(tree):
    return (tree.root / "log").read_text()


def wait_for_step(trees, processes, stage, step):
    """Until the first host has reported a step of a stage; the end of any process is an error."""
    pattern = re.compile(rf"{stage}_step={step};")
    while not pattern.search(log_of(trees[0])):
        for tree, process in zip(trees, processes, strict=True):
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=0.05)
                logs = "\n".join(log_of(each) for each in trees)
                raise AssertionError(f"{tree.root.name} ended with {code}: {logs}")


def exit_codes(processes, seconds=60):
    return [process.wait(timeout=seconds) for process in processes]


def run(trees):
    with started(trees) as processes:
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
    """What a host wrote, by path under its root."""
    paths = (path.relative_to(tree.root) for path in tree.root.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != "input" and str(path) != "log"}
