"""The recommendation of a comparison in words, with its reasons, for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from infra.benchmark.revision import measured_revisions
from infra.compare.comparison import Comparison, Range
from infra.compare.serving_options import Option
from infra.cost.prices import CONFIDENCE_NOTE

QUIET_SHARE = 0.1  # of the processors' time; a larger use by others is reported as sharing


def recommendation(comparison: Comparison) -> list[str]:
    """Return paragraphs: which option at which volume, the reasons, and the doubts."""
    if not comparison.ranges_at_once:
        problems = "; ".join(f"{each.name}: {each.problem}" for each in comparison.options)
        return [f"No option answers while its caller waits ({problems}). Serve asynchronously."]
    at_once, any_time = comparison.ranges_at_once, comparison.ranges_any
    lines = [f"While callers wait, {_take(at_once)}.", CONFIDENCE_NOTE]
    lines += [_reason(comparison, option) for option in _once(at_once)]
    if [each.option for each in any_time] != [each.option for each in at_once]:
        lines.append(f"Where callers may wait for minutes, {_take(any_time)}.")
        waking = [option for option in _once(any_time) if not option.answers_at_once]
        lines += [_reason(comparison, option) for option in waking[:1]]
    left_out: dict[str, list[str]] = {}
    for option in comparison.options:
        if option.problem:
            left_out.setdefault(option.problem, []).append(option.priced_run.stands_for)
    for problem, ways in left_out.items():
        lines.append(f"Left out: {', '.join(dict.fromkeys(ways))}, which {problem}.")
    lines += _gpu(comparison)
    weak = [each for each in comparison.prices if each.confidence in ("C", "low")]
    if weak:
        names = ", ".join(dict.fromkeys(f"{each.item} ({each.component})" for each in weak))
        lines.append(
            f"Prices of confidence C or lower decide here: {names}. Before you rely on them, run "
            "python -m infra prices refresh."
        )
    return lines


def _once(ranges: Sequence[Range]) -> list[Option]:
    return list({each.option.name: each.option for each in ranges}.values())


def _take(ranges: Sequence[Range]) -> str:
    """Return the cheapest options, each with its price and the volumes at which it is that."""
    first, *others = (f"{_priced(each)} {{}}{_span(each)}" for each in ranges)
    words = [first.format("is cheapest "), *(other.format("") for other in others)]
    return ", and ".join(words)


def _priced(part: Range) -> str:
    option = part.option
    if option.kind in ("serverless", "lambda"):
        return f"{option.name} ({usd(option.busy.usd_per_1000_images)} for 1,000 images)"
    return f"{option.name} ({usd(option.usd(max(1.0, part.low)))} a month)"


def _span(part: Range) -> str:
    if part.low <= 1 and part.high >= 1e6:
        return "at any number of requests"
    if part.low <= 1:
        return f"up to {about(part.high)} requests a day"
    if part.high >= 1e6:
        return f"above {about(part.low)} a day"
    return f"from {about(part.low)} to {about(part.high)} a day"


def _reason(comparison: Comparison, option: Option) -> str:
    speed, assumed = option.priced_run.speed, comparison.assumptions
    alone = option.priced_run.run.alone
    wait = f", p95 {alone.latency.p95:.2f} s alone" if alone and alone.latency else ""
    if option.kind == "always on":
        hour, capacity = option.prices[0], speed.requests_per_second * assumed.target_utilisation
        most = capacity / assumed.busy_rate(1)
        return (
            f"{option.name}: {hour.describe()} is {usd(option.usd(1))} a month with its disk, used "
            f"or not; one instance was measured at {speed.requests_per_second:.2f} requests/s"
            f"{wait}, and serves {about(most)} requests a day under the assumptions; above that "
            "more instances follow the load."
        )
    if option.kind == "serverless":
        limit = assumed.synchronous_limit_seconds
        return (
            f"serverless: {option.prices[0].describe()}, and nothing while idle; "
            f"{speed.seconds_per_request:.2f} s a request in {assumed.serverless_memory_gb:g} GB "
            f"is {usd(option.busy.usd_per_1000_requests)} per 1,000 requests{wait}, of "
            f"{limit:.0f} s allowed. A request without a warm instance waits longer: "
            f"{option.month(100).cold_share:.0%} of them at 100 a day under the assumptions."
        )
    month = option.month(100)
    return (
        f"{option.name}: {option.prices[0].describe()}, paid only while an instance is up; at 100 "
        f"requests a day it would be up {month.mean_instances or 0:.0%} of the time, and "
        f"{month.cold_share:.0%} of the requests would wait {month.added_seconds / 60:.0f} minutes "
        "for it."
    )


def _gpu(comparison: Comparison) -> list[str]:
    """Return the speed at which a GPU is worth its price; nothing when one was measured."""
    if comparison.has_gpu:
        return []
    line = "No GPU was measured, so cost and latency of an image on one are not known."
    gpu = next(iter(comparison.not_measured), None)
    if gpu is not None and gpu.base is not None:
        line += (
            f" By price alone ({gpu.price.describe()}), an image on {gpu.instance_type} is cheaper "
            f"than on {gpu.base.priced_run.stands_for} above {gpu.requests_per_second:.1f} "
            f"requests/s, {gpu.speedup:.1f} times as many."
        )
    return [line]


def quietness(comparison: Comparison) -> list[str]:
    """Return a line for each run about other load on the machine."""
    lines = []
    for name, run in comparison.runs.items():
        share, load = run.others_share, run.load_average
        if share is not None and share > QUIET_SHARE:
            lines.append(
                f"{name}: the machine was shared; others used up to {share:.0%} of its processors "
                "during the measurement, so an idle machine would be faster."
            )
        elif share is not None:
            lines.append(f"{name}: others used at most {share:.0%} of the machine's processors.")
        elif load is not None:
            lines.append(
                f"{name}: the load average of the measuring machine was {load:.1f} before; other "
                "load on the server's machine is not known."
            )
    return lines


def about_runs(comparison: Comparison) -> list[str]:
    """Return a line for each run: which revision it measured, and what else the machine did."""
    found: dict[str, list[str]] = {}
    for line in [*measured_revisions(comparison.runs), *quietness(comparison)]:
        name, _, rest = line.partition(": ")
        found.setdefault(name, []).append(rest.removesuffix("."))
    return [f"{name}: {'; '.join(rests)}." for name, rests in found.items()]


def usd(amount: float) -> str:
    """Return dollars with two significant digits or more: `$40.88`, `$0.0042`, `$1,240`."""
    if amount >= 1000:
        return f"${amount:,.0f}"
    if amount >= 1 or amount <= 0:
        return f"${amount:,.2f}"
    return f"${amount:.{max(3, 1 - math.floor(math.log10(amount)))}f}"


def about(number: float) -> str:
    """Return a number rounded to two digits: `34,000` for 34,127."""
    if number < 100:
        return f"{number:.0f}"
    digits = 10 ** (len(str(int(number))) - 2)
    return f"{round(number / digits) * digits:,}"
