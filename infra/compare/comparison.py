"""Measured runs joined with dated prices: the cost of each way to serve, and the cheapest.

A GPU that was not measured stays "not measured", with the speed at which it is worth its price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dalle.errors import UserError
from infra.aws.limits import check_instance_type
from infra.benchmark.run_file import Run
from infra.compare.serving_options import ORDER, Option, PricedRun, options_of, price_run, types_of
from infra.cost import costs
from infra.cost.assumptions import Assumptions
from infra.cost.prices import InstanceType, Price, PriceTable

GPUS_SHOWN = 3


@dataclass(frozen=True)
class NotMeasured:
    """An instance with a GPU that no run stands for.

    base: the measured instance with the cheapest images. speedup: how many times its requests this
    one must answer so that an image costs the same. None where no instance was measured.
    """

    instance_type: str
    hardware: InstanceType
    price: Price
    usd_per_month: float
    base: Option | None
    speedup: float | None

    @property
    def requests_per_second(self) -> float:
        """The rate at which an image costs as much as on `base`; 0 without one."""
        if self.base is None or self.speedup is None:
            return 0.0
        return self.speedup * self.base.priced_run.speed.requests_per_second


@dataclass(frozen=True)
class Range:
    """The cheapest option between two numbers of requests a day."""

    low: float
    high: float
    option: Option


@dataclass(frozen=True)
class Crossing:
    """A break-even point of two options. cheaper_below: the cheaper one at fewer requests a day."""

    requests_per_day: float
    usd: float
    cheaper_below: Option
    cheaper_above: Option


@dataclass(frozen=True)
class Comparison:
    """The content of a report."""

    region: str
    priced_runs: list[PricedRun]
    options: list[Option]
    not_measured: list[NotMeasured]
    assumptions: Assumptions
    table: PriceTable
    volumes: list[float]
    ranges_at_once: list[Range]
    ranges_any: list[Range]
    crossings: list[Crossing]

    @property
    def has_gpu(self) -> bool:
        """Whether a run used a GPU."""
        return any(each.run.device == "cuda" for each in self.priced_runs)

    @property
    def runs(self) -> dict[str, Run]:
        """Every run by its name."""
        return {each.name: each.run for each in self.priced_runs}

    @property
    def prices(self) -> list[Price]:
        """Every price that a figure depends on, once."""
        used = [price for option in self.options for price in option.prices]
        used += [each.price for each in self.not_measured]
        return list(dict.fromkeys(used))


LOW, HIGH = 1.0, 1e6  # requests a day


def compare_runs(
    runs: Sequence[tuple[str, Run, Sequence[str]]],
    table: PriceTable,
    *,
    region: str,
    assumptions: Assumptions,
    volumes: Sequence[float],
) -> Comparison:
    """Compare runs, each with a name and the instance types that it stands for.

    Raises UserError for a run without a type, or with the type of a GPU that it did not use, and
    PriceMissing for a type without a price.
    """
    priced_runs = [
        price_run(name, run, named, table, region)
        for name, run, types in runs
        for named in types_of(name, run, types)
    ]
    # Two types may have come to one, the single GPU of a model.
    priced_runs = list({(each.name, each.stands_for): each for each in priced_runs}.values())
    seen: dict[str, str] = {}
    for each in priced_runs:
        if each.stands_for in seen:
            raise UserError(
                f"{seen[each.stands_for]} and {each.name} both stand for {each.stands_for}; "
                "keep one of them"
            )
        seen[each.stands_for] = each.name
    options = [
        option for each in priced_runs for option in options_of(each, table, region, assumptions)
    ]
    options.sort(key=lambda option: (ORDER.index(option.kind), option.prices[0].usd))
    usable = [each for each in options if not each.problem]
    at_once = cheapest([each for each in usable if each.answers_at_once])
    return Comparison(
        region=region,
        priced_runs=priced_runs,
        options=options,
        not_measured=_not_measured(priced_runs, options, table, region, assumptions),
        assumptions=assumptions,
        table=table,
        volumes=sorted(volumes),
        ranges_at_once=at_once,
        ranges_any=cheapest(usable),
        crossings=_crossings(at_once),
    )


def _not_measured(
    priced_runs: Sequence[PricedRun],
    options: Sequence[Option],
    table: PriceTable,
    region: str,
    assumptions: Assumptions,
) -> list[NotMeasured]:
    """Return the cheapest instance with one GPU of each model that no run used, cheapest first."""
    hosts = {each.stands_for: table.instance_types.get(each.stands_for) for each in priced_runs}
    measured = {host.gpu for host in hosts.values() if host is not None and host.gpus}
    hourly: dict[str | None, Price] = {}
    for each in sorted(table.prices, key=lambda price: price.usd):
        host = table.instance_types.get(each.item)
        is_offered = (each.component, each.region) == ("Hosting", region)
        if not is_offered or host is None or host.gpus != 1 or host.gpu in measured:
            continue
        if not list(check_instance_type(each.item)):
            hourly.setdefault(host.gpu, each)
    always = [each for each in options if each.kind == "always on"]
    bases = [each for each in always if not each.problem] or always
    base = min(bases, key=lambda each: each.busy.usd_per_1000_requests, default=None)
    found = [
        NotMeasured(
            each.item,
            table.instance_types[each.item],
            each,
            each.usd * assumptions.hours_per_month,
            base,
            each.usd / base.busy.usd_per_hour if base else None,
        )
        for each in hourly.values()
    ]
    return found[:GPUS_SHOWN]


def cheapest(options: Sequence[Option]) -> list[Range]:
    """Return the cheapest option of every range from LOW to HIGH requests a day."""
    if not options:
        return []
    places = {LOW, HIGH}
    for number, first in enumerate(options):
        for second in options[number + 1 :]:
            places |= set(costs.crossings(first.usd, second.usd, low=LOW, high=HIGH))
    ranges: list[Range] = []
    ordered = sorted(places)
    for low, high in zip(ordered, ordered[1:], strict=False):
        middle = (low * high) ** 0.5
        best = min(options, key=lambda option: option.usd(middle))
        if ranges and ranges[-1].option is best:
            ranges[-1] = Range(ranges[-1].low, high, ranges[-1].option)
        else:
            ranges.append(Range(low, high, best))
    return ranges


def _crossings(ranges: Sequence[Range]) -> list[Crossing]:
    return [
        Crossing(before.high, after.option.usd(before.high), before.option, after.option)
        for before, after in zip(ranges, ranges[1:], strict=False)
    ]
