"""Runs joined with prices: what each may stand for, what each way costs, and which is best."""

import pytest

from dalle.errors import PriceMissing, UserError
from infra.benchmark.run_file import Hardware
from infra.compare.recommendation import recommendation, usd
from infra.compare.tables import NOT_MEASURED, article, busy, gpus, monthly
from infra.cost.prices import Price, load_prices
from tests.infra.measured_runs import CPU, GPU, a_run, compare, option, scenario

# --- who may stand for whom


def test_a_run_of_a_cpu_never_stands_for_a_gpu_nor_the_other_way_round():
    with pytest.raises(UserError, match="cpu was measured on a CPU, and ml.g5.xlarge has a GPU"):
        compare(("cpu", CPU, ["ml.g5.xlarge"]))
    with pytest.raises(UserError, match="gpu was measured on a GPU, and ml.m5.large has no GPU"):
        compare(("gpu", GPU, ["ml.m5.large"]))
    with pytest.raises(UserError, match="gpu was measured on a GPU; serverless has none"):
        compare(("gpu", GPU, ["serverless"]))


def test_a_run_needs_an_instance_type():
    with pytest.raises(UserError, match="cpu does not name the instance type .* cpu=TYPE"):
        compare(("cpu", CPU, []))
    said = CPU.model_copy(update={"stands_for": ["ml.m5.large"]})
    assert compare(("cpu", said, [])).priced_runs[0].stands_for == "ml.m5.large"
    assert compare(("cpu", said, ["ml.c5.large"])).priced_runs[0].stands_for == "ml.c5.large"


def test_two_runs_cannot_stand_for_one_type():
    with pytest.raises(UserError, match="one and two both stand for ml.m5.large"):
        compare(("one", CPU, ["ml.m5.large"]), ("two", CPU, ["ml.m5.large"]))


def test_a_type_without_a_price_is_an_error_and_no_guess():
    with pytest.raises(PriceMissing, match=r"ml.t3.medium .Hosting. .* is not offered"):
        compare(("cpu", CPU, ["ml.t3.medium"]))
    with pytest.raises(PriceMissing, match="nothing is known of the instance type ml.x.large"):
        compare(("cpu", CPU, ["ml.x.large"]))


def test_that_one_stands_for_the_other_is_an_assumption_with_what_speaks_against_it():
    comparison = compare(("cpu", CPU, ["ml.m5.xlarge", "ml.t2.medium", "serverless"]))
    said = {each.stands_for: each.assumption for each in comparison.priced_runs}
    assert "as fast as cpu, measured on Xeon 1, 2 processors, limited to 2" in said["ml.m5.xlarge"]
    assert "has 4 vCPUs where 2 processors were used" in said["ml.m5.xlarge"]
    assert "burstable" in said["ml.t2.medium"]
    assert "not promised" in said["serverless"]


def test_a_run_on_the_type_itself_is_no_assumption():
    run = a_run(hardware=Hardware(instance_type="ml.m5.large", num_cpus=2))
    assert compare(("e", run, ["ml.m5.large"])).priced_runs[0].assumption == (
        "measured on ml.m5.large itself"
    )


def test_a_run_without_an_answer_is_refused():
    empty = scenario(1, 1.0, 1.0, requests_per_second=0.0, outcomes={"500": 20}, latency=None)
    with pytest.raises(UserError, match="no closed loop with an answer"):
        compare(("cpu", a_run(empty), ["ml.m5.large"]))


# --- costs


def test_throughput_is_the_fullest_loads_and_latency_that_of_one_client():
    priced_run = compare(("cpu", CPU, ["ml.m5.large"])).priced_runs[0]
    assert priced_run.speed.requests_per_second == 2.0
    assert priced_run.speed.seconds_per_request == pytest.approx(1.0)
    assert priced_run.speed.images_per_request == 4
    assert priced_run.speed.gigabytes_per_request == pytest.approx(10_200 / 1e9)


def test_more_clients_that_only_wait_longer_are_not_what_a_server_can_do():
    run = a_run(scenario(1, 1.0, 1.0), scenario(8, 2.0, 4.0), scenario(64, 2.05, 32.0))
    assert compare(("cpu", run, ["ml.m5.large"])).priced_runs[0].scenario.clients == 8


def test_a_thousand_images_cost_price_over_throughput_with_both_factors_shown():
    comparison = compare(("cpu", CPU, ["ml.m5.large"]))
    row = busy(comparison).rows[0]
    per_1000 = 0.115 / 3600 / 2.0 * 1000
    assert row[:5] == [
        "ml.m5.large, always on", "$0.115", "2.00", usd(per_1000), usd(per_1000 / 4)
    ]  # fmt: skip
    assert row[-1] == "undated, C"


def test_each_run_gives_the_ways_to_serve_of_what_it_stands_for():
    comparison = compare(("cpu", CPU, ["ml.m5.large", "serverless", "lambda"]))
    assert [each.name for each in comparison.options] == [
        "ml.m5.large, always on",
        "ml.m5.large, scaled to zero",
        "serverless",
        "lambda",
    ]


def test_below_the_break_even_serverless_is_cheapest_and_above_it_the_instance():
    comparison = compare(("cpu", CPU, ["ml.m5.large", "serverless"]))
    below, above = comparison.ranges_at_once
    assert (below.option.kind, above.option.kind) == ("serverless", "always on")
    (crossing,) = comparison.crossings
    instance, seconds = (
        option(comparison, "ml.m5.large, always on"),
        option(comparison, "serverless"),
    )
    at = crossing.requests_per_day
    assert at == below.high == above.low
    assert instance.usd(at) == pytest.approx(seconds.usd(at), rel=1e-6)
    assert seconds.usd(at / 2) < instance.usd(at / 2)
    assert seconds.usd(at * 2) > instance.usd(at * 2)


def test_lambda_is_shown_but_never_recommended():
    comparison = compare(("cpu", CPU, ["ml.m5.large", "lambda"]))
    assert {each.option.kind for each in comparison.ranges_any} <= {"always on", "scaled to zero"}
    assert any("Left out: lambda, which needs an adapter" in s for s in recommendation(comparison))


def test_a_burstable_instance_is_shown_but_never_recommended():
    comparison = compare(("cpu", CPU, ["ml.t2.medium", "ml.m5.large"]))
    cheapest = option(comparison, "ml.t2.medium, always on")
    assert cheapest.usd(1) < option(comparison, "ml.m5.large, always on").usd(1)
    assert {each.option.priced_run.stands_for for each in comparison.ranges_any} == {"ml.m5.large"}
    assert "is burstable" in cheapest.problem


def test_what_takes_longer_than_an_invocation_may_is_only_served_asynchronously():
    slow = a_run(scenario(1, 0.01, 100.0))
    comparison = compare(("slow", slow, ["ml.m5.large", "serverless"]))
    assert comparison.ranges_at_once == []
    assert [each.option.kind for each in comparison.ranges_any] == ["scaled to zero"]
    (said,) = recommendation(comparison)
    assert said.endswith("Serve asynchronously.")
    assert "p99 is 110 s, and an invocation has 60 s" in said


def test_serverless_without_enough_memory_is_left_out():
    big = a_run(peak_memory_bytes=7 * 2**30)
    comparison = compare(("big", big, ["ml.m5.large", "serverless"]))
    assert option(comparison, "serverless").problem == (
        "has less memory than the 7.0 GiB that were used"
    )


def test_an_asynchronous_price_of_its_own_is_used_where_there_is_one():
    row = Price(
        item="ml.m5.large", component="AsyncInference", region="us-east-1", usd=0.2, unit="hour",
        date="2026-11-22", confidence="A", source="test",
    )  # fmt: skip
    table = load_prices().with_rows([row])
    waking = option(
        compare(("c", CPU, ["ml.m5.large"]), table=table), "ml.m5.large, scaled to zero"
    )
    assert waking.prices[0].usd == 0.2
    waking = option(compare(("c", CPU, ["ml.m5.large"])), "ml.m5.large, scaled to zero")
    assert waking.prices[0].usd == 0.115


# --- GPUs


def test_without_a_run_of_a_gpu_its_column_says_not_measured():
    comparison = compare(("cpu", CPU, ["ml.m5.large"]))
    rows = {row[0]: row for row in monthly(comparison).rows}
    assert set(rows["ml.g4dn.xlarge, always on"][1:-1]) == {NOT_MEASURED}
    said = " ".join(recommendation(comparison))
    assert "No GPU was measured" in said
    # 0.7364 / 0.115 = 6.4 times the price, so 6.4 times 2 requests a second.
    assert "above 12.8 requests/s, 6.4 times as many" in said
    assert gpus(comparison).rows[0][3:6] == [NOT_MEASURED, "12.8", "6.4"]


def test_a_gpu_that_was_measured_as_one_of_eight_has_the_price_of_a_single_one():
    hardware = Hardware(processor="Xeon 1", num_cpus=16, gpu="NVIDIA H100 80GB HBM3")
    run = a_run(device="cuda", hardware=hardware)
    comparison = compare(("h100", run, ["ml.p5.48xlarge"]))
    (priced_run,) = comparison.priced_runs
    assert priced_run.stands_for == "ml.p5.4xlarge"
    assert option(comparison, "ml.p5.4xlarge, always on").prices[0].usd == pytest.approx(7.912)
    assert "ml.p5.48xlarge, which was named, has several such GPUs" in priced_run.assumption
    assert "NVIDIA H100" not in {each.hardware.gpu for each in comparison.not_measured}


def test_several_gpus_without_a_single_one_are_said_to_stand_idle():
    (priced_run,) = compare(("gpu", GPU, ["ml.p4d.24xlarge"])).priced_runs
    assert priced_run.stands_for == "ml.p4d.24xlarge"
    assert "it has 8 GPUs, of which a server uses one" in priced_run.assumption


def test_of_each_gpu_that_was_not_measured_the_cheapest_host_is_named():
    found = [each.hardware.gpu for each in compare(("cpu", CPU, ["ml.m5.large"])).not_measured]
    assert found == ["NVIDIA T4", "NVIDIA L4", "NVIDIA A10G"]


def test_with_a_run_of_a_gpu_it_is_one_of_the_ways_to_serve():
    comparison = compare(("cpu", CPU, ["ml.m5.large"]), ("gpu", GPU, ["ml.g5.xlarge"]))
    names = [each.name for each in comparison.options]
    assert "ml.g5.xlarge, always on" in names
    assert not any(NOT_MEASURED in row for row in monthly(comparison).rows)
    assert "No GPU was measured" not in " ".join(recommendation(comparison))
    ratio = "ml.g5.xlarge 40.00 requests/s / ml.m5.large 2.00 requests/s"
    assert article(comparison).rows[-1][2:] == ["20.0", ratio]
