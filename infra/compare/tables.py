"""The tables of a comparison as plain cells; the terminal and the page set them each in its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from infra.benchmark.load import HTTP, STAGES
from infra.compare.join import Comparison
from infra.compare.options import Option
from infra.compare.words import claims, usd

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Table:
    """columns: headings; one that begins with # is of numbers. rows: a cell for each column.

    best: places (row, column) of cells to point out.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def tables(comparison: Comparison) -> list[Table]:
    """All of them, in the order in which they are read."""
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
    """USD a month at each of the volumes; the cheapest that answers at once is pointed out."""
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
        return f"at 100 a day {option.month(100).cold_share:.0%} of requests find nothing warm"
    return f"price {option.prices[0].dated}, confidence {option.prices[0].confidence}"


def busy(comparison: Comparison) -> Table:
    """Price / throughput, both factors shown."""
    rows = []
    for option in comparison.options:
        if option.kind == "scaled to zero":
            continue  # while it is up it costs what the same instance always costs
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
    first = comparison.joined[0].speed
    return Table(
        "USD per 1,000, while busy",
        "Price per hour / 3,600 / requests per second x 1,000. A request here draws "
        f"{first.candidates_per_request:g} candidates and returns {first.images_per_request:g} "
        "pictures. Serverless and Lambda are paid by the second of one request alone.",
        [
            "served by",
            "#USD/hour",
            "#requests/s",
            "#1,000 requests",
            "#1,000 pictures",
            "#1,000 candidates",
            "price: date, confidence",
        ],
        rows,
    )


def gpus(comparison: Comparison) -> Table:
    """Instances with a GPU that were not measured: their price, and what would be worth it."""
    rows = []
    for each in comparison.not_measured:
        needed = "-"
        if each.base and each.speedup:
            needed = f"{each.speedup * each.base.joined.speed.requests_per_second:.1f}"
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
    base = next((each.base.joined for each in comparison.not_measured if each.base), None)
    against = f" than on {base.stands_for}, as {base.name} was measured" if base else ""
    return Table(
        "GPUs that were not measured",
        f"What one would have to answer so that a picture is cheaper{against}; from prices alone.",
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
    """Of every scenario, against the limit of an invocation."""
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
        "invocation. Refused: answers 429 or 503, asked again after Retry-After; the wait counts.",
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
    """Where the time of a request goes, one client alone."""
    names = [*STAGES, HTTP]
    rows = [
        [name, each.name, *(f"{1000 * each.stages[s].mean:.1f}" for s in names)]
        for name, run in comparison.runs.items()
        for each in run.scenarios
        if all(s in each.stages for s in names)
    ]
    return Table(
        "Mean milliseconds by stage",
        "As the replies tell; http is the rest: reading, sending, JSON and the network.",
        ["run", "load", *(f"#{name}" for name in names)],
        rows,
    )


def article(comparison: Comparison) -> Table:
    """The article's figures as a worked example."""
    rows = [[each.claim, each.ours, each.verdict] for each in claims(comparison)]
    return Table("The article's figures", "", ["it says", "our figures", "so"], rows)


def prices(comparison: Comparison) -> Table:
    """Every price that a figure rests on."""
    rows = []
    for each in comparison.prices:
        source = f"{each.source}; {each.note}" if each.note else each.source
        what = [each.item, each.component, each.amount, each.unit]
        rows.append([*what, each.dated, each.confidence, source])
    return Table(
        f"Prices in {comparison.region}",
        "A: read from the Pricing API by `prices refresh`; B: a dated read by others, or a file of "
        "AWS's own; C: third-party tables, or inferred; low: doubtful. The table was put together "
        f"on {comparison.table.gathered}.",
        ["item", "component", "#USD", "per", "date", "confidence", "source"],
        rows,
    )


def assumptions(comparison: Comparison) -> Table:
    """What is neither measured nor a price."""
    rows = [
        [each.name, f"{getattr(comparison.assumptions, each.name):g}", each.metadata["unit"],
         each.metadata["meaning"]]
        for each in dataclasses.fields(comparison.assumptions)
    ]  # fmt: skip
    rows += [["stands for", "", "", each.assumption] for each in comparison.joined]
    asynchronous = [o for o in comparison.options if o.kind == "scaled to zero"]
    if any(option.prices[0].component == "Hosting" for option in asynchronous):
        said = "that an hour of an asynchronous endpoint costs what one of hosting does"
        rows.append(["async price", "", "", said])
    return Table(
        "Assumptions",
        "Change one with --assume NAME=VALUE.",
        ["name", "#value", "unit", "meaning"],
        rows,
    )


def runs(comparison: Comparison) -> Table:
    """What was measured, on what."""
    rows = []
    for name, run in comparison.runs.items():
        start = f"{run.ready_seconds:.1f} s" if run.ready_seconds else "-"
        memory = f"{run.peak_memory_bytes / 2**30:.2f} GiB" if run.peak_memory_bytes else "-"
        versions = " ".join(f"{n}={v[:12]}" for n, v in run.versions.items())
        where = f"{run.kind} {run.target}, {run.device}: {run.hardware.describe()}"
        done = f"{run.workload.describe()}; {run.rounds} rounds"
        taken = f", in turns with {', '.join(run.interleaved_with)}" if run.interleaved_with else ""
        rows.append([name, run.date, where, done + taken, start, memory, versions])
    return Table(
        "Runs",
        "",
        ["run", "date (UTC)", "measured on", "workload", "start to ready", "peak memory",
         "versions"],
        rows,
    )  # fmt: skip
