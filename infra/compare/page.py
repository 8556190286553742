"""A comparison as one HTML page that loads nothing else, or nothing but a style sheet."""

from __future__ import annotations

from dalle.pages.environment import page_environment
from infra.benchmark.revision import outdated
from infra.compare import tables
from infra.compare.charts import plot_costs, plot_latencies, render_svg
from infra.compare.comparison import Comparison
from infra.compare.recommendation import about_runs, recommendation

LONG = 40  # characters; longer cells wrap


def render_page(comparison: Comparison, *, title: str, date: str, stylesheet: str = "") -> str:
    """Return the page.

    date: of the page, as it is to be printed. stylesheet: address of `dalle/pages/page.css`, which
    the page then does not hold.
    """
    runs = comparison.runs.values()
    hardware = {run.hardware.gpu or run.hardware.processor or run.target: None for run in runs}
    first, *reasons = recommendation(comparison)
    limit = comparison.assumptions.synchronous_limit_seconds
    return (
        page_environment("infra.compare")
        .get_template("compare.html")
        .render(
            title=title,
            stylesheet=stylesheet,
            date=date,
            hardware=hardware,
            comparison=comparison,
            lead=first,
            warnings=outdated(comparison.runs),
            remarks=[*reasons, *about_runs(comparison)],
            chart=render_svg(plot_costs(comparison), "Cost against requests a day"),
            latencies=render_svg(plot_latencies(comparison.runs, limit), "How long requests take"),
            tables=tables,
            classes=classes,
        )
    )


def classes(table: tables.Table, row: int, column: int) -> str:
    """Return the CSS classes of one cell, separated by spaces."""
    text = table.rows[row][column]
    found = []
    if column and table.columns[column].startswith("#"):
        found.append("number")
    else:
        found.append("words" if len(text) > LONG else "short")
    if text == tables.NOT_MEASURED:
        found.append("none")
    if (row, column) in table.best:
        found.append("best")
    return " ".join(found)
