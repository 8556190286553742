"""training.job.trainer: which stages a job trains, in order, and what a stop or a restart keeps."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.errors import ArtefactError, DeviceError, HyperparameterError
from dalle.platform.environment import read_job
from dalle.platform.outputs import prepare_outputs
from training.config.hyperparameters import parse
from training.config.with_channels import stages_to_train
from training.job import trainer
from training.stopping import Stopped


class TinyBatches:
    num_per_epoch = 3
    are_closed = False

    def batch(self, step):
        return torch.randn(4, 2, generator=torch.Generator().manual_seed(step))

    def close(self):
        self.are_closed = True


class TinyStage:
    def __init__(self, name, before_step):
        self.name = name
        self.batches = TinyBatches()
        torch.manual_seed(5)
        self.model = nn.Linear(2, 2)
        self.before_step = before_step

    def loss(self, batch, progress):
        self.before_step(self.name, progress)
        return F.mse_loss(self.model(batch), batch), {}

    def validate(self):
        return {}

    def identity(self):
        return {"stage": self.name}


class TinyJob:
    """Inputs, components and output of a job in one; records the calls."""

    def __init__(self, present=(), before_step=lambda name, progress: None):
        self.present = present
        self.before_step = before_step
        self.calls = []
        self.results = {}

    def open(self, job, hyperparameters, device, stop, ranks):
        self.calls.append(("open", device.type))
        self.hyperparameters = hyperparameters
        return self

    def check(self, names):
        self.calls.append(("check", *names))

    def settle_batch_sizes(self, names):
        return self.hyperparameters

    def share_minutes(self, names):
        return self.hyperparameters

    def log_end(self):
        pass

    def check_checkpoints(self, names):
        self.calls.append(("check checkpoints", *names))

    def build(self, name):
        self.calls.append(("build", name))
        return TinyStage(name, self.before_step)

    def keep(self, stage, result):
        assert not stage.model.training
        assert stage.batches.are_closed
        self.calls.append(("keep", stage.name))
        self.results[stage.name] = result

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def run(opt_ml, monkeypatch):
    """A function that runs a job on the CPU; calls share the checkpoints, as restarts do."""
    opt_ml.add_channel("train")

    def run(parts, raw, stop=None):
        monkeypatch.setattr(trainer, "Inputs", parts.open)
        monkeypatch.setattr(trainer, "Components", lambda inputs: inputs)
        monkeypatch.setattr(trainer, "Output", lambda inputs, names: inputs)
        job = read_job(opt_ml.root, {"DALLE_DEVICE": "cpu"})
        prepare_outputs(job.paths)
        settings = parse({"max_steps": "4", "log_every": "2", **raw})
        stop = stop or threading.Event()
        trainer.Trainer(job, settings, stop, device=torch.device("cpu")).run()

    return run


@pytest.mark.parametrize(
    ("stage", "present", "expected"),
    [
        ("all", [], ["dvae", "transformer", "clip"]),
        ("all", ["clip"], ["dvae", "transformer"]),
        ("all", ["dvae", "transformer"], ["clip"]),
        ("dvae", [], ["dvae"]),
        ("dvae", ["dvae"], ["dvae"]),
        ("transformer", ["dvae"], ["transformer"]),
        ("clip", [], ["clip"]),
        ("clip", ["dvae", "transformer", "clip"], ["clip"]),
    ],
)
def test_a_job_trains_what_is_asked_for_in_order(stage, present, expected):
    assert stages_to_train(stage, present) == expected


@pytest.mark.parametrize(
    ("stage", "present", "says"),
    [
        ("all", ["dvae", "transformer", "clip"], "or stage to the one to train anew"),
        ("all", ["transformer"], "a transformer without the dvae"),
        ("transformer", ["clip"], "stage=transformer needs a trained dvae"),
        ("dvae", ["dvae", "transformer"], "leave out the channel `artefact`"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused(stage, present, says):
    with pytest.raises(ArtefactError, match=says):
        stages_to_train(stage, present)


def test_each_stage_is_built_trained_and_kept_before_the_next(run, opt_ml):
    parts = TinyJob(present=["clip"])
    run(parts, {})
    assert parts.calls == [
        ("open", "cpu"),
        ("check", "dvae", "transformer"),
        ("check checkpoints", "dvae", "transformer"),
        ("build", "dvae"),
        ("keep", "dvae"),
        ("build", "transformer"),
        ("keep", "transformer"),
        ("finish",),
    ]
    assert all(result.is_finished for result in parts.results.values())
    checkpoints = (opt_ml.root / "checkpoints").rglob("*.pt")
    assert {path.parent.name for path in checkpoints} == {"dvae", "transformer"}
    assert (opt_ml.root / "output/data/metrics.jsonl").read_text().count("\n") == 4


def test_after_a_stop_what_there_is_is_kept_and_a_restart_goes_on_from_it(run):
    stop = threading.Event()

    def stop_in_the_second_stage(name, progress):
        if name == "transformer" and progress >= 0.25:
            stop.set()

    stopped = TinyJob(before_step=stop_in_the_second_stage)
    run(stopped, {}, stop)
    assert stopped.calls[-2:] == [("keep", "transformer"), ("finish",)]
    assert [r.is_finished for r in stopped.results.values()] == [True, False]

    steps = []
    restarted = TinyJob(before_step=lambda name, progress: steps.append((name, progress)))
    run(restarted, {})
    assert list(restarted.results) == ["dvae", "transformer", "clip"]
    assert steps[:2] == [("transformer", 0.5), ("transformer", 0.75)]
    assert {name for name, _ in steps} == {"transformer", "clip"}, "the dvae was finished"


def test_a_stop_while_a_stage_is_prepared_ends_the_job_in_order(run):
    parts = TinyJob()
    parts.build = lambda name: None
    run(parts, {})
    names = ("dvae", "transformer", "clip")
    checked = [("check", *names), ("check checkpoints", *names)]
    assert parts.calls == [("open", "cpu"), *checked, ("finish",)]


def test_a_setting_without_effect_is_warned_of(run, caplog):
    run(TinyJob(), {"stage": "clip", "dvae_width": "32", "clip_text_width": "32"})
    assert "hyperparameter dvae_width has no effect" in caplog.text
    assert "clip_text_width" not in caplog.text


def test_batches_that_cannot_be_shared_out_are_named_before_anything_is_trained(run):
    settings = parse({"clip_batch_size": "7", "transformer_batch_size": "1", "batch_size": "8"})
    trainer.require_equal_shares(settings, ["dvae"], 4)
    with pytest.raises(HyperparameterError) as caught:
        trainer.require_equal_shares(settings, ["dvae", "transformer", "clip"], 4)
    assert str(caught.value).splitlines() == [
        f"{name}: batch_size must be a multiple of 4, the number of devices on all of the job's "
        f"hosts, got {size}"
        for name, size in (("transformer", 1), ("clip", 7))
    ]


def test_a_tokenizer_setting_is_without_effect_when_a_channel_brings_a_tokenizer(run, caplog):
    settings = {"stage": "clip", "tokenizer_kind": "word", "clip_text_width": "32"}
    run(TinyJob(present=["tokenizer"]), settings)
    says = "hyperparameter tokenizer_kind has no effect: the channel artefact brings a tokenizer"
    assert says in caplog.text


def test_a_stop_while_the_data_is_opened_ends_the_job_in_order(run, caplog):
    def stop(*_):
        raise Stopped

    parts = TinyJob()
    parts.open = stop
    run(parts, {})
    parts = TinyJob()
    parts.check = stop
    run(parts, {})
    assert parts.calls == [("open", "cpu")]
    assert caplog.text.count("stopped before there was anything to train") == 2


def test_too_little_device_memory_says_what_to_set(run):
    def fail(name, progress):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DeviceError, match="set a smaller batch_size"):
        run(TinyJob(before_step=fail), {})
