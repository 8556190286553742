"""What a comparison says in words: the recommendation with its reasons, and the article's claims.

Used by the terminal and by the page alike, so that both say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dalle.errors import PriceMissing
from infra.compare.join import Comparison, NotMeasured, Range
from infra.compare.options import Option
from infra.cost.prices import CONFIDENCE, Price

ARTICLE_USD_PER_MONTH = 50.0
ARTICLE_TIMES = 3.0
SMALLEST = "ml.t2.medium"
QUIET_SHARE = 0.1  # of the processors' time; more than that is told


@dataclass(frozen=True)
class Claim:
    """What the article says, what prices and measurements say, and what follows."""

    claim: str
    ours: str
    verdict: str


def recommendation(comparison: Comparison) -> list[str]:
    """Paragraphs: what to take at which volume, why, and what speaks against trusting it."""
    if not comparison.ranges_at_once:
        said = "; ".join(f"{each.name}: {each.problem}" for each in comparison.options)
        return [f"Nothing measured answers while its caller waits ({said}). Serve asynchronously."]
    lines = ["While callers wait: " + "; ".join(_take(each) for each in comparison.ranges_at_once)]
    lines[0] += "."
    lines += [_reason(comparison, each.option) for each in _once(comparison.ranges_at_once)]
    any_time = comparison.ranges_any
    if [each.option for each in any_time] != [each.option for each in comparison.ranges_at_once]:
        lines.append(
            "Where callers may wait for minutes: " + "; ".join(_take(each) for each in any_time)
            + "."
        )  # fmt: skip
        waking = next((o for o in _once(any_time) if not o.option.answers_at_once), None)
        if waking:
            lines.append(_reason(comparison, waking.option))
    left_out: dict[str, list[str]] = {}
    for option in comparison.options:
        if option.problem:
            left_out.setdefault(option.problem, []).append(option.joined.stands_for)
    for problem, ways in left_out.items():
        lines.append(f"Left out: {', '.join(dict.fromkeys(ways))}, which {problem}.")
    lines += _gpu(comparison)
    weak = [each for each in comparison.prices if each.confidence in ("C", "low")]
    if weak:
        names = ", ".join(dict.fromkeys(f"{each.item} ({each.component})" for each in weak))
        lines.append(
            f"Prices of confidence C or lower decide here: {names}. Read them again before money "
            "depends on it: python -m infra prices refresh."
        )
    return lines


def _once(ranges: list[Range]) -> list[Range]:
    return list({each.option.name: each for each in ranges}.values())


def _take(part: Range) -> str:
    if part.low <= 1 and part.high >= 1e6:
        span = "at any number of requests"
    elif part.low <= 1:
        span = f"up to {about(part.high)} requests a day"
    elif part.high >= 1e6:
        span = f"above {about(part.low)} a day"
    else:
        span = f"from {about(part.low)} to {about(part.high)} a day"
    return f"{part.option.name} {span}"


def _reason(comparison: Comparison, option: Option) -> str:
    speed, assumed = option.joined.speed, comparison.assumptions
    alone = option.joined.run.alone
    wait = f", p95 {alone.latency.p95:.2f} s alone" if alone and alone.latency else ""
    if option.kind == "always on":
        hour, capacity = option.prices[0], speed.requests_per_second * assumed.target_utilisation
        most = capacity / assumed.busy_rate(1)
        return (
            f"{option.name}: {hour.describe()} is {usd(option.usd(1))} a month with its disk, used "
            f"or not; one instance was measured at {speed.requests_per_second:.2f} requests/s"
            f"{wait}, and carries {about(most)} requests a day as assumed; more instances follow "
            "the load beyond that."
        )
    if option.kind == "serverless":
        limit = assumed.synchronous_limit_seconds
        return (
            f"serverless: {option.prices[0].describe()}, and nothing while idle; "
            f"{speed.seconds_per_request:.2f} s a request in {assumed.serverless_memory_gb:g} GB "
            f"is {usd(option.busy.usd_per_1000_requests)} per 1,000 requests{wait}, of "
            f"{limit:.0f} s allowed. A request that finds nothing warm waits longer: "
            f"{option.month(100).cold_share:.0%} of them at 100 a day, as assumed."
        )
    month = option.month(100)
    return (
        f"{option.name}: {option.prices[0].describe()}, paid only while an instance is up; at 100 "
        f"requests a day it would be up {month.mean_instances or 0:.0%} of the time, and "
        f"{month.cold_share:.0%} of the requests would wait {month.added_seconds / 60:.0f} minutes "
        "for it."
    )


def _gpu(comparison: Comparison) -> list[str]:
    """What is known of GPUs: measured, or how fast one would have to be."""
    if comparison.has_gpu:
        return []
    lines = ["No GPU was measured, so nothing is said of what a picture costs or takes on one."]
    if comparison.not_measured and comparison.not_measured[0].base:
        lines[0] += " " + needed_speed(comparison.not_measured[0])
    return lines


def needed_speed(gpu: NotMeasured) -> str:
    """What a GPU would have to do to be worth its price."""
    assert gpu.base is not None
    assert gpu.speedup is not None
    rate = gpu.speedup * gpu.base.joined.speed.requests_per_second
    return (
        f"By price alone ({gpu.price.describe()}), a picture on {gpu.instance_type} is cheaper "
        f"than on {gpu.base.joined.stands_for} once it answers more than {rate:.1f} requests/s, "
        f"{gpu.speedup:.1f} times as many."
    )


def claims(comparison: Comparison) -> list[Claim]:
    """The article's two figures, with ours beside them."""
    table, hours = comparison.table, comparison.assumptions.hours_per_month
    try:
        smallest = table.hourly(SMALLEST, comparison.region)
    except PriceMissing as error:
        return [Claim("about 50 USD a month for the smallest CPU instance", str(error), "")]
    month = smallest.usd * hours
    off = month / ARTICLE_USD_PER_MONTH - 1
    option = next((each for each in comparison.options if each.kind == "serverless"), None)
    buys = ""
    if option:
        requests = month / option.busy.usd_per_1000_requests * 1000
        buys = (
            f" For the same money serverless answers {about(requests)} requests a month at the "
            f"measured {option.joined.speed.seconds_per_request:.2f} s each, "
            f"{about(requests / comparison.assumptions.days_per_month)} a day."
        )
    found = [
        Claim(
            f"about {ARTICLE_USD_PER_MONTH:.0f} USD a month for the smallest CPU instance, even "
            "when idle",
            f"{SMALLEST}: {smallest.describe()} x {hours:g} hours = {usd(month)}",
            f"The order is right: our figure is {abs(off):.0%} {'lower' if off < 0 else 'higher'}, "
            f"and {ARTICLE_USD_PER_MONTH:.0f} USD would be "
            f"{ARTICLE_USD_PER_MONTH / hours:.3f} USD an hour.{buys}",
        )
    ]
    return [*found, *_times(comparison, smallest)]


def _times(comparison: Comparison, smallest: Price) -> list[Claim]:
    gpus = [each.price for each in comparison.not_measured]
    gpus += [
        each.prices[0]
        for each in comparison.options
        if each.kind == "always on" and each.joined.run.device == "cuda"
    ]
    if not gpus:
        return []
    gpu = min(gpus, key=lambda each: each.usd)
    bases = {smallest.item: smallest}
    for option in comparison.options:
        if option.kind == "always on" and option.joined.run.device == "cpu":
            bases[option.joined.stands_for] = option.prices[0]
    for each in comparison.table.prices:  # the CPU instance with as many vCPUs and as much memory
        if each.key == ("ml.m5.xlarge", "Hosting", comparison.region):
            bases[each.item] = each
    ratios = [f"{gpu.usd / price.usd:.1f} x {price.describe_item()}" for price in bases.values()]
    holds = all(gpu.usd >= ARTICLE_TIMES * price.usd for price in bases.values())
    if comparison.has_gpu:
        speed = "Measured: " + "; ".join(
            f"{each.stands_for} {each.speed.requests_per_second:.2f} requests/s"
            for each in comparison.joined
        )
    else:
        best = max(comparison.joined, key=lambda each: each.speed.requests_per_second)
        speed = (
            f"In speed: {best.speed.requests_per_second:.2f} requests/s measured on a CPU "
            f"({best.name}), the GPU not measured"
        )
    verdict = "In price it holds" if holds else "In price it does not hold for all of them"
    return [
        Claim(
            "at least three times between CPU and GPU",
            f"{gpu.describe_item()} is " + ", ".join(ratios),
            f"{verdict}. {speed}.",
        )
    ]


def quietness(comparison: Comparison) -> list[str]:
    """For each run, whether the machine did something else meanwhile."""
    lines = []
    for name, run in comparison.runs.items():
        share, load = run.others_share, run.load_average
        if share is not None and share > QUIET_SHARE:
            lines.append(
                f"{name}: the machine was shared; others used up to {share:.0%} of its processors "
                "while this was measured, so that an idle machine would be faster."
            )
        elif share is not None:
            lines.append(f"{name}: others used at most {share:.0%} of the machine's processors.")
        elif load is not None:
            lines.append(
                f"{name}: the load average of the measuring machine was {load:.1f} before; who "
                "else used the server's machine is not known."
            )
    return lines


def confidence_words() -> list[str]:
    """What the marks of confidence mean."""
    return [f"{mark}: {meaning}" for mark, meaning in CONFIDENCE.items()]


def usd(amount: float) -> str:
    """Dollars with as many digits as say something: `$40.88`, `$0.0042`, `$1,240`."""
    if amount >= 1000:
        return f"${amount:,.0f}"
    if amount >= 1 or amount <= 0:
        return f"${amount:,.2f}"
    return f"${amount:.{max(3, 1 - math.floor(math.log10(amount)))}f}"


def about(number: float) -> str:
    """Two digits and the rest zeros: 34,127 is `34,000`."""
    if number < 100:
        return f"{number:.0f}"
    digits = 10 ** (len(str(int(number))) - 2)
    return f"{round(number / digits) * digits:,}"
