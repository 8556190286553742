"""training.loop: the weights of the best validation are kept, whatever interrupts the run."""

import shutil

import pytest
import torch

from tests.training.loop.tiny_stage import TinyStage, are_equal, stopping_at, weights

RAW = {"max_steps": "12", "num_validations": "4"}  # after steps 3, 6, 9 and 12


class ScriptedStage(TinyStage):
    """Its validations have the losses of a list; `seen` has the weights of each."""

    def __init__(self, *losses):
        super().__init__()
        self.script = list(losses)
        self.seen = []

    def validate(self):
        super().validate()
        self.seen.append(self.validated)
        return {"validation_loss": self.script.pop(0)}


def files(tmp_path, place="a"):
    return sorted(path.name for path in (tmp_path / place / "checkpoints").iterdir())


@pytest.mark.parametrize("ema_decay", ["0", "0.9"])
def test_the_weights_of_the_best_validation_are_left_in_the_model(run, ema_decay):
    stage = ScriptedStage(3.0, 1.0, 2.0, 2.5)
    result = run(stage, {**RAW, "ema_decay": ema_decay})
    assert (result.step, result.kept_step, result.is_finished) == (12, 6, True)
    assert are_equal(weights(stage), stage.seen[1])
    assert result.validation == {"validation_loss": 1.0}
    assert result.newest.numbers == {"validation_loss": 2.5}
    assert result.best.epoch == 6 / 5


def test_with_keep_last_the_last_weights_are_left_and_no_others_are_written(run, tmp_path):
    stage = ScriptedStage(3.0, 1.0, 2.0, 2.5)
    result = run(stage, {**RAW, "keep": "last"})
    assert result.kept_step == 12
    assert are_equal(weights(stage), stage.seen[3])
    assert result.validation == {"validation_loss": 2.5}
    assert files(tmp_path) == ["step-000000012.pt"]


def test_of_equal_validations_the_earlier_weights_are_kept_and_nan_is_never_best(run):
    stage = ScriptedStage(float("nan"), 2.0, 2.0, float("nan"))
    result = run(stage, RAW)
    assert result.kept_step == 6
    assert are_equal(weights(stage), stage.seen[1])


@pytest.mark.parametrize("interrupted_at", range(1, 12))
def test_an_interrupted_run_keeps_what_an_uninterrupted_one_keeps(run, interrupted_at):
    losses = [3.0, 1.0, 2.0, 2.5]
    whole = ScriptedStage(*losses)
    run(whole, RAW, place="whole")
    first = ScriptedStage(*losses)
    run(first, RAW, stop=stopping_at(first, interrupted_at))
    second = ScriptedStage(*first.script)
    assert run(second, RAW).kept_step == 6
    assert are_equal(weights(second), weights(whole))


def test_a_run_that_was_killed_after_a_better_validation_makes_it_again(run, tmp_path):
    first = ScriptedStage(3.0, 1.0)
    run(first, RAW, stop=stopping_at(first, 5))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run(ScriptedStage(1.0, 2.0, 2.5), RAW)
    # The kill left the best weights of step 6 beside the checkpoint of step 5.
    shutil.copy(tmp_path / "a/checkpoints/best-000000006.pt", tmp_path / "b/checkpoints")
    again = ScriptedStage(4.0, 2.0, 2.5)
    assert run(again, RAW, place="b").kept_step == 9, "the steps that are trained again decide"
    assert are_equal(weights(again), again.seen[1])


def test_a_prolonged_run_trains_on_from_the_last_weights_and_still_knows_the_best(run, tmp_path):
    plain, kept = ScriptedStage(3.0, 1.0, 2.0, 2.5), ScriptedStage(3.0, 1.0, 2.0, 2.5)
    run(plain, {**RAW, "keep": "last"}, place="plain")
    run(kept, RAW)
    longer = {**RAW, "max_steps": "15"}
    second, third = ScriptedStage(2.0), ScriptedStage(2.0)
    run(second, {**longer, "keep": "last"}, place="plain")
    assert run(third, longer).kept_step == 6
    assert third.losses == second.losses
    assert are_equal(third.seen[0], second.seen[0])
    assert are_equal(weights(third), kept.seen[1])


def test_a_stop_keeps_the_steps_since_the_newest_validation_unless_it_was_worse(run):
    better = ScriptedStage(3.0, 1.0)
    result = run(better, RAW, stop=stopping_at(better, 8))
    assert (result.step, result.kept_step) == (8, 8)
    worse = ScriptedStage(1.0, 3.0)
    result = run(worse, RAW, stop=stopping_at(worse, 8), place="worse")
    assert (result.step, result.kept_step, result.validation) == (8, 3, {"validation_loss": 1.0})
    assert are_equal(weights(worse), worse.seen[0])


def test_there_is_one_file_of_best_weights_more_than_checkpoints_at_most(run, tmp_path):
    stage = ScriptedStage(*range(12, 0, -1))
    num_files = []
    stage.after_step = lambda step: num_files.append(
        len(list((tmp_path / "a/checkpoints").glob("best-*")))
    )
    often = {"num_validations": "12", "checkpoint_minutes": "0.0000001", "checkpoints_kept": "2"}
    run(stage, {"max_steps": "12", **often})
    assert 1 <= max(num_files) <= 3
    assert files(tmp_path)[:2] == ["best-000000011.pt", "best-000000012.pt"]


def test_the_best_weights_of_a_run_without_a_checkpoint_are_not_those_of_the_next(run, tmp_path):
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    stray = tmp_path / "a/checkpoints/best-000000002.pt"
    torch.save({"step": 2, "weights": {}}, stray)
    assert run(ScriptedStage(4.0, 3.0, 2.0, 1.0), RAW).kept_step == 12
    assert not stray.exists()


def test_best_weights_that_cannot_be_read_are_said_and_done_without(run, tmp_path, caplog):
    first = ScriptedStage(3.0, 1.0, 2.0)
    run(first, RAW, stop=stopping_at(first, 10))
    (tmp_path / "a/checkpoints/best-000000006.pt").write_bytes(b"damaged")
    assert run(ScriptedStage(2.5), RAW).kept_step == 12
    assert "the weights of the best validation, at step 6, cannot be read" in caplog.text


def test_the_choice_of_weights_may_change_when_a_run_is_resumed(run):
    first = ScriptedStage(3.0, 1.0, 2.0)
    run(first, RAW, stop=stopping_at(first, 10))
    assert run(ScriptedStage(2.5), {**RAW, "keep": "last"}).kept_step == 12
