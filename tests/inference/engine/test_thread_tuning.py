"""inference.engine.thread_tuning: the number of threads, by timed steps."""

import logging

import pytest
import torch

from dalle.decoding.engine import DecodeEngine
from inference.engine.model_runner import ModelRunner
from inference.engine.thread_tuning import choices, fastest, measure_steps


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("most", "tried"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])],
)
def test_powers_of_two_and_all_are_tried(most, tried):
    assert choices(most) == tried


class Clock:
    """Time that passes by what a step would take with so many threads, and in no other way."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        self.now += self.seconds[torch.get_num_threads()]
        return self.now


def test_a_neighbour_on_the_second_processor_leaves_one_thread(make_dalle):
    engine = DecodeEngine(make_dalle(), 4)
    seconds = measure_steps(engine, [1, 2], candidates=4, clock=Clock({1: 0.01, 2: 0.05}))
    assert seconds == {1: pytest.approx(0.01), 2: pytest.approx(0.05)}
    assert fastest(seconds) == 1
    assert engine.is_idle


def test_trying_ends_when_its_time_is_over_but_tries_each_once(make_dalle):
    engine = DecodeEngine(make_dalle(), 4)
    clock = Clock({1: 100.0, 2: 60.0})
    seconds = measure_steps(engine, [1, 2], candidates=4, seconds=1.0, clock=clock)
    assert seconds == {1: pytest.approx(100.0), 2: pytest.approx(60.0)}
    assert clock.looks == 1 + 2 * 2 + 1
    assert engine.is_idle


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0, 2: 0.6}, 2),
        ({1: 1.0, 2: 0.98}, 1),
        ({1: 1.0, 2: 0.6, 4: 0.58, 8: 2.0}, 2),
        ({1: 1.0, 2: 1.5, 4: 0.5}, 4),
    ],
)
def test_more_threads_must_be_worth_it(seconds, chosen):
    assert fastest(seconds) == chosen


def test_the_chosen_number_is_logged_and_used(tiny_artefact, caplog):
    caplog.set_level(logging.INFO)
    runner = ModelRunner.load(tiny_artefact, "cpu", most_threads=2)
    assert runner.threads == torch.get_num_threads()
    assert runner.threads in (1, 2)
    told = caplog.text
    assert "ms with 1" in told
    assert "ms with 2" in told
    assert f"with {runner.threads} threads in" in told
    assert runner.busy_slots == 0


def test_a_given_number_is_used_without_timing(tiny_artefact, caplog):
    caplog.set_level(logging.INFO)
    runner = ModelRunner.load(tiny_artefact, "cpu", threads=2, most_threads=1)
    assert runner.threads == torch.get_num_threads() == 2
    assert "ms with" not in caplog.text
