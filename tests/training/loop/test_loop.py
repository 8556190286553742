"""training.loop.loop: one loop for every model, the same whether it was interrupted or not."""

import json
import logging
import math
import threading

import pytest
import torch

from dalle.errors import CheckpointError, DivergenceError
from tests.training.loop.tiny_stage import TinyBatches, TinyStage, are_equal, stopping_at, weights
from training.loop.metrics import Progress


class Clock:
    """Clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def read_reports(tmp_path, place="a"):
    text = (tmp_path / place / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_a_budget_in_steps_is_kept_and_lowers_the_loss(run):
    stage = TinyStage()
    result = run(stage, {"max_steps": "200", "learning_rate": "0.01"})
    assert (result.step, result.is_finished) == (200, True)
    assert sum(stage.losses[i] for i in range(190, 200)) < sum(stage.losses[i] for i in range(10))
    assert stage.progress == [step / 200 for step in range(200)]
    assert not stage.model.training


def test_a_budget_in_epochs_is_steps_times_batches(run):
    assert run(TinyStage(), {"epochs": "3"}).step == 3 * TinyBatches.num_per_epoch


def test_a_budget_in_minutes_counts_the_time_before_an_interruption(run):
    clock = Clock()

    def pass_ten_seconds(step):
        clock.now += 10

    stage = TinyStage()
    stop = threading.Event()

    def pass_then_stop(step):
        pass_ten_seconds(step)
        if step == 4:
            stop.set()

    stage.after_step = pass_then_stop
    first = run(stage, {"max_minutes": "1"}, stop=stop, clock=clock)
    assert (first.step, first.seconds, first.is_finished) == (4, 40.0, False)

    clock.now += 5000  # between the two runs
    stage = TinyStage()
    stage.after_step = pass_ten_seconds
    second = run(stage, {"max_minutes": "1"}, clock=clock)
    assert (second.step, second.seconds, second.is_finished) == (6, 60.0, True)
    assert stage.progress == pytest.approx([4 / 6, 5 / 6])


@pytest.mark.parametrize("ema_decay", ["0", "0.9"])
@pytest.mark.parametrize("interrupted_at", [1, 6, 7])
def test_a_resumed_run_has_bit_equal_losses_weights_and_reports(
    run, tmp_path, interrupted_at, ema_decay
):
    raw = {"max_steps": "12", "ema_decay": ema_decay}
    whole = TinyStage()
    run(whole, raw, place="whole")

    first = TinyStage()
    result = run(first, raw, stop=stopping_at(first, interrupted_at))
    assert (result.step, result.is_finished) == (interrupted_at, False)
    second = TinyStage()
    assert run(second, raw).is_finished

    losses = [first.losses[i] for i in range(interrupted_at)] + list(second.losses.values())
    assert losses == list(whole.losses.values())
    assert are_equal(weights(second), weights(whole))

    def reports(place):
        varying = {"seconds", "samples_per_second"}
        return [
            {name: value for name, value in report.items() if name not in varying}
            for report in read_reports(tmp_path, place)
        ]

    assert reports("a") == reports("whole")


def test_a_finished_stage_is_not_trained_again(run):
    first = TinyStage()
    before = run(first, {"max_steps": "4", "ema_decay": "0.5"})
    second = TinyStage()
    result = run(second, {"max_steps": "4", "ema_decay": "0.5"})
    assert second.progress == []
    assert (result.step, result.is_finished) == (4, True)
    assert result.validation == before.validation
    assert are_equal(weights(first), weights(second))


def test_a_finished_stage_may_be_prolonged(run):
    run(TinyStage(), {"max_steps": "4"})
    assert run(TinyStage(), {"max_steps": "6"}).step == 6


@pytest.mark.parametrize(
    ("raw", "fingerprint", "says"),
    [
        ({"learning_rate": "0.5"}, "abc", "learning_rate was 0.001, this job has 0.5"),
        ({}, "xyz", "data was 'abc', this job has 'xyz'"),
    ],
)
def test_a_checkpoint_of_other_settings_or_data_is_refused(run, raw, fingerprint, says):
    run(TinyStage(), {"max_steps": "4"})
    with pytest.raises(CheckpointError, match=says):
        run(TinyStage(fingerprint), {"max_steps": "8", **raw})


def test_a_stop_before_the_first_step_leaves_no_checkpoint(run, tmp_path):
    stop = threading.Event()
    stop.set()
    result = run(TinyStage(), {"max_steps": "4"}, stop=stop)
    assert (result.step, result.is_finished) == (0, False)
    assert not (tmp_path / "a/checkpoints").exists()


def test_checkpoints_are_written_by_the_minute(run, tmp_path):
    clock = Clock()
    stage = TinyStage()
    saved = []

    def pass_a_minute(step):
        clock.now += 60
        saved.append(sorted(p.name for p in (tmp_path / "a/checkpoints").glob("step-*")))

    stage.after_step = pass_a_minute
    run(stage, {"max_steps": "6", "checkpoint_minutes": "2"}, clock=clock)
    numbers = [[int(name[5:14]) for name in names] for names in saved]
    assert numbers == [[], [], [2], [2], [2, 4], [2, 4]]


@pytest.mark.parametrize("raw", [{"max_minutes": "4"}, {"max_steps": "8"}])
def test_without_a_terminal_the_log_tells_the_time_left(run, caplog, monkeypatch, raw):
    monkeypatch.setattr(Progress, "is_on_terminal", False)
    caplog.set_level(logging.INFO)
    clock = Clock()
    stage = TinyStage()

    def pass_half_a_minute(step):
        clock.now += 30

    stage.after_step = pass_half_a_minute
    run(stage, raw, clock=clock)
    said = [each for each in caplog.messages if "left of this stage" in each]
    assert said[0] == "dvae: 25 % done after 60 s and 2 steps; about 3 min left of this stage"
    assert len(said) == 4


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(run, tmp_path, wrong):
    stage = TinyStage()
    plain_loss = stage.loss

    def loss(batch, progress):
        value, scalars = plain_loss(batch, progress)
        return (value * wrong if len(stage.progress) == 5 else value), scalars

    stage.loss = loss
    with pytest.raises(DivergenceError, match=rf"is {wrong} at step 5; try a smaller learning_r"):
        run(stage, {"max_steps": "9"})
    assert not (tmp_path / "a/checkpoints").exists(), "nothing broken may be saved"
    assert all(torch.isfinite(weight).all() for weight in weights(stage))


@pytest.mark.parametrize(
    ("clipping", "says"),
    [
        ("1", "the gradient norm of stage dvae is nan at step 5; try a smaller learning_rate"),
        ("0", r"the weights hidden\.weight of stage dvae are not finite at step 5; try a smaller"),
    ],
)
@pytest.mark.parametrize("ema_decay", ["0", "0.9"])
def test_a_gradient_that_is_not_finite_ends_the_run_and_nothing_is_saved(
    run, tmp_path, clipping, says, ema_decay
):
    stage = TinyStage()
    plain_loss = stage.loss

    def loss(batch, progress):
        value, scalars = plain_loss(batch, progress)
        if len(stage.progress) == 5:  # finite itself, but the slope of a root at 0 is not
            value = value + sum((0 * p).sum() for p in stage.model.parameters()).sqrt()
        return value, scalars

    stage.loss = loss
    with pytest.raises(DivergenceError, match=says):
        run(stage, {"max_steps": "5", "gradient_clipping": clipping, "ema_decay": ema_decay})
    assert not list((tmp_path / "a/checkpoints").glob("step-*"))


def test_weights_that_are_not_finite_are_not_handed_on(run, tmp_path):
    run(TinyStage(), {"max_steps": "4"})
    (path,) = (tmp_path / "a/checkpoints").glob("step-*")
    content = torch.load(path, weights_only=True)
    content["state"]["engine"]["model"]["head.bias"].fill_(math.nan)
    torch.save(content, path)
    with pytest.raises(DivergenceError, match=r"the weights head\.bias .* not finite at step 4"):
        run(TinyStage(), {"max_steps": "4"})


def test_validations_are_spread_over_the_budget_and_end_it(run, tmp_path):
    stage = TinyStage()
    run(stage, {"max_steps": "10", "num_validations": "4"})
    steps = [r["step"] for r in read_reports(tmp_path) if "validation_loss" in r]
    assert steps == [3, 5, 8, 10]


def test_validation_does_not_disturb_training(run):
    often, never = TinyStage(), TinyStage()
    run(often, {"max_steps": "6", "num_validations": "6"}, place="often")
    run(never, {"max_steps": "6", "num_validations": "0"}, place="never")
    assert (often.validations, never.validations) == (6, 0)
    assert often.losses == never.losses


def test_reports_are_means_over_the_steps_since_the_last(run, tmp_path):
    stage = TinyStage()
    run(stage, {"max_steps": "7", "num_validations": "0"})
    reports = read_reports(tmp_path)
    assert [report["step"] for report in reports] == [3, 6, 7]
    assert reports[1]["loss"] == pytest.approx(sum(stage.losses[i] for i in (3, 4, 5)) / 3)
    assert {"squared", "learning_rate", "samples_per_second", "epoch"} <= reports[0].keys()


def test_the_averaged_weights_are_validated_and_left_in_the_model(run):
    averaged, plain = TinyStage(), TinyStage()
    run(averaged, {"max_steps": "6", "ema_decay": "0.99"}, place="averaged")
    run(plain, {"max_steps": "6"}, place="plain")
    assert averaged.losses == plain.losses, "averaging must not change training"
    assert not are_equal(weights(averaged), weights(plain))
    assert are_equal(weights(averaged), averaged.validated)
    assert are_equal(weights(plain), plain.validated)


def test_bf16_trains_too(run):
    result = run(TinyStage(), {"max_steps": "3", "precision": "bf16"})
    assert result.is_finished
