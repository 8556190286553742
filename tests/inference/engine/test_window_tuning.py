"""inference.engine.window_tuning: seconds of steps by their rows, and the width that follows."""

import re
from itertools import count

import pytest
import torch

from dalle import artefact as artefacts
from dalle.decoding.cpu.torch_step import CpuTorchStep
from dalle.decoding.engine import DecodeEngine
from dalle.errors import UserError
from inference.engine.model_runner import ModelRunner
from inference.engine.window_tuning import measure_windows
from inference.settings import read_settings


def test_a_step_of_every_number_of_rows_is_timed(make_dalle):
    model = make_dalle()
    engine = DecodeEngine(model, 2, step=CpuTorchStep(model, 2, precision="int8", num_rows=64))
    ticks = count()
    seconds = measure_windows(engine, seconds=20.0, clock=lambda: float(next(ticks)))
    assert seconds == {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 15: 1.0, 30: 1.0}
    assert engine.is_idle


def test_more_rows_than_there_is_time_for_are_left_out(make_dalle):
    model = make_dalle()
    engine = DecodeEngine(model, 2, step=CpuTorchStep(model, 2, precision="int8", num_rows=64))
    ticks = count()
    seconds = measure_windows(engine, seconds=5.0, clock=lambda: float(next(ticks)))
    assert list(seconds) == [1, 2, 4]
    assert engine.is_idle


def test_an_engine_without_windows_is_not_timed(make_dalle):
    model = make_dalle()
    assert measure_windows(DecodeEngine(model, 2, window=1)) == {}


def test_a_model_runner_measures_or_keeps_what_it_was_given(tiny_artefact):
    artefact = artefacts.load(tiny_artefact)
    device = torch.device("cpu")
    given = ModelRunner(artefact, device, window=1)
    assert given.measure_windows() == {}
    assert given._engine.windows.fixed == 1
    runner = ModelRunner(artefact, device)
    if runner._engine.windows.widest > 1:
        assert 1 in runner.measure_windows()
        assert runner._engine.windows.seconds


@pytest.mark.parametrize("value", ["0", "33", "many", "1.5", "-1"])
def test_a_number_of_positions_that_is_none_is_refused(value):
    message = f"DALLE_PARALLEL_POSITIONS must be a whole number from 1 to 32, got '{value}'"
    with pytest.raises(UserError, match=re.escape(message)):
        read_settings({"DALLE_PARALLEL_POSITIONS": value})
    assert read_settings({"DALLE_PARALLEL_POSITIONS": "32"}).parallel_positions == 32
    assert read_settings({}).parallel_positions is None
