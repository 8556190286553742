"""training.stopping: work ends soon after a stop, and what was interrupted is made up for."""

import io
import json
import logging
import os
import signal
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle import artefact as artefacts
from dalle.models.dvae import DiscreteVAE
from dalle.preprocess.images import encode_image
from training.__main__ import main
from training.config.hyperparameters import parse
from training.data import open as opening
from training.data.batching import token_cache
from training.data.sources.index import Pairs
from training.engine.torch_engine import TorchEngine
from training.job import inputs
from training.loop.checkpoints import Checkpoints
from training.loop.loop import fit
from training.loop.metrics import Metrics
from training.stopping import NEVER, DelayedStop, Stopped, unless_stopped


def test_items_are_given_until_the_stop_and_not_one_more():
    stop = threading.Event()
    items = unless_stopped(range(5), stop)
    assert [next(items), next(items)] == [0, 1]
    stop.set()
    with pytest.raises(Stopped):
        next(items)
    assert list(unless_stopped(range(5), NEVER)) == [0, 1, 2, 3, 4]


def test_a_delayed_stop_follows_some_seconds_after_another():
    stop, now = threading.Event(), [100.0]
    delayed = DelayedStop(stop, 5.0, clock=lambda: now[0])
    now[0] = 900.0
    assert not delayed.is_set(), "the seconds have not begun"
    stop.set()
    assert not delayed.is_set()
    now[0] += 4.9
    assert not delayed.is_set()
    now[0] += 0.1
    assert delayed.is_set()


def test_work_that_was_done_when_the_stop_came_is_not_lost():
    stop, done = threading.Event(), []
    for item in unless_stopped(range(3), stop):
        done.append(item)
        if item == 2:
            stop.set()
    assert done == [0, 1, 2]


class TinyBatches:
    num_per_epoch = 5

    def batch(self, step):
        return torch.full((2, 2), float(step))


class TinyStage:
    """Sets a stop within its n-th validation, and ends that one early."""

    name = "clip"

    def __init__(self, stop=NEVER, interrupted=None):
        torch.manual_seed(1)
        self.model = nn.Linear(2, 2)
        self.batches = TinyBatches()
        self.stop, self.interrupted, self.num_validations = stop, interrupted, 0

    def loss(self, batch, progress):
        return F.mse_loss(self.model(batch), batch), {}

    def validate(self):
        for part in unless_stopped(range(2), self.stop):
            if part == 0:
                self.num_validations += 1
                if self.num_validations == self.interrupted:
                    self.stop.set()
        return {"validation_loss": self.model.weight.sum().item()}

    def identity(self):
        return {}


@pytest.fixture
def run(tmp_path):
    """A function that fits a TinyStage for 8 steps with validations behind the 4th and the 8th."""

    def run(stage, place):
        settings = parse({"max_steps": "8", "num_validations": "2", "log_every": "100"})
        root = tmp_path / place
        with Metrics(root / "metrics.jsonl", root / "tb", output=io.StringIO()) as metrics:
            result = fit(
                stage,
                settings,
                engine=TorchEngine(stage, settings.clip, torch.device("cpu")),
                checkpoints=Checkpoints(root / "checkpoints", identity={}),
                metrics=metrics,
                stop=stage.stop,
            )
        lines = (root / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        validations = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
        return result, validations

    return run


@pytest.mark.parametrize(("interrupted", "at_step"), [(1, 4), (2, 8)])
def test_an_interrupted_validation_is_made_up_for_when_the_run_goes_on(run, interrupted, at_step):
    whole, expected = run(TinyStage(), "whole")
    assert [step for step, _ in expected] == [4, 8]

    stopped, validations = run(TinyStage(threading.Event(), interrupted), "parts")
    assert (stopped.step, stopped.is_finished) == (at_step, False)
    assert validations == expected[: interrupted - 1]

    resumed, validations = run(TinyStage(), "parts")
    assert (resumed.step, resumed.is_finished) == (8, True)
    assert validations == expected
    assert resumed.validation == whole.validation

    again = TinyStage()
    assert run(again, "parts")[1] == expected
    assert again.num_validations == 0, "the checkpoint has what was made up for"


TINY = {"size": "tiny", "image_size": 16, "tokenizer_kind": "word", "text_length": 4}


@pytest.fixture
def tree(opt_ml):
    """A job that could train on 12 pairs."""
    channel = opt_ml.add_channel("train")
    for number in range(12):
        pixels = np.full((16, 16, 3), 20 * number, dtype=np.uint8)
        (channel / f"{number:02}.png").write_bytes(encode_image(pixels, "png"))
        (channel / f"{number:02}.txt").write_text(f"picture {number}")
    opt_ml.set_hyperparameters(**TINY, batch_size=4, max_steps=2, num_validations=0)
    return opt_ml


def sigterm_at_image(monkeypatch, number):
    """Send SIGTERM to this process while the n-th image is decoded; returns those decoded."""
    decode, decoded = Pairs.image, []

    def decode_and_signal(self, index):
        decoded.append(index)
        if len(decoded) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, index)

    monkeypatch.setattr(Pairs, "image", decode_and_signal)
    return decoded


def test_sigterm_while_images_are_decoded_ends_the_job_in_order(tree, monkeypatch, caplog):
    decoded = sigterm_at_image(monkeypatch, 5)
    assert main(["--root", str(tree.root)]) == 0
    assert decoded == [0, 1, 2, 3, 4]
    assert "stopped before there was anything to train" in caplog.text
    assert not (tree.root / "output" / "failure").exists()
    assert not list((tree.root / "model").iterdir())


def test_the_same_job_then_trains_as_if_nothing_had_been(tree, monkeypatch):
    with monkeypatch.context() as patch:
        sigterm_at_image(patch, 5)
        assert main(["--root", str(tree.root)]) == 0
    assert main(["--root", str(tree.root)]) == 0
    stages = artefacts.load(tree.root / "model").manifest.stages
    assert [(stage.steps, stage.is_finished) for stage in stages] == [(2, True)] * 3


@pytest.fixture
def large_set(tree, monkeypatch):
    """The same job, as if its pairs were too many to be decoded: two are encoded at a time, and
    four are written together."""
    monkeypatch.setattr(opening, "is_small", lambda *_: False)
    monkeypatch.setattr(token_cache, "images_per_chunk", lambda image_size: 2)
    monkeypatch.setattr(inputs, "cache_tokens", partial(token_cache.cache_tokens, part_pairs=4))
    tree.set_hyperparameters(**TINY, batch_size=4, max_steps=6, num_validations=0, num_workers=0)
    return tree


def test_sigterm_while_a_large_set_is_encoded_ends_the_job_and_the_next_one_goes_on(
    large_set, monkeypatch, caplog
):
    encode, sizes = DiscreteVAE.encode, []

    def encode_and_signal(self, images):
        sizes.append(len(images))
        if len(sizes) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(DiscreteVAE, "encode", encode_and_signal)
        assert main(["--root", str(large_set.root)]) == 0
    assert sizes[:3] == [2, 2, 2]
    assert 2 not in sizes[3:], "only the report follows"
    assert artefacts.load(large_set.root / "model").components() == ["dvae", "tokenizer"]
    assert not (large_set.root / "output" / "failure").exists()
    with caplog.at_level(logging.INFO, logger="training"):
        assert main(["--root", str(large_set.root)]) == 0
    assert "image tokens: 1 of 3 parts are cached already" in caplog.text
    stages = artefacts.load(large_set.root / "model").manifest.stages
    assert [(stage.stage, stage.is_finished) for stage in stages] == [
        ("dvae", True),
        ("transformer", True),
        ("clip", True),
    ]
