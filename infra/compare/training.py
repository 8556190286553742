"""`cost`: what a training job costs on several instance types, on demand and on spot capacity.

    train --root out/job --plan --json --device-memory 24g > plan.json
    python -m infra cost plan.json --html out/training.html

The arithmetic is in `infra.cost.training`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle.errors import UserError
from infra.aws.output import Output, aligned, write_file
from infra.aws.project import add_pairs
from infra.compare.recommendation import usd
from infra.compare.tables import Table
from infra.cost.command import add_table_argument
from infra.cost.prices import CONFIDENCE_NOTE, DEFAULT_REGION, load_prices
from infra.cost.training import (
    JobCost,
    TrainingAssumptions,
    TrainingPlan,
    job_cost,
    load_plan,
)

DEFAULT_TYPES = ("ml.g4dn.xlarge", "ml.g5.xlarge", "ml.g6e.xlarge")
TITLE = "What a training job costs"
UNKNOWN = "price unknown"
UNIT = "USD for the job"
WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN.json", help="of `train --plan --json`")
    parser.add_argument(
        "--type",
        action="append",
        metavar="TYPE",
        help=f"an instance type; repeatable; default: {', '.join(DEFAULT_TYPES)}",
    )
    parser.add_argument(
        "--pairs", type=int, metavar="N", help="in the channel train, for a budget in epochs"
    )
    add_pairs(
        parser, "--hours", "a measured time in place of the estimate; repeatable", "TYPE=HOURS"
    )
    parser.add_argument("--region", default=DEFAULT_REGION, help="of the prices; %(default)s")
    add_pairs(parser, "--assume", "change an assumption that is listed; repeatable")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    parser.add_argument(
        "--stylesheet",
        default="",
        metavar="ADDRESS",
        help="of a copy of container/dalle/pages/page.css, to which the page of --html refers",
    )
    parser.add_argument("--title", default=TITLE, help="of the page; default %(default)r")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, only")
    add_table_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print and write the costs. Raises UserError, PriceMissing for an unknown type."""
    output = Output(as_json=options.json)
    plan = load_plan(options.plan)
    assumed = _assumptions(_numbers(options.assume, "--assume"))
    prices = load_prices(options.prices)
    types = list(dict.fromkeys(options.type or DEFAULT_TYPES))
    hours = _measured(_numbers(options.hours, "--hours"), types)
    costs = [
        job_cost(
            plan,
            name,
            prices,
            assumed,
            region=options.region,
            num_pairs=options.pairs,
            measured_hours=hours,
        )
        for name in types
    ]
    lines = [sentence(costs), *reasons(plan, costs, assumed)]
    tables = [cost_table(costs, options.region), stage_table(plan), assumption_table(assumed)]
    for line in lines:
        output.line(textwrap.fill(line, WIDTH, subsequent_indent="  ") + "\n")
    for each in tables:
        rows = [[name.removeprefix("#") for name in each.columns], *map(list, each.rows)]
        output.line("\n".join([each.title.upper(), *aligned(rows)]) + "\n")
    if options.html:
        write_file(options.html, _page(options, plan, costs, lines, tables))
        output.line(f"{options.html} written")
    return output.finish(
        summary=lines[0],
        region=options.region,
        costs=[_as_json(each) for each in costs],
        assumptions=dataclasses.asdict(assumed),
    )


def _numbers(pairs: Sequence[tuple[str, str]], option: str) -> dict[str, float]:
    try:
        return {name: float(text) for name, text in pairs}
    except ValueError as error:
        raise UserError(f"{option} must be NAME=NUMBER: {error}", field=option) from None


def _measured(hours: dict[str, float], types: Sequence[str]) -> dict[str, float]:
    for name, value in hours.items():
        if name not in types:
            raise UserError(
                f"--hours is of {name}, and the types are {', '.join(types)}; name it by --type too"
            )
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--hours of {name} must be more than 0, got {value:g}")
    return hours


def _assumptions(changes: dict[str, float]) -> TrainingAssumptions:
    known = [each.name for each in dataclasses.fields(TrainingAssumptions)]
    for name in changes:
        if name not in known:
            raise UserError(f"there is no assumption {name!r}; there are {', '.join(known)}")
    return TrainingAssumptions(**changes)


def sentence(costs: Sequence[JobCost]) -> str:
    """Return the answer in one sentence."""
    possible = [each for each in costs if each.on_demand_usd is not None and each.fits is not False]
    if not possible:
        return "None of these types has both room for the job and a known price."
    best = min(possible, key=lambda each: each.on_demand_usd or 0.0)
    how = "measured" if best.is_measured else "estimated"
    return (
        f"Training costs least on {best.instance_type}: {usd(best.on_demand_usd or 0.0)} on demand "
        f"and about {usd(best.spot_usd or 0.0)} on spot capacity, for {_hours(best)} of {how} time."
    )


def reasons(
    plan: TrainingPlan, costs: Sequence[JobCost], assumed: TrainingAssumptions
) -> list[str]:
    """Return what the sentence rests on, and the doubts about it."""
    flops = [f"{stage.stage} {stage.step_flops / 1e12:.3g} TFLOP a step" for stage in plan.stages]
    lines = [
        CONFIDENCE_NOTE,
        f"The work is that of the plan: {', '.join(flops)}. Its time is estimated at "
        f"{assumed.utilisation:.0%} of what a GPU can do by its data sheet, and "
        f"{_measurements(costs)}. A small model waits for kernel launches and data, and takes "
        "longer; --hours TYPE=HOURS puts a measured time in place.",
        "Spot capacity may be interrupted: the job continues from its last checkpoint. Its price "
        "is an assumption; the platform reports what was billed, and `train` prints what it saved.",
    ]
    for each in costs:
        if each.fits is False:
            lines.append(
                f"{each.instance_type} is too small: the plan needs "
                f"{plan.device_bytes / 2**30:.1f} GiB on a GPU; `train --plan` names cheaper ways."
            )
        if each.price is None:
            lines.append(
                f"{each.instance_type}: {UNKNOWN}; python -m infra prices refresh --type "
                f"{each.instance_type} --component Training reads it."
            )
        if each.hours is None:
            lines.append(f"{each.instance_type}: nothing tells its speed; give --hours.")
    return lines


def _measurements(costs: Sequence[JobCost]) -> str:
    measured = [each.instance_type for each in costs if each.is_measured]
    return f"measured on {', '.join(measured)}" if measured else "no job was measured for it"


def _hours(cost: JobCost) -> str:
    if cost.hours is None:
        return "unknown"
    return f"{60 * cost.hours:.0f} min" if cost.hours < 2 else f"{cost.hours:,.1f} h"


def cost_table(costs: Sequence[JobCost], region: str) -> Table:
    """Time and cost of the job on each type."""
    fits = {True: "yes", False: "no", None: "not known"}
    rows = [
        [
            each.instance_type,
            each.gpus,
            fits[each.fits],
            _hours(each),
            UNKNOWN if each.price is None else each.price.describe(),
            "-" if each.on_demand_usd is None else usd(each.on_demand_usd),
            "-" if each.spot_usd is None else usd(each.spot_usd),
        ]
        for each in costs
    ]
    columns = ["instance type", "GPUs", "fits", "#time", "price", "#on demand", "#spot"]
    return Table(f"On demand and spot in {region}", "", columns, rows)


def stage_table(plan: TrainingPlan) -> Table:
    """The stages of the plan."""
    rows = [
        [
            stage.stage,
            stage.size,
            f"{stage.num_parameters / 1e6:,.1f}",
            " ".join(f"{name}={value:g}" for name, value in stage.budget.items()),
            str(stage.batch_size),
            f"{stage.step_flops / 1e12:.3g}",
            f"{stage.job.memory.device / 2**30:.2f}",
        ]
        for stage in plan.stages
    ]
    columns = ["stage", "size", "#million weights", "budget", "#batch", "#TFLOP a step", "#GiB"]
    return Table("The plan", "Memory is that of one GPU.", columns, rows)


def assumption_table(assumed: TrainingAssumptions) -> Table:
    """Every value that is neither of the plan nor a price."""
    rows = [
        [
            each.name,
            f"{getattr(assumed, each.name):g}",
            each.metadata["unit"],
            each.metadata["meaning"],
        ]
        for each in dataclasses.fields(assumed)
    ]
    note = "Change one with --assume NAME=VALUE."
    return Table("Assumptions", note, ["name", "#value", "unit", "meaning"], rows)


def _page(
    options: argparse.Namespace,
    plan: TrainingPlan,
    costs: Sequence[JobCost],
    lines: Sequence[str],
    tables: Sequence[Table],
) -> str:
    # Here, because matplotlib takes a second to load.
    from dalle.pages.environment import page_environment
    from infra.compare.charts import plot_bars, render_svg
    from infra.compare.page import classes

    known = [each for each in costs if each.on_demand_usd is not None]
    series = {
        "on demand": [each.on_demand_usd or 0.0 for each in known],
        "spot": [each.spot_usd or 0.0 for each in known],
    }
    figure = plot_bars([each.instance_type for each in known], series, unit=UNIT)
    return (
        page_environment("infra.compare")
        .get_template("training.html")
        .render(
            title=options.title,
            stylesheet=options.stylesheet,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            stages=plan.stages,
            is_measured=any(each.is_measured for each in costs),
            lead=lines[0],
            warnings=[],
            remarks=lines[1:],
            chart=render_svg(figure, UNIT) if known else "",
            tables=tables,
            classes=classes,
        )
    )


def _as_json(cost: JobCost) -> dict[str, Any]:
    price = None if cost.price is None else cost.price.model_dump()
    return {**dataclasses.asdict(dataclasses.replace(cost, price=None)), "price": price}
