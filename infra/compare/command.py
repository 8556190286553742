"""`compare`: the cost of an image and the cheapest way to serve, from measured runs and prices.

Prints a recommendation with its reasons and tables; writes JSON and one HTML page on request. The
arithmetic is in `infra.cost.costs`, the comparison in `infra.compare.comparison`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalle.errors import UserError
from infra.aws.output import Output, aligned, write_file
from infra.benchmark.revision import outdated
from infra.benchmark.run_file import Run, load_run
from infra.compare.comparison import Comparison, Range, compare_runs
from infra.compare.recommendation import about_runs, quietness, recommendation
from infra.compare.tables import Table, article, tables
from infra.cost.assumptions import Assumptions
from infra.cost.command import add_table_argument
from infra.cost.prices import DEFAULT_REGION, load_prices

DEFAULT_VOLUMES = (10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)
TITLE = "What an image costs"
WIDTH = 100
MAX_WIDTH = 160  # of a table whose columns are side by side
INDENT = "    "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN.json[=TYPE,...]",
        help="a run of `benchmark`, and the types it stands for: instance types, serverless, "
        "lambda; default: those of its --as",
    )
    parser.add_argument("--region", default=DEFAULT_REGION, help="of the prices; %(default)s")
    parser.add_argument(
        "--requests-per-day", type=float, action="append", metavar="N", help="repeatable"
    )
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change an assumption that the report lists; repeatable",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    parser.add_argument(
        "--stylesheet",
        default="",
        metavar="ADDRESS",
        help="of a copy of container/dalle/pages/page.css, to which the page of --html refers "
        "instead of holding it",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--title", default=TITLE, help="of the page; default %(default)r")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, only")
    add_table_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Compare, print and write the result. Raises UserError, PriceMissing."""
    output = Output(as_json=options.json)
    comparison = compare_runs(
        read_runs(options.runs),
        load_prices(options.prices),
        region=options.region,
        assumptions=Assumptions().with_values(_assumed(options.assume)),
        volumes=_volumes(options.requests_per_day),
    )
    whole = as_json(comparison)
    output.line(render_text(comparison))
    if options.html:
        from infra.compare.page import render_page  # loads matplotlib

        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        page = render_page(
            comparison, title=options.title, date=date, stylesheet=options.stylesheet
        )
        write_file(options.html, page)
        output.line(f"\n{options.html} written")
    if options.out:
        write_file(options.out, json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
        output.line(f"{options.out} written")
    return output.finish(**whole)


def read_runs(words: Sequence[str]) -> list[tuple[str, Run, list[str]]]:
    """Parse words such as `out/cpu.json=ml.c5.large,serverless` to name, run and types."""
    found: list[tuple[str, Run, list[str]]] = []
    for word in words:
        path, _, types = word.partition("=")
        name = Path(path).stem
        if name in {each[0] for each in found}:
            name = path
        kinds = [each.strip() for each in types.split(",") if each.strip()]
        found.append((name, load_run(Path(path)), kinds))
    return found


def _volumes(given: Sequence[float] | None) -> list[float]:
    for each in given or ():
        if not 1 <= each <= 1e6:
            raise UserError(f"--requests-per-day must be 1 to 1,000,000, got {each:g}")
    return list(given or DEFAULT_VOLUMES)


def _assumed(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"--assume must be NAME=NUMBER, got {word!r}", field=name) from None
    return found


def render_text(comparison: Comparison) -> str:
    """Return the comparison for the terminal."""
    first, *reasons = recommendation(comparison)
    warnings = [f"WARNING: {each}" for each in outdated(comparison.runs)]
    parts = []
    for line in [first, *warnings, *reasons, *about_runs(comparison)]:
        parts.append(textwrap.fill(line, WIDTH, subsequent_indent="  "))
    parts += [_text_table(each) for each in tables(comparison)]
    return "\n\n".join(parts)


def _text_table(table: Table) -> str:
    """Return columns side by side, or long ones below the others."""
    rows = [[name.removeprefix("#") for name in table.columns], *map(list, table.rows)]
    body = aligned(rows)
    if max(map(len, body)) > MAX_WIDTH:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        long = [place for place, width in enumerate(widths) if place and width > WIDTH // 3]
        short = [place for place in range(len(widths)) if place not in long]
        heads, *lines = aligned([[row[place] for place in short] for row in rows])
        body = [heads]
        for line, row in zip(lines, table.rows, strict=True):
            below = [textwrap.wrap(row[place], WIDTH - len(INDENT)) for place in long]
            body += [line, *(INDENT + part for parts in below for part in parts)]
    return "\n".join([table.title.upper(), *body])


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the content of the tables as values."""
    return {
        "region": comparison.region,
        "recommendation": recommendation(comparison),
        "quietness": quietness(comparison),
        "outdated": outdated(comparison.runs),
        "options": [
            {
                "name": option.name,
                "kind": option.kind,
                "stands_for": option.priced_run.stands_for,
                "run": option.priced_run.name,
                "device": option.priced_run.run.device,
                "problem": option.problem or None,
                "busy": asdict(option.busy),
                "months": [asdict(option.month(each)) for each in comparison.volumes],
                "prices": [price.model_dump() for price in option.prices],
            }
            for option in comparison.options
        ],
        "not_measured": [
            {
                "instance_type": each.instance_type,
                "gpu": each.hardware.gpu,
                "price": each.price.model_dump(),
                "usd_per_month_always_on": each.usd_per_month,
                "speedup_needed": each.speedup,
                "against": each.base.priced_run.stands_for if each.base else None,
            }
            for each in comparison.not_measured
        ],
        "cheapest_while_callers_wait": _ranges(comparison.ranges_at_once),
        "cheapest_of_all": _ranges(comparison.ranges_any),
        "break_even": [
            {
                "requests_per_day": each.requests_per_day,
                "usd_per_month": each.usd,
                "cheaper_below": each.cheaper_below.name,
                "cheaper_above": each.cheaper_above.name,
            }
            for each in comparison.crossings
        ],
        "article": [
            dict(zip(("figure", "article", "ours", "from"), row, strict=True))
            for row in article(comparison).rows
        ],
        "assumptions": asdict(comparison.assumptions),
        "stands_for": {each.stands_for: each.assumption for each in comparison.priced_runs},
    }


def _ranges(ranges: Sequence[Range]) -> list[dict[str, Any]]:
    return [
        {"from_requests_per_day": e.low, "to_requests_per_day": e.high, "option": e.option.name}
        for e in ranges
    ]
