"""The arithmetic of costs: worked examples, limits, and a simulation of what a formula claims."""

import dataclasses
import math
import random

import pytest

from dalle.errors import UserError
from infra.cost import costs
from infra.cost.assumptions import Assumptions
from infra.cost.costs import HourlyPrices, MonthlyCost, Speed

# One request a second, 2 s when alone; 16 candidates, 4 pictures, a megabyte each way.
SPEED = Speed(
    requests_per_second=1.0,
    seconds_per_request=2.0,
    images_per_request=4,
    candidates_per_request=16,
    gigabytes_per_request=0.002,
)
PRICES = HourlyPrices(usd_per_hour=0.36, usd_per_volume_gb_month=0.1, usd_per_data_gb=0.05)
EVEN = Assumptions(peak_to_mean=1.0)


def test_a_thousand_requests_while_busy_cost_price_over_throughput():
    cost = costs.busy(SPEED, 0.36)
    assert cost.usd_per_1000_requests == pytest.approx(0.36 / 3600 * 1000)
    assert cost.usd_per_1000_images == pytest.approx(0.1 / 4)
    assert cost.usd_per_1000_candidates == pytest.approx(0.1 / 16)
    assert cost.usd_per_hour == 0.36
    assert cost.requests_per_second == pytest.approx(1.0)


def test_what_is_paid_by_the_second_costs_its_memory_times_the_seconds_of_one_request():
    cost = costs.busy_by_the_second(SPEED, 0.00002, 6)
    assert cost.usd_per_1000_requests == pytest.approx(0.00002 * 6 * 2 * 1000)
    assert cost.requests_per_second == pytest.approx(0.5)


def test_an_instance_that_is_always_on_costs_the_same_for_no_request_and_for_few():
    month = MonthlyCost(SPEED, EVEN).always_on(0, PRICES)
    assert month.usd_compute == pytest.approx(0.36 * 730)
    assert month.usd_volume == pytest.approx(EVEN.volume_gb * 0.1)
    assert (month.usd_data, month.mean_instances) == (0, 1)
    assert MonthlyCost(SPEED, EVEN).always_on(1000, PRICES).usd_compute == month.usd_compute


def test_data_is_paid_for_by_the_gigabyte():
    month = MonthlyCost(SPEED, EVEN).always_on(240, PRICES)
    assert month.usd_data == pytest.approx(240 * 730 / 24 * 0.002 * 0.05)


def test_instances_follow_the_load_beyond_what_one_carries():
    full = 0.7 * 86_400  # requests a day that load one instance to its target
    assert MonthlyCost(SPEED, EVEN).always_on(full, PRICES).mean_instances == pytest.approx(1)
    assert MonthlyCost(SPEED, EVEN).always_on(5 * full, PRICES).mean_instances == pytest.approx(5)


def test_in_busy_hours_more_instances_are_needed_and_one_is_left_at_night():
    uneven = Assumptions(peak_to_mean=3.0)
    month = MonthlyCost(SPEED, uneven).always_on(2 * 0.7 * 86_400, PRICES)
    assert month.busy_instances == 6
    assert month.mean_instances == pytest.approx((6 * 8 + 1 * 16) / 24)


def simulated_cold_share(rate, warm, cold_start, requests=200_000):
    """Of a stream of random arrivals, those that find the instance gone; and the time it is up."""
    chance, gone_at, now, cold, up = random.Random(7), 0.0, 0.0, 0, 0.0
    for _ in range(requests):
        now += chance.expovariate(rate)
        if now >= gone_at:
            cold += 1
            begins, gone_at = now, now + cold_start + warm
        else:
            # The instance may still be starting: it stays for the request's own time at least.
            begins, gone_at = gone_at, max(gone_at, now + warm)
        up += gone_at - begins
    return cold / requests, up / now


@pytest.mark.parametrize("per_hour", [0.5, 2, 6])
def test_the_share_of_cold_requests_and_of_time_up_is_what_a_simulation_finds(per_hour):
    rate, warm, cold_start = per_hour / 3600, 902.0, 360.0
    formula = costs.cold_share(rate, warm_seconds=warm, cold_start_seconds=cold_start)
    cold, up = simulated_cold_share(rate, warm, cold_start)
    # In the simulation a request that comes during a cold start does not prolong it by a cold
    # start of its own; the formula neglects how much later the tail then ends.
    assert cold == pytest.approx(formula, abs=0.02)
    assert up == pytest.approx(1 - formula, abs=0.02)


def test_without_requests_nothing_is_up_and_with_many_always():
    share = costs.cold_share
    assert share(1e-9, warm_seconds=900, cold_start_seconds=360) == pytest.approx(1, abs=1e-4)
    assert share(1.0, warm_seconds=900, cold_start_seconds=360) == pytest.approx(0, abs=1e-9)
    month = MonthlyCost(SPEED, EVEN).scale_to_zero(0.001, PRICES)
    assert month.usd < 0.01
    assert month.cold_share == pytest.approx(1, abs=1e-3)


def test_a_rare_request_pays_for_cold_start_work_and_idle_tail():
    month = MonthlyCost(SPEED, EVEN).scale_to_zero(0.1, PRICES)
    seconds = EVEN.async_cold_start_seconds + 1.0 + EVEN.async_idle_tail_seconds
    hours = 0.1 * EVEN.days_per_month * seconds / 3600
    assert month.usd_compute == pytest.approx(hours * 0.36, rel=0.01)
    assert month.added_seconds == EVEN.async_cold_start_seconds


def test_scaled_to_zero_never_costs_more_than_always_on():
    for requests in (1, 10, 100, 1e3, 1e4, 1e5, 1e6):
        for assumptions in (EVEN, Assumptions()):
            asleep = MonthlyCost(SPEED, assumptions).scale_to_zero(requests, PRICES).usd
            assert asleep <= MonthlyCost(SPEED, assumptions).always_on(requests, PRICES).usd


def test_serverless_costs_seconds_of_memory_and_nothing_while_idle():
    month = MonthlyCost(SPEED, EVEN).serverless(
        100, usd_per_gb_second=0.00002, usd_per_data_gb=0.016
    )
    requests = 100 * 730 / 24
    assert month.usd_compute == pytest.approx(requests * 2 * 6 * 0.00002)
    assert month.usd_data == pytest.approx(requests * 0.002 * 0.016)
    assert month.usd == pytest.approx(month.usd_compute + month.usd_data)
    nothing = MonthlyCost(SPEED, EVEN).serverless(0, usd_per_gb_second=1, usd_per_data_gb=1)
    assert nothing.usd == 0


def test_a_lambda_function_pays_for_its_cold_starts_and_calls_too():
    def month(requests):
        return MonthlyCost(SPEED, EVEN).lambda_function(
            requests, usd_per_gb_second=0.00001, usd_per_million_requests=0.2
        )

    rare, often = month(0.01), month(1e5)
    assert rare.cold_share == pytest.approx(1, abs=1e-3)
    per_request = rare.usd_compute / (0.01 * EVEN.days_per_month)
    assert per_request == pytest.approx(
        (2 + EVEN.lambda_cold_start_seconds) * 10 * 0.00001, rel=0.01
    )
    assert often.usd_requests == pytest.approx(1e5 * EVEN.days_per_month * 0.2 / 1e6)
    assert often.usd_compute == pytest.approx(1e5 * EVEN.days_per_month * 2 * 10 * 0.00001)


def test_what_is_paid_by_the_second_needs_one_client_alone():
    speed = dataclasses.replace(SPEED, seconds_per_request=None)
    with pytest.raises(UserError, match="--clients 1"):
        MonthlyCost(speed, EVEN).serverless(1, usd_per_gb_second=1, usd_per_data_gb=1)


def test_the_break_even_of_two_lines_is_where_they_meet():
    (found,) = costs.crossings(lambda n: 75.0, lambda n: 0.003 * n)
    assert found == pytest.approx(25_000)
    assert costs.crossings(lambda n: 1.0, lambda n: 2.0) == []


def test_every_break_even_is_found_steps_too():
    steps = [math.ceil(n / 1000) * 10.0 for n in (500, 1500)]
    assert steps == [10, 20]
    found = costs.crossings(
        lambda n: math.ceil(n / 1000) * 10.0, lambda n: 15.0 + 0 * n, low=1, high=1e4
    )
    assert found == [pytest.approx(1000, rel=1e-3)]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("peak_to_mean", 0.5, "peak_to_mean at least 1"),
        ("target_utilisation", 1.2, "target_utilisation must be above 0, at most 1"),
        ("async_utilisation", 0, "async_utilisation must be above 0"),
        ("volume_gb", -1, "volume_gb must be 0 or more"),
        ("hours_per_month", math.inf, "hours_per_month must be 0 or more"),
        ("hours_per_month", 0, "hours_per_month must be above 0"),
        ("peak", 2, "there is no assumption 'peak'; there are async_cold_start_seconds"),
    ],
)
def test_an_assumption_that_cannot_be_is_refused_by_name(name, value, says):
    with pytest.raises(UserError, match=says):
        Assumptions().with_values({name: value})


def test_every_assumption_has_a_unit_and_a_meaning():
    for each in dataclasses.fields(Assumptions):
        assert each.metadata["unit"], each.name
        assert each.metadata["meaning"], each.name


def test_a_run_without_an_answer_has_no_cost():
    with pytest.raises(UserError, match="without an answered request"):
        dataclasses.replace(SPEED, requests_per_second=0.0)
