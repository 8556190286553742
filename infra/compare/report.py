"""A dated report of what an image costs: measured on this machine in minutes, and rendered.

    python -m infra.compare.report measure --root out/demo/ml       # make bench-costs
    python -m infra.compare.report render infra/reports/2026-…      # make docs

A report is a folder: a run of `benchmark` for each device, and what `compare` makes of them, as a
page and as text. `measure` starts `serve` on two cores, and then with the GPU where there is one.
Rendered again, a report warns when the code that it measured has changed since.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dalle.errors import DalleError, UserError
from infra.aws.output import write_file
from infra.benchmark import command as benchmark
from infra.benchmark.machine import this_machine
from infra.benchmark.run_file import Device, load_run, save_run
from infra.compare import command as compare
from infra.cost.prices import load_prices
from training.demo.commands import serving

REPORTS = Path(__file__).parents[1] / "reports"
STYLESHEET = "../../../container/dalle/pages/page.css"
CORES = 2
CPU_TYPES = ("ml.c7i.large", "serverless")
"""Of two virtual processors, as the cores that are measured."""
REQUESTS = 100
"""Of each load, so that five of them are beyond the 95th percentile."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or render, and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        folders = [measure(options)] if options.verb == "measure" else options.folders
        for folder in folders:
            render(folder)
            print(f"{folder} written")
    except DalleError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.compare.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("measure", help="measure `serve`, and write a dated report")
    made.add_argument("--root", type=Path, required=True, help="as of `serve`: its model is served")
    made.add_argument("--name", default="rainbow", help="of the model, in the folder's name")
    made.add_argument("--cores", type=int, default=CORES, help="of the server; %(default)s")
    made.add_argument("--requests", type=int, default=REQUESTS, help="of each load; %(default)s")
    made.add_argument("--clients", type=int, action="append", help="default 1, 8 and 64")
    made.add_argument("--reports", type=Path, default=REPORTS, help="where; infra/reports")
    drawn = verbs.add_parser("render", help="write page and text of reports again")
    drawn.add_argument("folders", type=Path, nargs="+")
    return parser


def measure(options: argparse.Namespace) -> Path:
    """Measure `serve` on this machine and return the folder of the runs. Raises UserError."""
    if not 1 <= options.cores <= len(os.sched_getaffinity(0)):
        raise UserError(
            f"--cores must be 1 to the {len(os.sched_getaffinity(0))} of this machine, "
            f"got {options.cores}"
        )
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    folder = Path(options.reports) / f"{day}_{options.name}"
    run_device("cpu", CPU_TYPES, folder / f"{options.cores}-cores.json", options)
    gpu = this_machine("cuda").gpu
    if gpu:
        path = folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}.json"
        run_device("cuda", types_of_gpu(gpu), path, options)
    return folder


def run_device(
    device: Device, stands_for: Sequence[str], path: Path, options: argparse.Namespace
) -> None:
    """Measure `serve` on one device, and write the run. Raises UserError where it fails."""
    words = ["--device", device, "--requests", str(options.requests), "--out", str(path)]
    words += [word for kind in stands_for for word in ("--as", kind)]
    words += [word for each in options.clients or () for word in ("--clients", str(each))]
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        stack.enter_context(environment(DALLE_DEVICE=device))
        with on_cores(options.cores if device == "cpu" else None):
            url = stack.enter_context(serving(options.root, Path(scratch) / "serve.log"))
        benchmark.run(parser.parse_args(["--url", url, *words]))
    if device == "cpu":
        run = load_run(path)
        limited = run.hardware.model_copy(update={"cpu_limit": float(options.cores)})
        save_run(run.model_copy(update={"hardware": limited}), path)


@contextlib.contextmanager
def on_cores(number: int | None) -> Iterator[None]:
    """Start processes on the first cores alone, or on all for None; the others stay for us."""
    whole = os.sched_getaffinity(0)
    first = set(sorted(whole)[:number])
    os.sched_setaffinity(0, first)
    try:
        yield
    finally:
        os.sched_setaffinity(0, whole - first or whole)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def types_of_gpu(name: str) -> list[str]:
    """Return the type of one such GPU that has a price; none for a GPU without a price."""
    table = load_prices()
    known = [
        kind
        for kind, each in table.instance_types.items()
        if each.gpu and re.search(rf"{re.escape(each.gpu)}(?!\w)", name)
    ]
    return list(dict.fromkeys(table.single_gpu(kind) for kind in known))[:1]


def runs_of(folder: Path) -> list[Path]:
    """Return the files of a report's runs, without that of `train --plan`."""
    return sorted(path for path in folder.glob("*.json") if path.name != "plan.json")


def render(folder: Path) -> None:
    """Write page and text of a report. Runs without a price are named and left out.

    Raises UserError for a folder without a run that stands for a priced type.
    """
    paths = runs_of(folder)
    priced = [path for path in paths if load_run(path).stands_for]
    if not priced:
        raise UserError(f"{folder} has no run that stands for an instance type with a price")
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    page = ["--html", str(folder / "compare.html"), "--stylesheet", STYLESHEET]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        compare.run(parser.parse_args([*map(str, priced), *page]))
    told = text.getvalue().rsplit("\n\n", 1)[0]  # without the line that names the page
    left_out = [path for path in paths if path not in priced]
    for path in left_out:
        gpu = load_run(path).hardware.gpu
        told += f"\n\nLeft out: {path.stem}, since no host with {gpu} has a known price."
    write_file(folder / "compare.txt", told.rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
