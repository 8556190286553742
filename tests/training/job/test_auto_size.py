"""training.job.auto_size: size=auto in a job, from its first start over restarts to its end."""

import json
import logging
import threading

import pytest
import torch

from dalle.errors import CheckpointError, HyperparameterError
from dalle.manifest import read_manifest
from dalle.platform.environment import read_job
from dalle.platform.outputs import prepare_outputs
from tests.training.memory.calculated_speed import CalculatedSpeed
from tests.training.pairs import channel_of
from training.config.hyperparameters import parse
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.job import auto_size, output
from training.job.inputs import Inputs
from training.job.trainer import Trainer
from training.loop.checkpoints import Checkpoints
from training.memory.sizing import timing
from training.memory.sizing.choice import FILE_NAME, Choice
from training.stopping import Stopped

CPU = torch.device("cpu")
BY_HAND = {
    "image_size": "8",
    "tokenizer_vocab_size": "300",
    "dvae_width": "8",
    "batch_size": "4",
    "clip_vision_width": "64",
    "clip_text_width": "8",
    "clip_text_heads": "1",
}


@pytest.fixture
def measured():
    """What the newest job has measured of its device."""
    return []


@pytest.fixture
def job_of(opt_ml, monkeypatch, measured):
    """A function: hyperparameters -> the job's inputs on a device of calculated speed."""
    channel_of(opt_ml.add_channel("train"), 32)
    channel_of(opt_ml.add_channel("validation"), 4, captions=3)

    def job_of(speed=1e12, stop=None, ranks=SINGLE_PROCESS, **raw):
        measured.clear()
        calculated = CalculatedSpeed(speed, asked=measured)
        monkeypatch.setattr(auto_size, "MeasuredSpeed", lambda *_: calculated)
        job = read_job(opt_ml.root, {"DALLE_DEVICE": "cpu"})
        prepare_outputs(job.paths)
        given = {name: text for name, text in {**BY_HAND, **raw}.items() if text}
        return Inputs(job, parse(given), CPU, stop or threading.Event(), ranks)

    return job_of


def clocked(inputs, seconds):
    """Set the job's clock to so many seconds after its start."""
    inputs.auto_size.clock = lambda: inputs.auto_size._started + seconds


def begin(inputs, name, *, seconds, minutes):
    """Leave a checkpoint of a stage, as an interruption does."""
    directory = inputs.job.paths.checkpoints / name
    state = {"step": 5, "seconds": float(seconds), "budget": (60.0 * minutes, "s")}
    Checkpoints(directory, identity={}).save(5, state)


def test_sizes_and_text_length_are_chosen_before_a_picture_is_decoded(job_of):
    inputs = job_of(max_minutes="10", image_size="")
    settled = inputs.hyperparameters
    assert settled.dvae.image_size == inputs.train.pairs.image_size == 32
    assert inputs.validation.pairs.image_size == 32
    assert settled.transformer.width is not None
    # `picture 31 again again` is the longest caption, and it is a held-out one.
    assert settled.text_length == inputs.tokenizer().text_length <= 16
    inputs.check_captions()
    assert inputs.artefact.manifest.chosen == inputs.auto_size.choice.why


def test_without_max_minutes_a_job_is_small_as_ever(job_of, measured):
    inputs = job_of(image_size="")
    assert inputs.dvae_config().image_size == 32
    assert inputs.hyperparameters.text_length == 64
    assert inputs.hyperparameters.dvae.width == 8
    assert not measured
    assert not (inputs.job.paths.checkpoints / FILE_NAME).exists()
    assert inputs.artefact.manifest.chosen == []


def test_a_named_size_keeps_minutes_for_each_stage(job_of, measured):
    inputs = job_of(max_minutes="10", size="tiny")
    assert inputs.auto_size.share_minutes(inputs.hyperparameters, ["clip"]).clip.max_minutes == 10
    assert not measured


def test_the_minutes_of_a_job_end_with_it_whatever_a_stage_takes(job_of):
    inputs = job_of(max_minutes="10")
    choice, auto = inputs.auto_size.choice, inputs.auto_size
    names = ["dvae", "transformer", "clip"]
    planned = [inputs.hyperparameters.of(name).max_minutes for name in names]
    assert sum(planned) == pytest.approx(10 - choice.reserve_seconds / 60)
    spent = 30.0  # loading
    for index, name in enumerate(names):
        clocked(inputs, spent)
        inputs.hyperparameters = auto.share_minutes(inputs.hyperparameters, names[index:])
        spent += 60 * inputs.hyperparameters.of(name).max_minutes + 20  # and an overrun
    assert spent - 20 + choice.reserve_seconds == pytest.approx(600)


def test_a_stage_gets_something_though_loading_took_all_of_the_time(job_of):
    inputs = job_of(max_minutes="10")
    clocked(inputs, 900)
    late = inputs.auto_size.share_minutes(inputs.hyperparameters, ["transformer", "clip"])
    assert 0 < late.transformer.max_minutes < 1


def test_a_budget_by_hand_stays_and_its_time_is_not_shared(job_of):
    inputs = job_of(max_minutes="10", dvae_max_steps="7", clip_max_minutes="3")
    assert (inputs.hyperparameters.dvae.max_minutes, inputs.hyperparameters.dvae.max_steps) == (
        None,
        7,
    )
    clocked(inputs, 60)
    late = inputs.auto_size.share_minutes(inputs.hyperparameters, ["transformer", "clip"])
    left = 10 - 1 - 3 - inputs.auto_size.choice.reserve_seconds / 60
    assert late.transformer.max_minutes == pytest.approx(left)
    assert late.clip.max_minutes == 3


def test_a_restart_uses_the_choice_of_the_first_start_and_measures_nothing(job_of, measured):
    first = job_of(max_minutes="10")
    begin(first, "dvae", seconds=100, minutes=2)
    again = job_of(speed=1e15, max_minutes="10")
    assert not measured
    assert again.auto_size.choice == first.auto_size.choice
    settings = again.hyperparameters
    assert settings.transformer.width == first.hyperparameters.transformer.width
    assert settings.dvae.max_minutes == 2, "its schedule goes on as it began"
    clocked(again, 60)
    assert again.auto_size.share_minutes(settings, ["dvae", "transformer", "clip"]) == settings
    # The seconds before the interruption are spent too.
    late = again.auto_size.share_minutes(settings, ["clip"])
    left = 600 - 160 - again.auto_size.choice.reserve_seconds
    assert late.clip.max_minutes == pytest.approx(left / 60)


def test_more_minutes_prolong_what_reads_the_image_tokenizer_and_not_itself(job_of):
    first = job_of(max_minutes="10")
    begin(first, "dvae", seconds=120, minutes=2)
    begin(first, "transformer", seconds=300, minutes=5)
    again = job_of(max_minutes="30")
    assert again.hyperparameters.dvae.max_minutes == 2
    assert again.hyperparameters.transformer.max_minutes > 10
    assert again.hyperparameters.transformer.width == first.hyperparameters.transformer.width
    clocked(again, 0)
    late = again.auto_size.share_minutes(again.hyperparameters, ["transformer"])
    seconds = 1800 - 420 - again.auto_size.choice.reserve_seconds + 300
    assert late.transformer.max_minutes == pytest.approx(seconds / 60)


def test_checkpoints_of_a_version_without_it_go_on_as_they_began(job_of, caplog):
    caplog.set_level(logging.INFO)
    first = job_of(image_size="")
    begin(first, "dvae", seconds=10, minutes=10)
    again = job_of(max_minutes="10", image_size="")
    assert "the checkpoints are of a version without size=auto: size=small" in caplog.text
    assert again.dvae_config().image_size == 32
    assert again.hyperparameters.text_length == 64
    assert again.hyperparameters.dvae.max_minutes == 10
    assert again.hyperparameters.dvae.identity() == first.hyperparameters.dvae.identity()
    assert again.auto_size.share_minutes(again.hyperparameters, ["clip"]).clip.max_minutes == 10


def test_a_choice_that_cannot_be_read_is_an_error_and_not_another_choice(job_of):
    inputs = job_of(max_minutes="10")
    path = inputs.job.paths.checkpoints / FILE_NAME
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"size-auto.json cannot be read"):
        job_of(max_minutes="10")
    path.write_text(json.dumps({"minutes": 3}))
    with pytest.raises(CheckpointError, match="give the job an empty checkpoint directory"):
        job_of(max_minutes="10")


def test_too_few_minutes_end_a_job_before_anything_is_written(job_of, opt_ml):
    with pytest.raises(HyperparameterError, match="set max_minutes="):
        job_of(max_minutes="0.1")
    assert not (opt_ml.root / "checkpoints" / FILE_NAME).exists()


def test_a_stop_while_the_data_are_looked_at_is_a_stop_of_the_job(job_of):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        job_of(max_minutes="10", stop=stop)


@pytest.mark.slow
def test_a_whole_job_of_seconds_writes_its_choice_into_the_manifest(
    job_of, opt_ml, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    for name in ("START_SECONDS", "REPORT_SECONDS"):
        monkeypatch.setattr(timing, name, 0.0)
    monkeypatch.setattr(output, "build_report", lambda *_, **__: None)
    monkeypatch.setattr(output, "write_report", lambda *_: None)
    job = job_of().job  # for the device
    raw = {**BY_HAND, "max_minutes": "0.02", "transformer_width": "8", "num_layers": "1"}
    calculated = CalculatedSpeed(1e14)
    monkeypatch.setattr(auto_size, "MeasuredSpeed", lambda *_: calculated)
    Trainer(job, parse(raw), threading.Event(), device=CPU).run()
    manifest = read_manifest(job.paths.model)
    assert {record.stage for record in manifest.stages} == {"dvae", "transformer", "clip"}
    assert manifest.chosen == Choice.load(job.paths.checkpoints).why
    records = manifest.newest_records()
    assert records["dvae"].hyperparameters["image_size"] == 8
    assert records["transformer"].hyperparameters["size"] == "auto"
    assert all(record.is_finished for record in records.values())
    assert caplog.text.count("size=auto: ") == 6
    assert "of 0.02 minutes taken" in caplog.text


class First(ProcessGroup):
    """The first of two ranks, which notes what it tells the other one."""

    size = 2

    def __init__(self):
        self.said = []

    def share(self, value):
        self.said.append(value)
        return value


class Second(ProcessGroup):
    """The second rank, which hears what the first one has said, in order."""

    size, rank = 2, 1

    def __init__(self, said):
        self.said = said

    def share(self, value):
        return self.said.pop(0)


def test_all_ranks_have_the_choice_and_the_minutes_of_the_first(job_of, measured):
    first = First()
    found = []
    for ranks, speed, seconds in ((first, 1e12, 10), (Second(first.said), 1e15, 99)):
        inputs = job_of(speed, ranks=ranks, max_minutes="10")
        clocked(inputs, seconds)
        names = ["transformer", "clip"]
        found.append(inputs.auto_size.share_minutes(inputs.hyperparameters, names))
        assert bool(measured) == ranks.is_first
    assert found[0] == found[1]
    assert found[0].transformer.max_minutes > 1
    assert first.said == [], "the other rank has asked for no less"
