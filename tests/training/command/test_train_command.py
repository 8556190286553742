"""The command `train`: what it refuses, how it says so, and how it is stopped."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests import REPOSITORY
from training.__main__ import main
from training.job.process import stopped_by_signals

pytestmark = pytest.mark.slow


@pytest.fixture
def filled(opt_ml):
    """A tree with one pair in the channel train."""
    (opt_ml.add_channel("train") / "a.txt").write_text("a red square")
    return opt_ml


def run(tree):
    return main(["--root", str(tree.root)])


def files_of(tree):
    return {str(path.relative_to(tree.root)) for path in tree.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shape", ["platform", "local", "empty"])
def test_a_job_without_data_fails_with_the_cause_in_the_failure_file(make_opt_ml, shape):
    tree = make_opt_ml(shape)
    assert run(tree) == 1
    assert tree.failure.startswith("the channel train is missing")


def test_everything_wrong_is_in_one_failure_file_and_nothing_is_half_written(opt_ml):
    opt_ml.set_hyperparameters(learning_rat="0.1", epochs="ten")
    opt_ml.add_channel("trian")
    before = files_of(opt_ml)
    assert run(opt_ml) == 1
    for cause in (
        "epochs must be a whole number from 1 to 1,000,000,000, got 'ten'",
        "learning_rat is unknown; did you mean learning_rate?",
        "the channel train is missing",
        "the channel trian is unexpected; did you mean train?",
    ):
        assert cause in opt_ml.failure
    assert len((opt_ml.root / "output/failure").read_text()) <= 1024
    assert files_of(opt_ml) - before == {"output/failure"}


def test_a_misspelt_variable_is_said_in_the_log(opt_ml, monkeypatch, caplog):
    monkeypatch.setenv("DALLE_DEVIC", "cuda")
    assert run(opt_ml) == 1
    assert "DALLE_DEVIC=cuda is unknown and has no effect; did you mean DALLE_DEV" in caplog.text


def test_json_that_is_not_json_is_named_with_its_position(filled):
    filled.write("hyperparameters", '{"epochs": 3')
    assert run(filled) == 1
    assert filled.failure.startswith(str(filled.root / "input/config/hyperparameters.json"))
    assert "is not JSON: Expecting ',' delimiter at line 1, column 13" in filled.failure


def test_an_earlier_runs_failure_does_not_stay(filled):
    failure = filled.root / "output" / "failure"
    failure.write_text("an earlier run's")
    filled.set_hyperparameters(epochs="ten")
    assert run(filled) == 1
    assert "earlier" not in filled.failure


def test_a_root_that_does_not_exist_is_wrong_usage_and_is_not_made(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--root", str(tmp_path / "nowhere")])
    assert caught.value.code == 2
    assert "nowhere is not a directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_directories_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for words in ("input/config/hyperparameters.json", "--root", "Exit code", "SIGTERM", "/opt/ml"):
        assert words in printed


def test_the_hyperparameters_can_be_listed(capsys):
    assert main(["--list-hyperparameters"]) == 0
    assert "| `learning_rate` |" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with stopped_by_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_the_program_at_once():
    with stopped_by_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_wrong_job_is_refused_before_torch_is_imported(filled):
    filled.set_hyperparameters(epochs="ten")
    program = (
        "import json, sys; from training.__main__ import main; code = main(sys.argv[1:]);"
        "print(json.dumps([code, 'torch' in sys.modules]))"
    )
    root = REPOSITORY
    printed = subprocess.run(
        [sys.executable, "-c", program, "--root", str(filled.root)],
        env={"PYTHONPATH": f"{root}:{root / 'container'}"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(printed.stdout) == [1, False]
