"""`python -m infra benchmark` against the real `serve`, an endpoint, and the image: what RUN.json
holds, and what is refused before anything is measured."""

import json
import os
import threading
from pathlib import Path

import pytest

from dalle.errors import UserError
from inference.bench.load import HTTP, RETRY, STAGES, Measurement, Record
from infra.__main__ import main
from infra.benchmark.machine import CpuClock, processor_name, this_machine
from infra.benchmark.run_file import Run, distribution, load_run, summarise, thinned
from infra.local.endpoint import RuntimeFacade
from tests.infra.aws_account import NUMBER, REGION, Account

CAPTIONS = ["--caption", "small red square", "--caption", "big blue star"]
QUICK = ["--num-candidates", "4", "--num-images", "2", "--warm-up", "1", *CAPTIONS]


def benchmark(out: Path, *words: str) -> tuple[int, Path]:
    return main(["benchmark", "--out", str(out), *words]), out


@pytest.fixture(scope="module")
def run(serve_url, tmp_path_factory) -> Run:
    """One benchmark of the real server: one client, three, and arrivals."""
    out = tmp_path_factory.mktemp("run") / "RUN.json"
    loads = ["--clients", "1", "--clients", "3", "--rate", "50", "--requests", "6"]
    status, _ = benchmark(out, "--url", serve_url, *loads, *QUICK, "--as", "ml.m5.large")
    assert status == 0
    return load_run(out)


@pytest.mark.slow
def test_every_load_is_measured_and_every_request_answered(run):
    assert [each.name for each in run.scenarios] == [
        "1 client",
        "3 clients",
        "50 requests/s arriving",
    ]
    for each in run.scenarios:
        assert (each.requests, each.outcomes, each.errors) == (6, {"200": 6}, 0)
        assert len(each.latencies_seconds) == each.latency.count == 6
        assert each.latencies_seconds == sorted(each.latencies_seconds)
        assert len(each.warm_up_seconds) == 1


@pytest.mark.slow
def test_every_round_is_kept_beside_their_sum(serve_url, tmp_path):
    words = ["--url", serve_url, "--clients", "2", "--requests", "6", "--rounds", "3", *QUICK]
    assert benchmark(tmp_path / "r.json", *words)[0] == 0
    (scenario,) = load_run(tmp_path / "r.json").scenarios
    assert len(scenario.by_round) == 3
    assert min(scenario.by_round) <= scenario.requests_per_second <= max(scenario.by_round)


@pytest.mark.slow
def test_a_loop_does_not_end_before_every_client_may_have_been_answered_twice(serve_url, tmp_path):
    words = ["--url", serve_url, "--clients", "5", "--requests", "1", *QUICK]
    assert benchmark(tmp_path / "r.json", *words)[0] == 0
    assert load_run(tmp_path / "r.json").scenarios[0].requests == 10


def test_rates_are_those_of_the_window_and_of_what_a_request_returns(run):
    for each in run.scenarios:
        assert each.requests_per_second == pytest.approx(6 / each.window_seconds)
        assert each.images_per_second == pytest.approx(2 * each.requests_per_second)
        assert each.candidates_per_second == pytest.approx(4 * each.requests_per_second)


def test_the_stages_of_the_reply_and_the_rest_make_up_the_latency(run):
    for each in run.scenarios[:2]:
        assert set(each.stages) == {*STAGES, HTTP}
        assert sum(s.mean for s in each.stages.values()) == pytest.approx(each.latency.mean)
        assert each.stages["sample"].mean > 0


def test_a_run_names_its_date_its_hardware_its_workload_and_its_versions(run):
    assert run.device == "cpu"
    assert run.hardware.processor == this_machine().processor
    assert run.hardware.num_cpus == os.cpu_count()
    assert run.workload.captions == ["small red square", "big blue star"]
    assert run.versions["dalle-sagemaker"]
    assert run.stands_for == ["ml.m5.large"]
    assert run.load_average is not None


def test_the_one_client_alone_and_the_fullest_load_are_found(run):
    assert run.alone.name == "1 client"
    assert run.saturated.load == "closed"
    most = max(each.requests_per_second for each in run.scenarios if each.load == "closed")
    assert run.saturated.requests_per_second >= 0.95 * most


def test_the_last_line_is_json_that_names_the_file(serve_url, tmp_path, capsys):
    status, out = benchmark(
        tmp_path / "deep" / "r.json", "--url", serve_url, "--clients", "1", "--requests", "2",
        *QUICK,
    )  # fmt: skip
    assert status == 0
    *_, last = capsys.readouterr().out.splitlines()
    (brief,) = json.loads(last)["runs"]
    assert brief["out"] == str(out)
    assert brief["scenarios"]["1 client"]["failed"] == 0


def test_nothing_but_json_goes_to_stdout_when_it_is_asked_for(serve_url, tmp_path, capsys):
    words = ["--url", serve_url, "--clients", "1", "--requests", "1", *QUICK, "--json"]
    assert benchmark(tmp_path / "r.json", *words)[0] == 0
    result = capsys.readouterr()
    assert json.loads(result.out)["runs"]
    assert "requests/s" in result.err


def test_requests_that_the_server_refuses_are_a_failure_that_counts_them(
    serve_url, tmp_path, capsys
):
    words = ["--url", serve_url, "--clients", "1", "--requests", "2", "--warm-up", "0"]
    status, out = benchmark(tmp_path / "r.json", *words, "--caption", "red " * 60)
    assert (status, out.exists()) == (1, False)
    assert "no request was answered: {'422': 2}" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_sends_nothing(tmp_path, capsys):
    words = ["--url", "http://127.0.0.1:9", "--clients", "2", "--dry-run", *QUICK]
    status, out = benchmark(tmp_path / "r.json", *words)
    assert (status, out.exists()) == (0, False)
    plan = json.loads(capsys.readouterr().out)
    assert plan["loads"] == [{"clients": 2}]
    assert plan["first_request"]["caption"] == "small red square"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 is not ready"),
        (["--url", "http://example.invalid"], "give --device cpu or --device cuda"),
        (["--url", "nonsense"], "must be like http://127.0.0.1:8080"),
        (["--image", "x"], "--image and --model go together"),
        (["--url", "http://127.0.0.1:9", "--requests", "0"], "--requests must be 1 or more"),
        (["--url", "http://127.0.0.1:9", "--clients", "0"], "--clients must be 1 to 512, got 0"),
        (["--url", "http://127.0.0.1:9", "--rate", "0"], "--rate must be above 0, got 0"),
        (["--url", "http://127.0.0.1:9", "--captions", "none.txt"], "none.txt cannot be read"),
        (["--url", "http://127.0.0.1:9", "--num-images", "99"], "num_images must be 1 to"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_to_change(tmp_path, capsys, words, says):
    assert benchmark(tmp_path / "r.json", *words)[0] == 1
    assert says in capsys.readouterr().err


# --- an endpoint: the control plane is moto, its container the real server


@pytest.fixture(scope="module")
def endpoint(serve_url, moto_address):
    """An account with three endpoints, and the environment in which they are found."""
    port = int(serve_url.rpartition(":")[2])
    account = Account(moto_address)
    account.reset()
    sagemaker = account.client("sagemaker")
    role = f"arn:aws:iam::{NUMBER}:role/dalle"
    image = f"{NUMBER}.dkr.ecr.{REGION}.amazonaws.com/dalle:latest"
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=role, PrimaryContainer={"Image": image})
    instance = {"VariantName": "v", "ModelName": "m", "InstanceType": "ml.m5.large"}
    variants = {
        "real": {**instance, "InitialInstanceCount": 1},
        "several": {**instance, "InitialInstanceCount": 2},
        "serverless": {
            "VariantName": "v",
            "ModelName": "m",
            "ServerlessConfig": {"MemorySizeInMB": 6144, "MaxConcurrency": 2},
        },
        "async": {**instance, "InitialInstanceCount": 1},
    }
    for name, variant in variants.items():
        more = (
            {"AsyncInferenceConfig": {"OutputConfig": {"S3OutputPath": "s3://b/p"}}}
            if name == "async"
            else {}
        )
        sagemaker.create_endpoint_config(
            EndpointConfigName=name, ProductionVariants=[variant], **more
        )
        sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)
    with RuntimeFacade(dict.fromkeys(variants, port)) as runtime:
        yield {
            **account.environment,
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": runtime.url,
        }
    account.close()


@pytest.fixture
def in_the_account(endpoint, monkeypatch):
    for name, value in endpoint.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("in_the_account")
@pytest.mark.parametrize(("name", "kind"), [("real", "ml.m5.large"), ("serverless", "serverless")])
def test_an_endpoint_is_measured_by_boto3_and_stands_for_what_it_is(tmp_path, name, kind):
    words = ["--endpoint", name, "--clients", "1", "--requests", "3", *QUICK]
    status, out = benchmark(tmp_path / "r.json", *words)
    assert status == 0
    run = load_run(out)
    assert (run.kind, run.target, run.device) == ("endpoint", name, "cpu")
    assert run.stands_for == [kind]
    assert run.scenarios[0].outcomes == {"200": 3}
    assert run.scenarios[0].stages["sample"].mean > 0


@pytest.mark.usefixtures("in_the_account")
def test_an_error_of_the_container_behind_an_endpoint_is_counted_by_its_own_status(
    tmp_path, capsys
):
    words = ["--endpoint", "real", "--clients", "1", "--requests", "2", "--warm-up", "0"]
    assert benchmark(tmp_path / "r.json", *words, "--caption", "red " * 60)[0] == 1
    assert "no request was answered: {'422': 2}" in capsys.readouterr().err


@pytest.mark.usefixtures("in_the_account")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("async", "async is asynchronous"),
        ("several", "several has 2 instances: scale it to 1"),
        ("none", "none"),
    ],
)
def test_an_endpoint_whose_figures_would_mean_nothing_is_refused(tmp_path, capsys, name, says):
    assert benchmark(tmp_path / "r.json", "--endpoint", name)[0] == 1
    assert says in capsys.readouterr().err


# --- the image


@pytest.mark.docker
def test_the_image_is_measured_under_each_limit_in_turns(image, archive, tmp_path, capsys):
    words = ["--image", image, "--model", str(archive), "--cpus", "1", "--cpus", "2"]
    words += ["--memory", "3g", "--clients", "1", "--requests", "4", "--rounds", "2", *QUICK]
    status, _ = benchmark(tmp_path / "r.json", *words)
    assert status == 0
    runs = [load_run(tmp_path / f"r-{name}.json") for name in ("1cpus", "2cpus")]
    assert [each.hardware.cpu_limit for each in runs] == [1, 2]
    assert [each.interleaved_with for each in runs] == [["2 cpus"], ["1 cpus"]]
    for each in runs:
        (scenario,) = each.scenarios
        assert (each.rounds, scenario.outcomes) == (2, {"200": 4})
        assert scenario.cpu_seconds > 0
        assert 0 <= scenario.others_share <= 1
        assert 1e8 < each.peak_memory_bytes < 3 * 2**30
        assert each.ready_seconds > 0
        assert each.hardware.memory_limit == "3g"
        assert each.versions["torch"].startswith("2.")
    result = capsys.readouterr().out
    assert "1 client: 2 processors answer" in result
    assert "(median of 2 rounds" in result


def test_without_the_image_the_missing_part_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DOCKER", "no-such-program")
    words = ["--image", "dalle-sagemaker", "--model", str(tmp_path)]
    assert benchmark(tmp_path / "r.json", *words)[0] == 1
    assert "no-such-program is not installed" in capsys.readouterr().err


# --- its parts


def test_percentiles_lie_where_they_should():
    found = distribution([float(n) for n in range(101)])
    assert (found.p50, found.p95, found.p99) == (50, 95, 99)
    assert (found.mean, found.minimum, found.maximum, found.count) == (50, 0, 100, 101)
    assert distribution([]) is None


def test_thinning_keeps_the_first_the_last_and_the_order():
    values = [float(n) for n in range(10_001)]
    kept = thinned(values, 100)
    assert (len(kept), kept[0], kept[-1]) == (100, 0, 10_000)
    assert kept == sorted(kept)
    assert thinned(values, 20_000) == values


def test_a_failed_request_counts_but_its_latency_does_not():
    stages = dict.fromkeys((*STAGES, HTTP), 0.1) | {RETRY: 0.0}
    good = Record(0, "200", 0.6, stages=stages, num_images=2, completed_candidates=4)
    measured = Measurement([good, Record(1, "500", 99.0)], 2.0)
    found = summarise([measured], clients=1, rate_per_second=None, warm_up=[])
    assert (found.requests, found.errors, found.outcomes) == (2, 1, {"200": 1, "500": 1})
    assert found.requests_per_second == 0.5
    assert found.latency.maximum == 0.6
    assert RETRY not in found.stages, "nothing was refused"


def test_a_run_that_is_none_is_named_with_what_is_wrong(tmp_path, run):
    path = tmp_path / "r.json"
    path.write_text(run.model_dump_json().replace('"format":1', '"format":2'))
    with pytest.raises(UserError, match=r"(?s)r.json is no run .*format"):
        load_run(path)
    with pytest.raises(UserError, match="none.json cannot be read"):
        load_run(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("Intel(R) Xeon(R) Processor", ("6", "207"), "Intel Xeon Processor (family 6, model 207)"),
        ("AMD EPYC 7R13 Processor", ("25", "1"), "AMD EPYC 7R13 Processor"),
    ],
)
def test_a_processor_that_hides_its_model_is_reported_by_its_numbers(name, numbers, expected):
    family, model = numbers
    cpuinfo = f"cpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\nstepping\t: 8\n"
    assert processor_name(cpuinfo) == expected
    assert processor_name("") is None


def test_the_gpu_of_a_server_here_is_named_by_its_driver(tmp_path):
    (tmp_path / "proc/driver/nvidia/gpus/0000:06:00.0").mkdir(parents=True)
    result = tmp_path / "proc/driver/nvidia/gpus/0000:06:00.0/information"
    result.write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 42\n")
    assert this_machine("cuda", tmp_path).gpu == "NVIDIA H100 80GB HBM3"
    assert this_machine("cuda", tmp_path / "proc").gpu is None
    assert this_machine("cpu", tmp_path).gpu is None


def test_the_others_share_is_the_busy_time_less_the_servers(tmp_path, monkeypatch):
    ticks = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "proc" / "stat"
    stat.parent.mkdir()
    stat.write_text("cpu 0 0 0 0 0 0 0 0\n")
    now = iter([100.0, 110.0])
    monkeypatch.setattr("infra.benchmark.machine.time.monotonic", lambda: next(now))
    monkeypatch.setattr("infra.benchmark.machine.time.process_time", lambda: 0.0)
    monkeypatch.setattr("infra.benchmark.machine.os.cpu_count", lambda: 2)
    clock = CpuClock(tmp_path)
    # 12 of 20 processor seconds were busy, 7 of them the server's.
    stat.write_text(f"cpu {10 * ticks} 0 {2 * ticks} 999 0 0 0 0\n")
    assert clock.others_share(7.0) == pytest.approx(5 / 20)


def test_without_the_servers_time_the_others_share_is_none():
    assert CpuClock().others_share(None) is None
    assert CpuClock(Path("/nonexistent")).others_share(1.0) is None


@pytest.mark.slow
def test_measuring_leaves_no_thread_behind(serve_url, tmp_path):
    before = threading.active_count()
    words = ["--url", serve_url, "--clients", "4", "--requests", "4", *QUICK]
    assert benchmark(tmp_path / "r.json", *words)[0] == 0
    assert threading.active_count() == before
