"""The width of windows follows from counts of right guesses and from measured seconds."""

import numpy as np
import pytest

from dalle.decoding.cpu.torch_step import CpuTorchStep
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.windows import WindowWidth
from tests.dalle.decoding.test_engine import TEXT


def counted(right_share: float, widest: int = 32) -> WindowWidth:
    """Windows of 16 positions whose every guess is right in the same share of steps."""
    generator = np.random.default_rng(0)
    windows = WindowWidth(widest)
    for _ in range(2000):
        right = generator.random(15) < right_share
        exact = 1 + int(right.cumprod().sum())
        windows.record([16], [exact])
    return windows


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_expected_positions_are_those_of_the_counted_share(share):
    expected = counted(share).expected()
    ideal = [sum(share**power for power in range(width)) for width in range(1, 9)]
    assert expected[:8] == pytest.approx(ideal, rel=0.15)
    assert len(expected) == 32


def test_more_right_guesses_and_cheaper_rows_make_windows_wider():
    free = {1: 1.0, 64: 1.0}
    by_arithmetic = {rows: float(rows) for rows in (1, 2, 4, 8, 16, 32, 64)}
    between = {1: 1.0, 8: 1.2, 64: 4.0}
    widths = []
    for share in (0.3, 0.6, 0.95):
        windows = counted(share)
        windows.seconds = by_arithmetic
        assert windows.choose(1) == 1
        windows.seconds = free
        assert windows.choose(1) >= 15
        windows.seconds = between
        widths.append(windows.choose(1))
        assert windows.choose(64) == 1
    assert 1 < widths[0] < widths[1] < widths[2]


def test_rows_that_were_not_measured_are_taken_to_cost_more():
    windows = counted(0.9)
    windows.seconds = {1: 1.0, 8: 1.0}
    assert windows.choose(1) == 8


def test_a_width_has_room_in_the_rows_of_a_step():
    assert WindowWidth(8, 8).choose(3, 20) == 6
    assert WindowWidth(8, 8).choose(3, 100) == 8
    assert WindowWidth(8, 8).choose(30, 20) == 1
    assert WindowWidth(8, 3).choose(1, 20) == 3
    assert WindowWidth(1).choose(1) == 1


def test_old_counts_are_forgotten():
    windows = counted(0.95)
    for _ in range(300):
        windows.record([16], [1])
    assert windows.expected()[-1] < 1.2


def test_fewer_rows_are_not_taken_to_be_dearer():
    windows = counted(0.9)
    windows.seconds = {1: 1.0, 2: 9.0, 4: 1.1, 64: 60.0}
    assert windows.choose(1) == 4
    windows.seconds = {1: 9.0, 2: 9.0, 4: 9.0, 8: 1.1, 64: 60.0}
    assert windows.choose(1) == 8


def test_counts_stay_finite_over_many_steps():
    windows = WindowWidth(4)
    for _ in range(10_000):
        windows.record([4], [3])
    assert windows.expected().tolist() == pytest.approx([1, 2, 3, 3], abs=0.1)


def test_after_many_steps_of_one_position_windows_are_tried_again():
    windows = counted(0.0)
    windows.seconds = {1: 1.0, 8: 2.0, 64: 10.0}
    assert windows.choose(1) == 1
    for _ in range(300):
        windows.record([], [])
    assert windows.choose(1) > 1


def test_steps_of_one_position_count_in_the_engine_too(make_dalle, monkeypatch):
    model = make_dalle()
    step = CpuTorchStep(model, 2, precision="int8", num_rows=64)
    engine = DecodeEngine(model, 2, step=step)
    engine.windows.seconds = {1: 1.0, 64: 1e6}
    recorded: list[int] = []
    monkeypatch.setattr(engine.windows, "record", lambda widths, _: recorded.append(len(widths)))
    engine.submit(TEXT, candidates=range(2), seed=0)
    while not engine.is_idle:
        engine.step()
    assert recorded == [0] * model.config.num_positions
