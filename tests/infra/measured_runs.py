"""Runs as `benchmark` would have written them, with round figures, and their comparison."""

from inference.bench.load import HTTP, STAGES
from inference.bench.workload import Workload
from infra.benchmark.run_file import Hardware, Run, Scenario, distribution
from infra.compare.comparison import compare_runs
from infra.cost.assumptions import Assumptions
from infra.cost.prices import load_prices

VOLUMES = (10.0, 1_000.0, 100_000.0)


def scenario(clients: int, rate: float, seconds: float, **changes) -> Scenario:
    """A closed loop with so many answers a second, each taking about so long."""
    latencies = [seconds * (0.9 + 0.2 * place / 19) for place in range(20)]
    stage = distribution([seconds / 6])
    fields = {
        "load": "closed",
        "clients": clients,
        "requests": 20,
        "outcomes": {"200": 20},
        "refusals": {},
        "cut_short": 0,
        "window_seconds": 20 / rate,
        "requests_per_second": rate,
        "images_per_second": 4 * rate,
        "candidates_per_second": 16 * rate,
        "by_round": [rate],
        "latency": distribution(latencies),
        "stages": dict.fromkeys((*STAGES, HTTP), stage),
        "late": None,
        "latencies_seconds": latencies,
        "request_bytes": 200.0,
        "reply_bytes": 10_000.0,
        "warm_up_seconds": [],
    }
    return Scenario(**(fields | changes))


def a_run(*scenarios: Scenario, device="cpu", **changes) -> Run:
    gpu = "NVIDIA A10G" if device == "cuda" else None
    fields = {
        "date": "2026-11-22T12:00:00Z",
        "kind": "image",
        "target": "dalle-sagemaker",
        "device": device,
        "hardware": Hardware(processor="Xeon 1", num_cpus=2, cpu_limit=2.0, gpu=gpu),
        "versions": {"torch": "2.10.0"},
        "workload": Workload(captions=["a red square"]),
        "scenarios": list(scenarios) or [scenario(1, 1.0, 1.0), scenario(8, 2.0, 4.0)],
        "peak_memory_bytes": 2**30,
    }
    return Run(**(fields | changes))


CPU = a_run()
GPU = a_run(scenario(1, 10.0, 0.1), scenario(8, 40.0, 0.2), device="cuda")


def compare(*runs, table=None, volumes=VOLUMES, **assumed):
    return compare_runs(
        runs,
        table or load_prices(),
        region="us-east-1",
        assumptions=Assumptions().with_values(assumed),
        volumes=volumes,
    )


def option(comparison, name):
    return next(each for each in comparison.options if each.name == name)
