"""A comparison as one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from dalle.platform.disk import write_atomically
from infra.compare.charts import draw_costs, draw_latencies
from infra.compare.join import Comparison
from infra.compare.tables import (
    NOT_MEASURED,
    Table,
    article,
    assumptions,
    busy,
    gpus,
    latency,
    monthly,
    prices,
    runs,
    stages,
)
from infra.compare.words import quietness, recommendation

LONG = 40  # characters; what is longer is wrapped


def write_page(comparison: Comparison, path: Path, *, title: str, date: str) -> None:
    """Write `render_page` to a file, at once or not at all."""
    write_atomically(path, render_page(comparison, title=title, date=date))


def render_page(comparison: Comparison, *, title: str, date: str) -> str:
    """The page. date: when it was made, as it is to be printed."""
    templates = resources.files("infra.compare") / "templates"
    hardware = dict.fromkeys(
        run.hardware.gpu or run.hardware.processor or run.target for run in comparison.runs.values()
    )
    first, *reasons = recommendation(comparison)
    limit = comparison.assumptions.synchronous_limit_seconds
    sections = [
        f'<p class="lead">{escape(first)}</p>',
        _list([*reasons, *quietness(comparison)]),
        _section(
            "Cost against requests a day",
            "Circles: break-even points between the cheapest ways to answer while a caller waits.",
            _scroll(draw_costs(comparison)),
        ),
        _table(monthly(comparison)),
        _table(busy(comparison)),
        _section(
            "How long requests take",
            "The share of requests answered within a time; to the left and steep is good.",
            _scroll(draw_latencies(comparison.runs, limit)),
        ),
        _table(gpus(comparison)) if comparison.not_measured else "",
        *map(_table, (latency(comparison), stages(comparison), article(comparison))),
        *map(_table, (prices(comparison), assumptions(comparison), runs(comparison))),
    ]
    return Template((templates / "compare.html").read_text("utf-8")).substitute(
        title=escape(title),
        style=(templates / "compare.css").read_text("utf-8"),
        meta=escape(
            f"{date} · measured on {'; '.join(hardware)}"
            f"{'' if comparison.has_gpu else ' · no GPU was measured'}"
        ),
        body="\n".join(sections),
    )


def _section(title: str, note: str, *parts: str) -> str:
    introduction = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{introduction}{''.join(parts)}</section>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _scroll(part: str) -> str:
    return f'<div class="scroll">{part}</div>'


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{" class=number" if name.startswith("#") else ""}>'
        f"{escape(name.removeprefix('#'))}</th>"
        for name in table.columns
    )
    rows = "".join(
        f"<tr>{''.join(_cell(table, row, column) for column in range(len(table.columns)))}</tr>"
        for row in range(len(table.rows))
    )
    body = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return _section(table.title, table.note, _scroll(body))


def _cell(table: Table, row: int, column: int) -> str:
    text = table.rows[row][column]
    if column == 0:
        wraps = ' class="words"' if len(text) > LONG else ""
        return f'<th scope="row"{wraps}>{escape(text)}</th>'
    kinds = []
    if table.columns[column].startswith("#"):
        kinds.append("number")
    elif len(text) > LONG:
        kinds.append("words")
    if text == NOT_MEASURED:
        kinds.append("none")
    if (row, column) in table.best:
        kinds.append("best")
    attribute = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{attribute}>{escape(text)}</td>"
