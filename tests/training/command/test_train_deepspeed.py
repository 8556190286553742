"""A whole job by engine=deepspeed, by the command: killed, then resumed by fewer hosts."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from dalle import artefact
from tests.forked import Forked
from tests.training.two_hosts import (
    LONG_TIMEOUTS,
    SHORT_TIMEOUTS,
    TINY,
    forked,
    job_tree,
    job_trees,
    log_of,
    metrics_of,
    train,
    wait_for_step,
)
from training.__main__ import main

pytestmark = pytest.mark.slow

NUM_STEPS = 12
JOB = TINY | {
    "max_steps": NUM_STEPS,
    "num_validations": 2,
    "muon_learning_rate": 0,
    "ema_decay": 0.9,
    "transformer_gradient_accumulation_steps": 2,
    "transformer_activation_checkpointing": "true",
    "checkpoint_minutes": 1e-5,
}
BY_DEEPSPEED = JOB | {"engine": "deepspeed", "zero_stage": 3, "offload_optimizer": "true"}


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory):
    """The tree of one host that has trained all three models with plain torch, uninterrupted."""
    tree = job_tree(tmp_path_factory.mktemp("torch") / "alone", **JOB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALLE_DEVICE", "cpu")
        assert main(["--root", str(tree.root)]) == 0
    return tree


def all_weights(model):
    """As one vector. Single weights cannot be compared: where a gradient is nothing but rounding,
    Adam still takes steps of a whole learning rate."""
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def without_compiler():
    """An environment that has no command but Python, and nowhere to write but /tmp."""
    return os.environ | {
        "PATH": str(Path(sys.executable).parent),
        "HOME": "/nonexistent",
        "DALLE_DEVICE": "cpu",
    }


def test_a_killed_job_of_two_hosts_is_ended_by_one_with_the_numbers_of_torch(
    by_torch, tmp_path, monkeypatch
):
    trees = job_trees(tmp_path, **BY_DEEPSPEED)
    with forked(trees, timeouts=SHORT_TIMEOUTS) as processes:
        wait_for_step(trees, processes, "transformer", 5)
        processes[1].send_signal(signal.SIGKILL)
        assert processes[0].wait(timeout=300) == 1
    assert trees[0].failure.startswith("host 127.0.0.2 is lost: no sign of life for 10 s")
    assert "dvae is trained by torch's engine" in log_of(trees[0])
    interrupted_at = max(step for stage, step, _ in metrics_of(trees[0]) if stage != "dvae")
    assert 5 <= interrupted_at < NUM_STEPS, "the end came too late to show anything"

    alone = job_tree(tmp_path / "alone", **BY_DEEPSPEED)
    shutil.copytree(trees[0].root / "checkpoints", alone.root / "checkpoints")
    words, log = ["--root", str(alone.root)], alone.root / "log"
    ended = Forked(train, words, LONG_TIMEOUTS, None, log=log, environment=without_compiler()).wait(
        timeout=300
    )
    assert ended == 0, log_of(alone)
    assert "transformer continues at step" in log_of(alone)
    assert metrics_of(alone) == pytest.approx(metrics_of(by_torch), rel=1e-4)

    ours, theirs = (artefact.load(tree.root / "model") for tree in (alone, by_torch))
    assert ours.components() == ["dvae", "transformer", "clip", "tokenizer"]
    for name in ("dvae", "transformer", "clip"):
        found, expected = (all_weights(getattr(each, name)) for each in (ours, theirs))
        assert (found - expected).norm() < 2e-4 * expected.norm(), name

    # Plain torch has a state of another form.
    other = job_tree(tmp_path / "other", **JOB)
    shutil.copytree(alone.root / "checkpoints", other.root / "checkpoints")
    monkeypatch.setenv("DALLE_DEVICE", "cpu")
    assert main(["--root", str(other.root)]) == 1
    assert "engine was 'deepspeed', this job has 'torch'" in other.failure
