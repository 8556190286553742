"""What a training job costs: time from the plan's arithmetic, dollars from dated prices."""

import json

import pytest

from dalle.errors import UserError
from infra.__main__ import main
from infra.cost.prices import load_prices
from infra.cost.training import TrainingAssumptions, TrainingPlan, job_cost, load_plan

PEAK = 70e12  # operations a second of an A10G in 16 bits, by its data sheet


def a_plan(budget=None, *, flops=PEAK, gib=10.0, precision="bf16", batch_size=64):
    """A plan of one stage, whose step takes a second at all that an A10G can do."""
    job = {"precision": precision, "memory": {"device": int(gib * 2**30)}}
    stage = {
        "stage": "transformer",
        "size": "base",
        "num_parameters": 10**8,
        "batch_size": batch_size,
        "step_flops": flops,
        "budget": budget or {"max_steps": 3600},
        "job": job,
    }
    return TrainingPlan.model_validate({"stages": [stage]})


EXACT = TrainingAssumptions(
    utilisation=1.0, start_minutes=0, step_milliseconds=0, spot_share=0.5, spot_repeated=0.1
)


def cost(plan, instance_type="ml.g5.xlarge", assumed=EXACT, region="us-east-1", **changes):
    return job_cost(plan, instance_type, load_prices(), assumed, region=region, **changes)


def test_an_hour_of_work_costs_an_hour_and_spot_its_share_with_what_is_repeated():
    found = cost(a_plan())
    assert found.hours == pytest.approx(1.0)
    assert found.on_demand_usd == pytest.approx(1.408)
    assert found.spot_usd == pytest.approx(1.408 * 0.5 * 1.1)
    assert found.fits
    assert not found.is_measured


def test_a_gpu_that_does_less_or_in_fp32_takes_longer():
    assert cost(a_plan(precision="fp32")).hours == pytest.approx(2.0)
    half = TrainingAssumptions(utilisation=0.5, start_minutes=30, step_milliseconds=0)
    assert cost(a_plan(), assumed=half).hours == pytest.approx(2.5)
    slow = TrainingAssumptions(utilisation=1, start_minutes=0, step_milliseconds=1000)
    assert cost(a_plan(), assumed=slow).hours == pytest.approx(2.0)


def test_every_gpu_of_a_host_shares_the_work():
    assert cost(a_plan(), "ml.g5.12xlarge").hours == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("budget", "pairs", "hours"),
    [({"max_minutes": 90}, None, 1.5), ({"epochs": 36}, 6400, 1.0), ({"epochs": 36}, 6390, 1.0)],
)
def test_a_budget_is_minutes_steps_or_epochs_of_so_many_pairs(budget, pairs, hours):
    assert cost(a_plan(budget), num_pairs=pairs).hours == pytest.approx(hours)


def test_epochs_without_a_number_of_pairs_are_refused_in_words():
    with pytest.raises(UserError, match="transformer has a budget of 20 epochs: give --pairs"):
        cost(a_plan({"epochs": 20}))


def test_a_plan_larger_than_a_gpu_does_not_fit_it():
    assert cost(a_plan(gib=30)).fits is False
    assert cost(a_plan(gib=30), "ml.g6e.xlarge").fits is True


def test_without_a_price_the_time_is_still_told_and_no_dollars_are_guessed():
    found = cost(a_plan(), "ml.g6e.xlarge", region="eu-central-1")
    assert found.hours
    assert (found.price, found.on_demand_usd, found.spot_usd) == (None, None, None)


def test_a_measured_time_takes_the_place_of_the_estimate():
    found = cost(a_plan(), "ml.c7i.2xlarge", measured_hours={"ml.c7i.2xlarge": 10})
    assert (found.hours, found.is_measured) == (10, True)
    assert found.on_demand_usd == pytest.approx(4.284)
    assert cost(a_plan(), "ml.c7i.2xlarge").hours is None


def test_a_file_that_is_no_plan_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"stages": []}')
    with pytest.raises(UserError, match=r"x\.json is not what `train --plan --json` prints"):
        load_plan(tmp_path / "x.json")


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(a_plan().model_dump_json())
    return path


def test_the_command_says_it_in_a_sentence_and_compares_three_types(plan_file, capsys):
    assert main(["cost", str(plan_file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Training costs least on ml.g6e.xlarge: $")
    for name in ("ml.g4dn.xlarge", "ml.g5.xlarge", "ml.g6e.xlarge"):
        assert f"\n{name}" in said
    assert said.index("a letter that says how far to trust it") < said.index(", C)")


def test_a_type_without_a_price_is_listed_as_price_unknown(plan_file, capsys):
    assert main(["cost", str(plan_file), "--region", "eu-central-1", "--json"]) == 0
    found = {each["instance_type"]: each for each in json.loads(capsys.readouterr().out)["costs"]}
    assert found["ml.g6e.xlarge"]["price"] is None
    assert found["ml.g5.xlarge"]["on_demand_usd"] > 0
    assert main(["cost", str(plan_file), "--region", "eu-central-1"]) == 0
    assert "ml.g6e.xlarge: price unknown; python -m infra prices refresh" in capsys.readouterr().out


def test_a_measured_type_is_not_said_to_be_estimated(plan_file, capsys):
    assert main(["cost", str(plan_file), "--hours", "ml.g5.xlarge=0.1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "measured on ml.g5.xlarge" in said
    assert "no job was measured" not in said


@pytest.mark.slow
def test_the_page_begins_with_the_sentence_and_the_chart(plan_file, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["cost", str(plan_file), "--html", str(page)]) == 0
    text = page.read_text("utf-8")
    places = [text.index(part) for part in ('class="lead"', "<svg", "<nav", "Reasons</h2>")]
    assert places == sorted(places)
    assert "$" in text[text.index("<svg") : text.index("</svg>")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--assume", "luck=1"], "there is no assumption 'luck'"),
        (["--assume", "utilisation=2"], "utilisation must be above 0, at most 1, got 2.0"),
        (["--assume", "start_minutes=-1"], "start_minutes must be 0 or more"),
        (["--hours", "ml.g5.xlarge=long"], "--hours must be NAME=NUMBER"),
        (["--hours", "ml.g5.xlarge=nan"], "--hours of ml.g5.xlarge must be more than 0, got nan"),
        (["--hours", "ml.g5.xlarge=-3"], "--hours of ml.g5.xlarge must be more than 0, got -3"),
        (["--hours", "ml.g5.2xlarge=3"], "--hours is of ml.g5.2xlarge, and the types are ml.g4dn"),
        (["--type", "ml.none.large"], "nothing is known of the instance type ml.none.large"),
    ],
)
def test_a_wrong_option_is_refused_by_name(plan_file, capsys, words, says):
    assert main(["cost", str(plan_file), *words]) == 1
    assert says in capsys.readouterr().err
