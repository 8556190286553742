"""The two charts of a comparison, drawn by matplotlib as inline SVG in the page's colours.

Text stays text, so that it can be searched and copied. Only matplotlib's `Figure` is used, never
pyplot, so that nothing stays open.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from io import StringIO

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infra.benchmark.run_file import Run
from infra.compare.comparison import HIGH, LOW, Comparison
from infra.compare.recommendation import about

LEAST_USD = 0.1  # a month; what is cheaper lies below the chart
COLUMNS = 2
LINE_STYLES = {
    "always on": "solid",
    "scaled to zero": (0, (5, 3)),
    "serverless": "solid",
    "lambda": (0, (1, 2)),
}
# Placeholder colours; the page's style sheet gives the real ones, for light and dark.
_INK, _MUTED, _RULE = "#010101", "#010102", "#010103"
_SERIES = [f"#01010{number}" for number in range(4, 9)]
_THEME = {_INK: "ink", _MUTED: "muted", _RULE: "rule"} | {
    colour: f"series-{number}" for number, colour in enumerate(_SERIES, 1)
}


def plot_costs(comparison: Comparison) -> Figure:
    """USD a month against requests a day, both logarithmic, with the break-even points marked."""
    top = 10 ** math.ceil(math.log10(max(option.usd(HIGH) for option in comparison.options)))
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axis = _axis(figure)
    axis.set(xscale="log", yscale="log", xlim=(LOW, HIGH), ylim=(LEAST_USD, top))
    axis.set_xlabel("requests a day", color=_MUTED)
    axis.set_ylabel("USD a month", color=_MUTED)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("${x:,g}")
    requests = np.geomspace(LOW, HIGH, 241)
    series = _series()
    colours: dict[str, str] = {}
    for option in sorted(comparison.options, key=lambda option: -option.usd(HIGH)):
        kind = option.priced_run.stands_for
        if kind not in colours:
            colours[kind] = next(series)
        axis.plot(
            requests,
            [option.usd(volume) for volume in requests],
            color=colours[kind],
            linestyle=LINE_STYLES[option.kind],
            label=option.name,
        )
    for crossing in comparison.crossings:
        point = (crossing.requests_per_day, max(LEAST_USD, crossing.usd))
        axis.plot(*point, "o", color=_INK, fillstyle="none")
        axis.annotate(
            f"{about(crossing.requests_per_day)} a day",
            point,
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
            color=_MUTED,
        )
    figure.legend(loc="outside right upper", frameon=False, labelcolor=_INK)
    return figure


def plot_latencies(runs: Mapping[str, Run], limit_seconds: float) -> Figure:
    """The share of requests answered within a time, a panel for each run."""
    measured = {
        name: [each for each in run.scenarios if each.latencies_seconds]
        for name, run in runs.items()
    }
    latencies = [s for found in measured.values() for each in found for s in each.latencies_seconds]
    low = 10 ** math.floor(math.log10(min(latencies)))
    high = 10 ** math.ceil(math.log10(max(*latencies, limit_seconds) * 1.05))
    rows = math.ceil(len(measured) / COLUMNS)
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    for place, (name, scenarios) in enumerate(measured.items(), 1):
        axis = _axis(figure, rows, min(COLUMNS, len(measured)), place)
        axis.set(xscale="log", xlim=(low, high), ylim=(0, 1.02), yticks=(0, 0.5, 0.95))
        axis.set_title(name, color=_INK, loc="left", parse_math=False)
        axis.xaxis.set_major_formatter("{x:g} s")
        axis.yaxis.set_major_formatter("{x:.0%}")
        for scenario, colour in zip(scenarios, _series(), strict=False):
            axis.ecdf(scenario.latencies_seconds, color=colour, label=scenario.name)
        axis.axvline(limit_seconds, color=_MUTED, linestyle="dashed", linewidth=1)
        axis.text(limit_seconds, 0.02, f"limit {limit_seconds:g} s ", ha="right", color=_MUTED)
        axis.legend(loc="best", frameon=False, labelcolor=_MUTED)
    return figure


def render_svg(figure: Figure, title: str) -> str:
    """The figure as one `<svg>` element that refers to the page's colours by name."""
    file = StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-size: [\d.]+px; font-family: [^;\"]*;? ?", "", svg)  # the page's font
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg class="wide" viewBox="\1" role="img" aria-label="{title}">',
        svg,
        count=1,
    )
    svg = re.sub(r"\d+\.\d{2,}", lambda match: f"{float(match[0]):.1f}", svg)  # of 720 across
    svg = re.sub(r"\s+", " ", svg)
    for colour, name in _THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _axis(figure: Figure, rows: int = 1, columns: int = 1, place: int = 1) -> Axes:
    axis = figure.add_subplot(rows, columns, place)
    axis.patch.set_alpha(0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_RULE)
    axis.tick_params(colors=_MUTED, which="both")
    axis.grid(color=_RULE, linewidth=0.5)
    axis.set_axisbelow(True)
    return axis


def _series() -> Iterator[str]:
    return itertools.cycle(_SERIES)
