"""One measured run and what it stands for: the ways to serve that follow, each with its cost.

Which instance type a run stands for is said by whoever measured it, never found out: a run of a
CPU is never joined with the price of a GPU, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dalle.errors import UserError
from infra.benchmark.run_file import Run, Scenario
from infra.cost import costs
from infra.cost.assumptions import Assumptions
from infra.cost.costs import BusyCost, Month, Speed
from infra.cost.prices import Price, PriceTable

SERVERLESS, LAMBDA = "serverless", "lambda"
LAMBDA_CAVEAT = "needs an adapter to Lambda's Runtime API, which the image does not have"
BURSTABLE_CAVEAT = "is burstable: the measured speed lasts only while its CPU credits do"
SERVERLESS_BYTES = 4e6  # of a request or a reply
BURSTABLE = ("ml.t2.", "ml.t3.")

Kind = Literal["always on", "scaled to zero", "serverless", "lambda"]
ORDER: tuple[Kind, ...] = ("always on", "scaled to zero", "serverless", "lambda")


@dataclass(frozen=True)
class Joined:
    """A run, the instance type (or serverless, lambda) that it stands for, and what that means.

    name: the run's, for people. assumption: that one stands for the other, in words, with what
    speaks against it.
    """

    name: str
    run: Run
    stands_for: str
    scenario: Scenario
    speed: Speed
    assumption: str


@dataclass(frozen=True)
class Option:
    """One way to serve. month: requests a day -> what a month costs.

    problem: why it cannot be recommended; empty when it can.
    """

    kind: Kind
    joined: Joined
    prices: tuple[Price, ...]
    busy: BusyCost
    month: Callable[[float], Month]
    problem: str = ""

    @property
    def name(self) -> str:
        if self.kind in (SERVERLESS, LAMBDA):
            return self.kind
        return f"{self.joined.stands_for}, {self.kind}"

    def usd(self, requests_per_day: float) -> float:
        """What a month costs."""
        return self.month(requests_per_day).usd

    @property
    def answers_at_once(self) -> bool:
        """Whether a request is answered while its caller waits."""
        return self.kind != "scaled to zero"


def types_of(name: str, run: Run, types: Sequence[str]) -> Sequence[str]:
    found = list(types) or run.stands_for
    if not found:
        raise UserError(
            f"{name} does not say which instance type it stands for: give {name}=TYPE (for example "
            f"{name}=ml.c7i.large,serverless), or benchmark --as TYPE"
        )
    return found


def joined_of(name: str, run: Run, stands_for: str, table: PriceTable) -> Joined:
    scenario = run.saturated
    if scenario is None:
        raise UserError(f"{name} has no closed loop with an answer: benchmark it with --clients")
    latency = run.alone.latency if run.alone else None
    answered = scenario.outcomes.get("200", 0)
    speed = Speed(
        requests_per_second=scenario.requests_per_second,
        seconds_per_request=latency.mean if latency else None,
        images_per_request=scenario.images_per_second / scenario.requests_per_second,
        candidates_per_request=scenario.candidates_per_second / scenario.requests_per_second,
        gigabytes_per_request=(scenario.request_bytes + scenario.reply_bytes) / 1e9,
    )
    assert answered > 0
    measured_on = run.hardware.describe()
    if run.hardware.instance_type == stands_for:
        return Joined(name, run, stands_for, scenario, speed, f"measured on {stands_for} itself")
    if stands_for in (SERVERLESS, LAMBDA):
        if run.device != "cpu":
            raise UserError(f"{name} was measured on a GPU; {stands_for} has none")
        doubt = "how many processors AWS gives at that memory is not promised"
    else:
        kind = table.instance_type(stands_for)
        if (run.device == "cuda") != (kind.gpus > 0):
            has = "has a GPU" if kind.gpus else "has no GPU"
            used = "a GPU" if run.device == "cuda" else "a CPU"
            raise UserError(
                f"{name} was measured on {used}, and {stands_for} {has}: a run of one never "
                "stands for the other"
            )
        doubt = "it was not measured itself"
        used_cpus = run.hardware.cpu_limit or run.hardware.num_cpus
        if run.device == "cpu" and used_cpus and used_cpus != kind.vcpus:
            doubt += f", and has {kind.vcpus} vCPUs where {used_cpus:g} processors were used"
        elif run.device == "cpu":
            doubt += "; its vCPUs may be threads that share a core, and its processor slower"
        if stands_for.startswith(BURSTABLE):
            doubt += "; it is burstable, and slower once its CPU credits are spent"
    text = f"that {stands_for} is as fast as {name}, measured on {measured_on}; but {doubt}"
    return Joined(name, run, stands_for, scenario, speed, text)


def options_of(
    joined: Joined, table: PriceTable, region: str, assumptions: Assumptions
) -> list[Option]:
    speed = joined.speed
    problem = _too_slow(joined, assumptions)
    if joined.stands_for == SERVERLESS:
        compute = table.price(SERVERLESS, "compute", region)
        data = table.price(SERVERLESS, "data", region)
        memory = joined.run.peak_memory_bytes
        if memory and memory > assumptions.serverless_memory_gb * 2**30:
            problem = f"has less memory than the {memory / 2**30:.1f} GiB that were used"
        if joined.scenario.reply_bytes > SERVERLESS_BYTES:
            problem = f"carries 4 MB at most, and replies had {joined.scenario.reply_bytes:,.0f}"
        return [
            Option(
                "serverless",
                joined,
                (compute, data),
                costs.busy_by_the_second(speed, compute.usd, assumptions.serverless_memory_gb),
                lambda requests: costs.serverless(
                    speed,
                    requests,
                    assumptions,
                    usd_per_gb_second=compute.usd,
                    usd_per_data_gb=data.usd,
                ),
                problem,
            )
        ]
    if joined.stands_for == LAMBDA:
        compute = table.price(LAMBDA, "compute", region)
        calls = table.price(LAMBDA, "requests", region)
        return [
            Option(
                "lambda",
                joined,
                (compute, calls),
                costs.busy_by_the_second(speed, compute.usd, assumptions.lambda_memory_gb),
                lambda requests: costs.lambda_function(
                    speed,
                    requests,
                    assumptions,
                    usd_per_gb_second=compute.usd,
                    usd_per_million_requests=calls.usd,
                ),
                LAMBDA_CAVEAT,
            )
        ]
    hour = table.hourly(joined.stands_for, region)
    volume = table.price("endpoint", "volume", region)
    data = table.price("endpoint", "data", region)
    always = _hourly_prices(hour, volume, data)
    waking_hour = _asynchronous(table, joined.stands_for, region)
    waking = _hourly_prices(waking_hour, volume, data)
    tires = BURSTABLE_CAVEAT if joined.stands_for.startswith(BURSTABLE) else ""
    return [
        Option(
            "always on",
            joined,
            (hour, volume, data),
            costs.busy(speed, hour.usd),
            lambda requests: costs.always_on(speed, requests, assumptions, always),
            problem or tires,
        ),
        Option(
            "scaled to zero",
            joined,
            (waking_hour, volume, data),
            costs.busy(speed, waking_hour.usd),
            lambda requests: costs.scale_to_zero(speed, requests, assumptions, waking),
            tires,
        ),
    ]


def _hourly_prices(hour: Price, volume: Price, data: Price) -> costs.HourlyPrices:
    return costs.HourlyPrices(
        usd_per_hour=hour.usd, usd_per_volume_gb_month=volume.usd, usd_per_data_gb=data.usd
    )


def _asynchronous(table: PriceTable, instance_type: str, region: str) -> Price:
    """The price of an hour of an asynchronous endpoint: its own row, else that of hosting, which
    was the same wherever both were seen. The report says which."""
    for each in table.prices:
        if each.key == (instance_type, "AsyncInference", region):
            return each
    return table.hourly(instance_type, region)


def _too_slow(joined: Joined, assumptions: Assumptions) -> str:
    """Why a caller who waits would be cut off; empty when nobody would."""
    alone = joined.run.alone or joined.scenario
    limit = assumptions.synchronous_limit_seconds
    if alone.latency and alone.latency.p99 > limit:
        return f"is cut off: p99 is {alone.latency.p99:.0f} s, and an invocation has {limit:.0f} s"
    return ""
