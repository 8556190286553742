"""The ways to serve with the instance types that a measured run stands for, each with its cost.

The user names the instance type that a run stands for. A run on a CPU never stands for a GPU, nor
the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dalle.errors import UserError
from infra.benchmark.run_file import Run, Scenario
from infra.cost import costs
from infra.cost.assumptions import Assumptions
from infra.cost.costs import BusyCost, Month, MonthlyCost, Speed
from infra.cost.prices import Price, PriceTable

SERVERLESS, LAMBDA = "serverless", "lambda"
LAMBDA_CAVEAT = "needs an adapter to Lambda's Runtime API, which the image does not have"
BURSTABLE_CAVEAT = "is burstable: the measured speed lasts only while its CPU credits do"
SERVERLESS_BYTES = 4e6  # of a request or a reply
BURSTABLE = ("ml.t2.", "ml.t3.")

Kind = Literal["always on", "scaled to zero", "serverless", "lambda"]
ORDER: tuple[Kind, ...] = ("always on", "scaled to zero", "serverless", "lambda")


@dataclass(frozen=True)
class PricedRun:
    """A run with the instance type (or serverless, lambda) that it stands for, and its speed.

    assumption: that the run stands for the type, in words, with the doubts about it.
    """

    name: str
    run: Run
    stands_for: str
    scenario: Scenario
    speed: Speed
    assumption: str


@dataclass(frozen=True)
class Option:
    """One way to serve. month: requests a day -> the cost of a month.

    problem: why it cannot be recommended; empty when it can.
    """

    kind: Kind
    priced_run: PricedRun
    prices: tuple[Price, ...]
    busy: BusyCost
    month: Callable[[float], Month]
    problem: str = ""

    @property
    def name(self) -> str:
        if self.kind in (SERVERLESS, LAMBDA):
            return self.kind
        return f"{self.priced_run.stands_for}, {self.kind}"

    def usd(self, requests_per_day: float) -> float:
        """Return the cost of a month."""
        return self.month(requests_per_day).usd

    @property
    def answers_at_once(self) -> bool:
        """Whether a request is answered while its caller waits."""
        return self.kind != "scaled to zero"


def types_of(name: str, run: Run, types: Sequence[str]) -> Sequence[str]:
    found = list(types) or run.stands_for
    if not found:
        raise UserError(
            f"{name} does not name the instance type it stands for: give {name}=TYPE (for example "
            f"{name}=ml.c7i.large,serverless), or benchmark --as TYPE"
        )
    return found


def price_run(name: str, run: Run, named: str, table: PriceTable, region: str) -> PricedRun:
    """Return the run with the type whose price it is given.

    named: the type that it stands for by the user's word. A server uses one GPU, so that a type
    with several is replaced by the one with a single GPU of the model, where there is one.
    """
    stands_for = table.single_gpu(named, region)
    scenario = run.saturated
    if scenario is None:
        raise UserError(f"{name} has no closed loop with an answer: benchmark it with --clients")
    latency = run.alone.latency if run.alone else None
    speed = Speed(
        requests_per_second=scenario.requests_per_second,
        seconds_per_request=latency.mean if latency else None,
        images_per_request=scenario.images_per_second / scenario.requests_per_second,
        candidates_per_request=scenario.candidates_per_second / scenario.requests_per_second,
        gigabytes_per_request=(scenario.request_bytes + scenario.reply_bytes) / 1e9,
    )
    measured_on = run.hardware.describe()
    if run.hardware.instance_type == stands_for:
        return PricedRun(name, run, stands_for, scenario, speed, f"measured on {stands_for} itself")
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
        if stands_for != named:
            doubt += f"; {named}, which was named, has several such GPUs, and a server uses one"
        elif kind.gpus > 1:
            doubt += f"; it has {kind.gpus} GPUs, of which a server uses one"
        if stands_for.startswith(BURSTABLE):
            doubt += "; it is burstable, and slower once its CPU credits are spent"
    text = f"that {stands_for} is as fast as {name}, measured on {measured_on}; but {doubt}"
    return PricedRun(name, run, stands_for, scenario, speed, text)


def options_of(
    priced_run: PricedRun, table: PriceTable, region: str, assumptions: Assumptions
) -> list[Option]:
    kind, speed = priced_run.stands_for, priced_run.speed
    cost = MonthlyCost(speed, assumptions)
    if kind == SERVERLESS:
        return [_serverless(priced_run, table, region, assumptions)]
    if kind == LAMBDA:
        compute, calls = (table.price(LAMBDA, part, region) for part in ("compute", "requests"))
        month = partial(
            cost.lambda_function,
            usd_per_gb_second=compute.usd,
            usd_per_million_requests=calls.usd,
        )
        busy = costs.busy_by_the_second(speed, compute.usd, assumptions.lambda_memory_gb)
        return [Option("lambda", priced_run, (compute, calls), busy, month, LAMBDA_CAVEAT)]
    hour, waking_hour = table.hourly(kind, region), _asynchronous(table, kind, region)
    volume, data = (table.price("endpoint", part, region) for part in ("volume", "data"))

    def hourly(kind: Kind, monthly: Callable[..., Month], hour: Price, problem: str) -> Option:
        prices = costs.HourlyPrices(
            usd_per_hour=hour.usd, usd_per_volume_gb_month=volume.usd, usd_per_data_gb=data.usd
        )
        month, busy = partial(monthly, prices=prices), costs.busy(speed, hour.usd)
        return Option(kind, priced_run, (hour, volume, data), busy, month, problem)

    burstable = BURSTABLE_CAVEAT if kind.startswith(BURSTABLE) else ""
    problem = _too_slow(priced_run, assumptions) or burstable
    return [
        hourly("always on", cost.always_on, hour, problem),
        hourly("scaled to zero", cost.scale_to_zero, waking_hour, burstable),
    ]


def _serverless(
    priced_run: PricedRun, table: PriceTable, region: str, assumptions: Assumptions
) -> Option:
    speed, memory_gb = priced_run.speed, assumptions.serverless_memory_gb
    compute, data = (table.price(SERVERLESS, part, region) for part in ("compute", "data"))
    problem = _too_slow(priced_run, assumptions)
    used, reply_bytes = priced_run.run.peak_memory_bytes, priced_run.scenario.reply_bytes
    if used and used > memory_gb * 2**30:
        problem = f"has less memory than the {used / 2**30:.1f} GiB that were used"
    if reply_bytes > SERVERLESS_BYTES:
        problem = f"carries 4 MB at most, and replies had {reply_bytes:,.0f}"
    month = partial(
        MonthlyCost(speed, assumptions).serverless,
        usd_per_gb_second=compute.usd,
        usd_per_data_gb=data.usd,
    )
    busy = costs.busy_by_the_second(speed, compute.usd, memory_gb)
    return Option("serverless", priced_run, (compute, data), busy, month, problem)


def _asynchronous(table: PriceTable, instance_type: str, region: str) -> Price:
    """Return the price of an hour of an asynchronous endpoint: its row, else that of hosting, which
    was the same wherever both are known. The report names which."""
    for each in table.prices:
        if each.key == (instance_type, "AsyncInference", region):
            return each
    return table.hourly(instance_type, region)


def _too_slow(priced_run: PricedRun, assumptions: Assumptions) -> str:
    """Return why a waiting caller would get an error; empty when none would."""
    alone = priced_run.run.alone or priced_run.scenario
    limit = assumptions.synchronous_limit_seconds
    if alone.latency and alone.latency.p99 > limit:
        return f"is too slow: p99 is {alone.latency.p99:.0f} s, and an invocation has {limit:.0f} s"
    return ""
