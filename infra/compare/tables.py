"""The tables of a comparison as plain cells, for the terminal and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dalle.errors import PriceMissing
from inference.bench.load import HTTP, STAGES
from infra.compare.comparison import Comparison
from infra.compare.recommendation import usd
from infra.compare.serving_options import Option
from infra.cost.prices import CONFIDENCE_NOTE, Price

NOT_MEASURED = "not measured"
SMALLEST = "ml.t2.medium"
ARTICLE_TITLE = "A blog article of 2021 says"
ARTICLE_CLAIM = (
    "that the smallest instance without a GPU costs 50 USD a month, and that one with a GPU costs "
    "at least three times as much and is at least three times as fast."
)


@dataclass(frozen=True)
class Table:
    """One table. columns: headings; # marks a column of numbers. rows: a cell for each column.

    best: (row, column) of the cells to highlight.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def _table(title: str, note: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """Return a table of rows that are all heading -> cell."""
    columns = list(rows[0]) if rows else []
    return Table(title, note, columns, [[row[name] for name in columns] for row in rows])


def tables(comparison: Comparison) -> list[Table]:
    """Return the tables that have rows, in the order of the report."""
    every = (monthly, busy, gpus, latency, stages, article, prices, assumptions, runs)
    return [table for build in every if (table := build(comparison)).rows]


def monthly(comparison: Comparison) -> Table:
    """USD a month at each of the volumes; the cheapest that answers at once is highlighted."""
    rows = [
        [option.name, *(usd(option.usd(volume)) for volume in comparison.volumes), _remark(option)]
        for option in comparison.options
    ]
    best = set()
    usable = [
        place
        for place, option in enumerate(comparison.options)
        if option.answers_at_once and not option.problem
    ]
    for column, volume in enumerate(comparison.volumes, 1):
        if usable:
            row = min(usable, key=lambda place: comparison.options[place].usd(volume))
            best.add((row, column))
    for gpu in comparison.not_measured if not comparison.has_gpu else ():
        cells = [NOT_MEASURED for _ in comparison.volumes]
        rows.append([f"{gpu.instance_type}, always on", *cells, f"GPU, {gpu.hardware.gpu}"])
    return Table(
        "USD a month at so many requests a day",
        "Bold: the cheapest that answers while its caller waits.",
        ["served by", *(f"#{volume:,.0f} a day" for volume in comparison.volumes), "remark"],
        rows,
        frozenset(best),
    )


def _remark(option: Option) -> str:
    if option.problem:
        return option.problem
    if option.kind == "scaled to zero":
        month = option.month(100)
        return (
            f"asynchronous; at 100 a day {month.cold_share:.0%} of requests wait "
            f"{month.added_seconds / 60:.0f} min for an instance"
        )
    if option.kind == "serverless":
        return f"at 100 a day {option.month(100).cold_share:.0%} of requests meet a cold start"
    return f"price {option.prices[0].dated}, confidence {option.prices[0].confidence}"


def busy(comparison: Comparison) -> Table:
    """Price / throughput, both factors shown."""
    first = comparison.priced_runs[0].speed
    return _table(
        "USD per 1,000, while busy",
        "Price per hour / 3,600 / requests per second x 1,000. A request here samples "
        f"{first.candidates_per_request:g} candidates and returns {first.images_per_request:g} "
        "images. Serverless and Lambda are paid by the second of one request alone.",
        [
            {
                "served by": option.name,
                "#USD/hour": usd(option.busy.usd_per_hour),
                "#requests/s": f"{option.busy.requests_per_second:.2f}",
                "#1,000 requests": usd(option.busy.usd_per_1000_requests),
                "#1,000 images": usd(option.busy.usd_per_1000_images),
                "#1,000 candidates": usd(option.busy.usd_per_1000_candidates),
                **_dated(option.prices[0]),
            }
            for option in comparison.options
            # A running instance that may be scaled to zero costs as much as one that is always on.
            if option.kind != "scaled to zero"
        ],
    )


def gpus(comparison: Comparison) -> Table:
    """Instances with a GPU that were not measured: their price, and the speed to be worth it."""
    base = next((each.base.priced_run for each in comparison.not_measured if each.base), None)
    against = f" than on {base.stands_for}, as {base.name} was measured" if base else ""
    return _table(
        "GPUs that were not measured",
        f"The requests/s at which an image is cheaper{against}; from prices alone.",
        [
            {
                "instance": f"{each.instance_type} ({each.hardware.gpu})",
                "#USD/hour": usd(each.price.usd),
                "#USD/month": usd(each.usd_per_month),
                "#requests/s": NOT_MEASURED,
                "#needed requests/s": f"{each.requests_per_second:.1f}" if each.base else "-",
                "#times as many": f"{each.speedup:.1f}" if each.speedup else "-",
                **_dated(each.price),
            }
            for each in comparison.not_measured
        ],
    )


def _dated(price: Price) -> dict[str, str]:
    return {"price: date, confidence": f"{price.dated}, {price.confidence}"}


def latency(comparison: Comparison) -> Table:
    """Latencies of every scenario, against the limit of an invocation."""
    limit = comparison.assumptions.synchronous_limit_seconds
    rows = []
    for name, run in comparison.runs.items():
        for each in run.scenarios:
            found, refusals = each.latency, each.refusals.items()
            figures = {
                "#failed": str(each.errors),
                "#answered/s": f"{each.requests_per_second:.2f}",
                "#by round": f"{min(each.by_round):.2f} to {max(each.by_round):.2f}",
                "#p50": f"{found.p50:.2f}" if found else "",
                "#p95": f"{found.p95:.2f}" if found else "",
                "#p99": f"{found.p99:.2f}" if found else "",
                f"#p99 of {limit:.0f} s": f"{found.p99 / limit:.0%}" if found else "",
                "refused": ", ".join(f"{n} times {status}" for status, n in refusals) or "0",
            }
            if found is None:
                figures = dict.fromkeys(figures, "-") | {"refused": "nothing answered"}
            rows.append(
                {"run": name, "load": each.name, "#requests": str(each.requests), **figures}
            )
    return _table(
        "Latency in seconds",
        f"Measured at the client, against the {limit:.0f} s after which the platform ends an "
        "invocation. Refused: 429 or 503, sent again after Retry-After; the wait counts.",
        rows,
    )


def stages(comparison: Comparison) -> Table:
    """Mean time of each stage of a request, for every load."""
    names = [*STAGES, HTTP]
    return _table(
        "Mean milliseconds by stage",
        "From the replies; http is the rest: reading, sending, JSON and the network.",
        [
            {
                "run": name,
                "load": each.name,
                **{f"#{stage}": f"{1000 * each.stages[stage].mean:.1f}" for stage in names},
            }
            for name, run in comparison.runs.items()
            for each in run.scenarios
            if all(stage in each.stages for stage in names)
        ],
    )


def article(comparison: Comparison) -> Table:
    """An old article's figures beside those of the price table and the runs."""
    rows: list[Sequence[str]] = []
    columns = ["figure", "#the article", "#here", "from"]
    table = Table(ARTICLE_TITLE, ARTICLE_CLAIM, columns, rows)
    try:
        smallest = comparison.table.hourly(SMALLEST, comparison.region)
    except PriceMissing as error:
        rows.append(["USD a month, smallest CPU instance", "50", NOT_MEASURED, str(error)])
        return table
    hours = comparison.assumptions.hours_per_month
    month = f"{SMALLEST}: {smallest.describe()} x {hours:g} hours"
    rows.append(["USD a month, smallest CPU instance", "50", usd(smallest.usd * hours), month])
    always_on = [each for each in comparison.options if each.kind == "always on"]
    measured_gpus = [e.prices[0] for e in always_on if e.priced_run.run.device == "cuda"]
    gpus = [*(each.price for each in comparison.not_measured), *measured_gpus]
    if gpus:
        gpu = min(gpus, key=lambda each: each.usd)
        cpus = [e.prices[0] for e in always_on if e.priced_run.run.device == "cpu"]
        similar = ("ml.m5.xlarge", "Hosting", comparison.region)  # its vCPUs and memory
        cpus += [each for each in comparison.table.prices if each.key == similar]
        for cpu in dict.fromkeys([smallest, *cpus]):
            ratio = f"{gpu.usd / cpu.usd:.1f}"
            source = f"{gpu.describe_item()} / {cpu.describe_item()}"
            rows.append([f"price of {gpu.item} / {cpu.item}", "3 or more", ratio, source])
        rows.append(["speed of a GPU / a CPU", "3 or more", *_speed_ratio(comparison)])
    return table


def _speed_ratio(comparison: Comparison) -> tuple[str, str]:
    """The ratio of the fastest measured GPU to the fastest measured CPU, and its source."""
    by_speed = sorted(comparison.priced_runs, key=lambda each: -each.speed.requests_per_second)
    fastest = [
        next((each for each in by_speed if each.run.device == device), None)
        for device in ("cuda", "cpu")
    ]
    rates = [
        f"{each.stands_for} {each.speed.requests_per_second:.2f} requests/s"
        for each in fastest
        if each
    ]
    gpu, cpu = fastest
    if gpu is None or cpu is None:
        return NOT_MEASURED, "; ".join(rates)
    ratio = gpu.speed.requests_per_second / cpu.speed.requests_per_second
    return f"{ratio:.1f}", " / ".join(rates)


def prices(comparison: Comparison) -> Table:
    """Every price that a figure depends on."""
    return _table(
        f"Prices in {comparison.region}",
        f"{CONFIDENCE_NOTE} The table was compiled on {comparison.table.gathered}.",
        [
            {
                "item": each.item,
                "component": each.component,
                "#USD": each.amount,
                "per": each.unit,
                "date": each.dated,
                "confidence": each.confidence,
                "source": each.described_source,
            }
            for each in comparison.prices
        ],
    )


def assumptions(comparison: Comparison) -> Table:
    """Every value that is neither measured nor a price."""
    rows = [
        [
            each.name,
            f"{getattr(comparison.assumptions, each.name):g}",
            each.metadata["unit"],
            each.metadata["meaning"],
        ]
        for each in dataclasses.fields(comparison.assumptions)
    ]
    rows += [["stands for", "", "", each.assumption] for each in comparison.priced_runs]
    asynchronous = [o for o in comparison.options if o.kind == "scaled to zero"]
    if any(option.prices[0].component == "Hosting" for option in asynchronous):
        meaning = "an hour of an asynchronous endpoint costs as much as one of hosting"
        rows.append(["async price", "", "", meaning])
    note = "Change one with --assume NAME=VALUE."
    return Table("Assumptions", note, ["name", "#value", "unit", "meaning"], rows)


def runs(comparison: Comparison) -> Table:
    """Every run with its hardware and workload."""
    rows = []
    for name, run in comparison.runs.items():
        workload = f"{run.workload.describe()}; {run.rounds} rounds"
        if run.interleaved_with:
            workload += f", alternating with {', '.join(run.interleaved_with)}"
        start, peak = run.ready_seconds, run.peak_memory_bytes
        rows.append(
            {
                "run": name,
                "date (UTC)": run.date,
                "measured on": f"{run.kind} {run.target}, {run.device}: {run.hardware.describe()}",
                "workload": workload,
                "start to ready": f"{start:.1f} s" if start else "-",
                "peak memory": f"{peak / 2**30:.2f} GiB" if peak else "-",
                "versions": " ".join(f"{n}={v[:12]}" for n, v in run.versions.items()),
            }
        )
    return _table("Runs", "", rows)
