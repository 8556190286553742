"""The tables of a comparison as plain cells, for the terminal and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dalle.errors import PriceMissing
from infra.benchmark.load import HTTP, STAGES
from infra.compare.comparison import Comparison
from infra.compare.recommendation import usd
from infra.compare.serving_options import Option
from infra.cost.prices import CONFIDENCE

NOT_MEASURED = "not measured"
SMALLEST = "ml.t2.medium"


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


def tables(comparison: Comparison) -> list[Table]:
    """Return all tables in the order of the report."""
    return [
        monthly(comparison),
        busy(comparison),
        gpus(comparison),
        latency(comparison),
        stages(comparison),
        article(comparison),
        prices(comparison),
        assumptions(comparison),
        runs(comparison),
    ]


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
    columns = ["served by", *(f"#{volume:,.0f} a day" for volume in comparison.volumes), "remark"]
    return Table(
        "USD a month at so many requests a day",
        "Bold: the cheapest that answers while its caller waits.",
        columns,
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
    rows = []
    for option in comparison.options:
        if option.kind == "scaled to zero":
            continue  # a running instance costs the same as one that is always on
        cost, price = option.busy, option.prices[0]
        rows.append(
            [
                option.name,
                usd(cost.usd_per_hour),
                f"{cost.requests_per_second:.2f}",
                usd(cost.usd_per_1000_requests),
                usd(cost.usd_per_1000_images),
                usd(cost.usd_per_1000_candidates),
                f"{price.dated}, {price.confidence}",
            ]
        )
    first = comparison.priced_runs[0].speed
    return Table(
        "USD per 1,000, while busy",
        "Price per hour / 3,600 / requests per second x 1,000. A request here samples "
        f"{first.candidates_per_request:g} candidates and returns {first.images_per_request:g} "
        "images. Serverless and Lambda are paid by the second of one request alone.",
        [
            "served by",
            "#USD/hour",
            "#requests/s",
            "#1,000 requests",
            "#1,000 images",
            "#1,000 candidates",
            "price: date, confidence",
        ],
        rows,
    )


def gpus(comparison: Comparison) -> Table:
    """Instances with a GPU that were not measured: their price, and the speed to be worth it."""
    rows = []
    for each in comparison.not_measured:
        needed = "-"
        if each.base and each.speedup:
            needed = f"{each.speedup * each.base.priced_run.speed.requests_per_second:.1f}"
        rows.append(
            [
                f"{each.instance_type} ({each.hardware.gpu})",
                usd(each.price.usd),
                usd(each.usd_per_month),
                NOT_MEASURED,
                needed,
                f"{each.speedup:.1f}" if each.speedup else "-",
                f"{each.price.dated}, {each.price.confidence}",
            ]
        )
    base = next((each.base.priced_run for each in comparison.not_measured if each.base), None)
    against = f" than on {base.stands_for}, as {base.name} was measured" if base else ""
    return Table(
        "GPUs that were not measured",
        f"The requests/s at which an image is cheaper{against}; from prices alone.",
        [
            "instance",
            "#USD/hour",
            "#USD/month",
            "#requests/s",
            "#needed requests/s",
            "#times as many",
            "price: date, confidence",
        ],
        rows,
    )


def latency(comparison: Comparison) -> Table:
    """Latencies of every scenario, against the limit of an invocation."""
    limit = comparison.assumptions.synchronous_limit_seconds
    rows = []
    for name, run in comparison.runs.items():
        for each in run.scenarios:
            if each.latency is None:
                rows.append([name, each.name, str(each.requests), *["-"] * 7, "nothing answered"])
                continue
            rows.append(
                [
                    name,
                    each.name,
                    str(each.requests),
                    str(each.errors),
                    f"{each.requests_per_second:.2f}",
                    f"{min(each.by_round):.2f} to {max(each.by_round):.2f}",
                    *(f"{getattr(each.latency, p):.2f}" for p in ("p50", "p95", "p99")),
                    f"{each.latency.p99 / limit:.0%}",
                    ", ".join(f"{n} times {status}" for status, n in each.refusals.items()) or "0",
                ]
            )
    return Table(
        "Latency in seconds",
        f"Measured at the client, against the {limit:.0f} s after which the platform ends an "
        "invocation. Refused: 429 or 503, sent again after Retry-After; the wait counts.",
        [
            "run",
            "load",
            "#requests",
            "#failed",
            "#answered/s",
            "#by round",
            "#p50",
            "#p95",
            "#p99",
            f"#p99 of {limit:.0f} s",
            "refused",
        ],
        rows,
    )


def stages(comparison: Comparison) -> Table:
    """Mean time of each stage of a request, for every load."""
    names = [*STAGES, HTTP]
    rows = [
        [name, each.name, *(f"{1000 * each.stages[s].mean:.1f}" for s in names)]
        for name, run in comparison.runs.items()
        for each in run.scenarios
        if all(s in each.stages for s in names)
    ]
    return Table(
        "Mean milliseconds by stage",
        "From the replies; http is the rest: reading, sending, JSON and the network.",
        ["run", "load", *(f"#{name}" for name in names)],
        rows,
    )


def article(comparison: Comparison) -> Table:
    """The article's figures beside those of the price table and the runs."""
    columns = ["figure", "#article", "#ours", "from"]
    try:
        smallest = comparison.table.hourly(SMALLEST, comparison.region)
    except PriceMissing as error:
        rows = [["USD a month, smallest CPU instance", "50", NOT_MEASURED, str(error)]]
        return Table("The article's figures", "", columns, rows)
    hours = comparison.assumptions.hours_per_month
    rows = [
        [
            "USD a month, smallest CPU instance",
            "50",
            usd(smallest.usd * hours),
            f"{SMALLEST}: {smallest.describe()} x {hours:g} hours",
        ]
    ]
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
    return Table("The article's figures", "", columns, rows)


def _speed_ratio(comparison: Comparison) -> tuple[str, str]:
    """The ratio of the fastest measured GPU to the fastest measured CPU, and its source."""
    best = {
        device: max(
            (each for each in comparison.priced_runs if each.run.device == device),
            key=lambda each: each.speed.requests_per_second,
            default=None,
        )
        for device in ("cuda", "cpu")
    }
    rates = [
        f"{each.stands_for} {each.speed.requests_per_second:.2f} requests/s"
        for each in best.values()
        if each
    ]
    gpu, cpu = best["cuda"], best["cpu"]
    if gpu is None or cpu is None:
        return NOT_MEASURED, "; ".join(rates)
    ratio = gpu.speed.requests_per_second / cpu.speed.requests_per_second
    return f"{ratio:.1f}", " / ".join(rates)


def prices(comparison: Comparison) -> Table:
    """Every price that a figure depends on."""
    rows = []
    for each in comparison.prices:
        source = f"{each.source}; {each.note}" if each.note else each.source
        what = [each.item, each.component, each.amount, each.unit]
        rows.append([*what, each.dated, each.confidence, source])
    return Table(
        f"Prices in {comparison.region}",
        "; ".join(f"{mark}: {meaning}" for mark, meaning in CONFIDENCE.items())
        + f". The table was compiled on {comparison.table.gathered}.",
        ["item", "component", "#USD", "per", "date", "confidence", "source"],
        rows,
    )


def assumptions(comparison: Comparison) -> Table:
    """Every value that is neither measured nor a price."""
    rows = [
        [each.name, f"{getattr(comparison.assumptions, each.name):g}", each.metadata["unit"],
         each.metadata["meaning"]]
        for each in dataclasses.fields(comparison.assumptions)
    ]  # fmt: skip
    rows += [["stands for", "", "", each.assumption] for each in comparison.priced_runs]
    asynchronous = [o for o in comparison.options if o.kind == "scaled to zero"]
    if any(option.prices[0].component == "Hosting" for option in asynchronous):
        meaning = "an hour of an asynchronous endpoint costs as much as one of hosting"
        rows.append(["async price", "", "", meaning])
    return Table(
        "Assumptions",
        "Change one with --assume NAME=VALUE.",
        ["name", "#value", "unit", "meaning"],
        rows,
    )


def runs(comparison: Comparison) -> Table:
    """Every run with its hardware and workload."""
    rows = []
    for name, run in comparison.runs.items():
        start = f"{run.ready_seconds:.1f} s" if run.ready_seconds else "-"
        memory = f"{run.peak_memory_bytes / 2**30:.2f} GiB" if run.peak_memory_bytes else "-"
        versions = " ".join(f"{n}={v[:12]}" for n, v in run.versions.items())
        where = f"{run.kind} {run.target}, {run.device}: {run.hardware.describe()}"
        done = f"{run.workload.describe()}; {run.rounds} rounds"
        taken = (
            f", alternating with {', '.join(run.interleaved_with)}" if run.interleaved_with else ""
        )
        rows.append([name, run.date, where, done + taken, start, memory, versions])
    return Table(
        "Runs",
        "",
        ["run", "date (UTC)", "measured on", "workload", "start to ready", "peak memory",
         "versions"],
        rows,
    )  # fmt: skip
