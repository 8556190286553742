"""A comparison as one HTML page that loads nothing else, from disk or network."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined

from infra.compare import tables
from infra.compare.charts import plot_costs, plot_latencies, render_svg
from infra.compare.comparison import Comparison
from infra.compare.recommendation import quietness, recommendation

LONG = 40  # characters; longer cells wrap


def render_page(comparison: Comparison, *, title: str, date: str) -> str:
    """Return the page. date: of the page, as it is to be printed."""
    environment = Environment(
        loader=PackageLoader("infra.compare"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = comparison.runs.values()
    hardware = {run.hardware.gpu or run.hardware.processor or run.target: None for run in runs}
    first, *reasons = recommendation(comparison)
    style = resources.files("infra.compare") / "templates" / "compare.css"
    limit = comparison.assumptions.synchronous_limit_seconds
    return environment.get_template("compare.html").render(
        title=title,
        style=style.read_text("utf-8"),
        date=date,
        hardware=hardware,
        comparison=comparison,
        recommendation=first,
        remarks=[*reasons, *quietness(comparison)],
        costs=render_svg(plot_costs(comparison), "Cost against requests a day"),
        latencies=render_svg(plot_latencies(comparison.runs, limit), "How long requests take"),
        tables=tables,
        classes=classes,
    )


def classes(table: tables.Table, row: int, column: int) -> str:
    """Return the CSS classes of one cell, separated by spaces."""
    text = table.rows[row][column]
    found = []
    if column and table.columns[column].startswith("#"):
        found.append("number")
    elif len(text) > LONG:
        found.append("words")
    if text == tables.NOT_MEASURED:
        found.append("none")
    if (row, column) in table.best:
        found.append("best")
    return " ".join(found)
