"""Containers of the image as algo-1 and algo-2 on a network of their own: they train as one process
does, and when one is killed, frozen or cut off, the other ends by itself and names it."""

import itertools
import os
from contextlib import ExitStack, contextmanager

import pytest

from infra.docker import docker
from infra.local.opt_ml import OptMl, start_training
from tests.forked import Forked
from tests.image.docker_fixtures import TINY
from tests.training.two_hosts import LONG_TIMEOUTS, log_of, metrics_of, train, written

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("image")]

HOSTS = ("algo-1", "algo-2")
FIRST, SECOND = range(2)
SECONDS = 60  # from the loss of a host to the end of the others, as promised
NUMBERS = itertools.count()


def trees_of(root, **hyperparameters):
    """Each host's tree of the contract; the pairs are mounted as the channel `train`."""
    trees = []
    for host in HOSTS:
        tree = OptMl(root / host, "platform")
        tree.add_channel("train")
        place = {"current_host": host, "hosts": list(HOSTS), "network_interface_name": "ethwe"}
        tree.write("resourceconfig", place)
        tree.set_hyperparameters(**TINY, log_every="1", warmup_steps="2", **hyperparameters)
        trees.append(tree)
    return trees


@contextmanager
def hosts(trees, pairs):
    """Start the hosts' containers with the default time limits; yield them and the network."""
    with ExitStack() as stack:
        network = f"dalle-{os.getpid()}-{next(NUMBERS)}"
        docker("network", "create", network)
        stack.callback(docker, "network", "rm", network)
        containers = [
            stack.enter_context(
                start_training(
                    tree,
                    *("--network", network, "--network-alias", host),
                    *("--env", "OMP_NUM_THREADS=1", "--memory", "2g"),
                    channels={"train": pairs},
                )
            )
            for tree, host in zip(trees, HOSTS, strict=True)
        ]
        yield containers, network


def test_two_containers_have_the_losses_of_one_process_and_one_of_them_writes(pairs, tmp_path):
    trees = trees_of(tmp_path / "two", max_steps="50", num_validations="0")
    with hosts(trees, pairs) as (containers, _):
        statuses = [container.wait() for container in containers]
        assert statuses == [0, 0], "\n".join(container.log for container in containers)
        for rank, (container, host) in enumerate(zip(containers, HOSTS, strict=True)):
            container.wait_for(rf"rank {rank} of 2 on host {host}, over eth0 at ")
    one = OptMl(tmp_path / "one", "platform")
    one.write("hyperparameters", (trees[0].root / "input/config/hyperparameters.json").read_text())
    environment = os.environ | {"DALLE_DEVICE": "cpu", "SM_CHANNEL_TRAIN": str(pairs)}
    words = ["--root", str(one.root)]
    alone = Forked(train, words, LONG_TIMEOUTS, None, log=one.root / "log", environment=environment)
    assert alone.wait(timeout=180) == 0, log_of(one)
    of_two, of_one = metrics_of(trees[0]), metrics_of(one)
    assert {stage for stage, step, _ in of_two if step == 50} == {"dvae", "transformer", "clip"}
    assert of_two == pytest.approx(of_one, rel=1e-4)
    assert "model/manifest.json" in written(trees[0])
    assert written(trees[1]) == set()


def kill(container, network):
    docker("kill", container.id)


def freeze(container, network):
    docker("pause", container.id)


def cut_off(container, network):
    docker("network", "disconnect", "--force", network, container.id)


LOSSES = {
    "killed, the first": (kill, FIRST),
    "frozen, the first": (freeze, FIRST),
    "frozen, the second": (freeze, SECOND),
    "cut off, the second": (cut_off, SECOND),
}


@pytest.fixture(scope="module")
def survivors(image, pairs, tmp_path_factory):
    """Exit status and failure file of each job's remaining host, by the loss of the other.

    All jobs run at once, as each waits half a minute before it notices the loss.
    """
    with ExitStack() as stack:
        jobs = {}
        for number, loss in enumerate(LOSSES):
            root = tmp_path_factory.mktemp(f"loss-{number}")
            trees = trees_of(root, stage="clip", max_steps="1000000", num_validations="0")
            jobs[loss] = (trees, *stack.enter_context(hosts(trees, pairs)))
        for _, (first, _), _ in jobs.values():
            first.wait_for("clip_step=3;")
        for (befalls, lost), (_, containers, network) in zip(
            LOSSES.values(), jobs.values(), strict=True
        ):
            befalls(containers[lost], network)
        ends = {}
        for (loss, (_, lost)), (trees, containers, _) in zip(
            LOSSES.items(), jobs.values(), strict=True
        ):
            left = 1 - lost
            ends[loss] = (containers[left].wait(SECONDS), trees[left].failure)
            if loss.startswith("cut off"):  # it lives, and is as alone as the other
                status = containers[lost].wait(SECONDS)
                ends["cut off, itself"] = (status, trees[lost].failure)
            if loss.startswith("frozen"):
                docker("unpause", containers[lost].id)
        yield ends


@pytest.mark.parametrize(
    ("loss", "lost"),
    [
        ("killed, the first", "algo-1"),
        ("frozen, the first", "algo-1"),
        ("frozen, the second", "algo-2"),
        ("cut off, the second", "algo-2"),
        ("cut off, itself", "algo-1"),
    ],
)
def test_the_remaining_host_fails_within_a_minute_and_names_the_lost_one(survivors, loss, lost):
    status, failure = survivors[loss]
    assert status == 1
    assert failure.startswith(f"host {lost} is lost: ")
