"""`train --plan` of a job with size=auto: its choice, and the time of each size of pictures."""

import json

import pytest

from tests.training.memory.calculated_speed import CalculatedSpeed
from tests.training.pairs import channel_of
from training.__main__ import main
from training.config.hyperparameters import parse
from training.memory import instances
from training.memory.sizing import speed
from training.memory.sizing.choose import Chooser, Given
from training.memory.sizing.facts import Facts
from training.memory.sizing.plan import _time_of
from training.memory.sizing.timing import Timing


@pytest.fixture
def plan(opt_ml, capsys, monkeypatch):
    """Runs the command for a CLIP on a device of calculated speed; returns exit code and words."""
    monkeypatch.setattr(speed, "MeasuredSpeed", lambda *_: CalculatedSpeed(1e12))

    def plan(*arguments, **raw):
        opt_ml.set_hyperparameters(stage="clip", **raw)
        code = main(["--root", str(opt_ml.root), "--plan", *arguments])
        return code, capsys.readouterr()

    return plan


@pytest.mark.slow
def test_the_choice_and_the_times_are_told_before_the_memory(plan, opt_ml):
    channel_of(opt_ml.add_channel("train"), 32)
    code, said = plan(max_minutes="60")
    assert code == 0
    assert said.out.startswith("size=auto: 32 pairs; the median picture has 8 pixels")
    assert "\n32 pixels: " in said.out
    assert " here; about " in said.out
    assert "clip, size auto" in said.out
    assert not (opt_ml.root / "checkpoints").exists() or not any(
        (opt_ml.root / "checkpoints").iterdir()
    )
    code, said = plan("--json", max_minutes="60")
    (clip,) = json.loads(said.out)["stages"]
    assert 0 < clip["budget"]["max_minutes"] < 60


@pytest.mark.slow
def test_without_pairs_the_minutes_are_shared_and_sizes_are_small(plan):
    code, said = plan(max_minutes="60")
    assert code == 0
    assert "size=auto: planned as small, with 60 minutes shared" in said.out


def test_minutes_that_are_too_few_are_told_by_the_plan_too(plan, opt_ml):
    channel_of(opt_ml.add_channel("train"), 32)
    code, said = plan(max_minutes="0.1")
    assert code == 1
    assert "max_minutes=0.1 is too few" in said.err


def test_a_file_that_is_no_price_table_is_named(plan, opt_ml):
    table = opt_ml.root / "prices.json"
    table.write_text("[]")
    code, said = plan("--prices", str(table), max_minutes="60")
    assert code == 1
    assert f"--prices {table} is not a price table" in said.err


def test_dollars_follow_from_hours_and_prices_and_are_left_out_without():
    facts = Facts(100_000, side=128, longest_caption=12, text_vocab_size=4000)
    settings = parse({"max_minutes": "60"})
    names = ["dvae", "transformer", "clip"]
    timing = Timing(settings, facts, names, 60.0, 1, "cpu")
    chooser = Chooser(settings, facts, names, CalculatedSpeed(60e9), Given(), timing)
    chooser.measure_probe()
    with_prices = _time_of(128, chooser, settings, {"ml.g5.xlarge": 1.2})
    assert with_prices.startswith("128 pixels: ")
    assert with_prices.endswith("(estimated)")
    _, _, on_g5 = with_prices.partition("; about ")
    minutes = float(on_g5.split(" min")[0])
    usd = float(on_g5.partition("$")[2].split(" ")[0])
    assert usd == pytest.approx(minutes / 60 * 1.2, abs=0.02)
    assert "$" not in _time_of(128, chooser, settings, {})


def test_an_estimate_grows_with_the_work_and_halves_with_twice_the_speed():
    slow, fast = instances.Gpu(24, 70, 35), instances.Gpu(24, 140, 70)
    start = 60 * instances.START_MINUTES
    one = instances.estimated_seconds(slow, 1e16, 0, is_half=False) - start
    assert instances.estimated_seconds(fast, 1e16, 0, is_half=False) - start == one / 2
    assert instances.estimated_seconds(slow, 1e16, 0, is_half=True) - start == one / 2
    assert instances.estimated_seconds(slow, 1e16, 100, is_half=False) - start - one == (
        pytest.approx(100 * instances.STEP_MILLISECONDS / 1000)
    )


def test_the_shown_instances_have_gpus_and_prices_of_training():
    prices = instances.hourly_prices(instances.PRICES)
    assert {*instances.SHOWN.values()} <= {*instances.GPUS}
    assert {*instances.SHOWN} & {*prices}
