"""training.soak: jobs that are killed and stopped at random moments end like undisturbed ones."""

import os

import pytest

from tests.forked import Forked
from tests.training.two_hosts import SHORT_TIMEOUTS, train
from training.soak.__main__ import (
    IN_A_CHECKPOINT,
    KILLS,
    Interruption,
    compare,
    finish,
    interrupt,
    plan,
    soak,
)
from training.soak.job import SmallJob, SoakError, Start

pytestmark = pytest.mark.slow


def fork(arguments, log):
    """`train`, sooner than the command; see tests.forked."""
    environment = os.environ | {"DALLE_DEVICE": "cpu"}
    return Forked(train, arguments, SHORT_TIMEOUTS, None, log=log, environment=environment)


START: Start = fork


def test_a_job_that_is_killed_again_and_again_leaves_what_an_undisturbed_one_does(tmp_path):
    lines: list[str] = []
    done = soak(tmp_path, seed=1, kills=5, steps=6, start=fork, say=lines.append)
    assert done["kills"] >= 5, lines
    assert done["stops"] >= 1, lines
    assert sum(done["hits"].values()) == done["kills"] + done["stops"], lines
    assert done["hits"][IN_A_CHECKPOINT] >= 1, lines


def test_so_does_a_job_of_two_hosts_of_which_one_is_killed(tmp_path):
    lines: list[str] = []
    done = soak(tmp_path, seed=3, kills=2, steps=6, num_hosts=2, start=fork, say=lines.append)
    assert done["kills"] >= 2, lines


def test_moments_come_from_the_seed_and_are_spread_over_all_stages():
    moments = plan(7, kills=48, num_steps=120, num_hosts=2)
    assert moments == plan(7, kills=48, num_steps=120, num_hosts=2)
    assert moments != plan(8, kills=48, num_steps=120, num_hosts=2)
    assert {moment.kind for moment in moments} == {*KILLS, "stop"}
    assert len([moment for moment in moments if moment.kind != "stop"]) == 48
    assert {moment.position // 40 for moment in moments} == {0, 1, 2}
    assert {moment.host for moment in moments} == {0, 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    job = SmallJob(tmp_path_factory.mktemp("soak") / "job", steps=4, num_hosts=1, start=fork)
    finish(job)
    return job


def test_a_bit_that_differs_is_found_and_its_file_named(finished, tmp_path):
    other = SmallJob(tmp_path / "job", steps=4, num_hosts=1, start=fork)
    finish(other)
    compare(finished, other)
    weights = other.paths[0].model / "clip" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SoakError, match=r"left other clip/weights\.safetensors$"):
        compare(finished, other)


def test_a_job_that_forgets_a_checkpoint_is_found_out(tmp_path):
    job = SmallJob(tmp_path / "job", steps=6, num_hosts=1, start=fork)
    moment = Interruption("step", position=2, share=0.5, host=0, moves=False)
    assert interrupt(job, moment).where in ("a step", IN_A_CHECKPOINT)
    newest = job.newest()
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:-100])  # it will be skipped for the one before
    with pytest.raises(SoakError, match=rf"not {newest}; see .*002-127\.0\.0\.1\.txt"):
        finish(job)
