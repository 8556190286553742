"""The charts of the pages of costs, drawn by matplotlib as inline SVG in the page's colours.

Text stays text, so that it can be searched and copied. Only matplotlib's `Figure` is used, never
pyplot, so that nothing stays open.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from infra.benchmark.run_file import Run
from infra.compare.comparison import HIGH, LOW, Comparison
from infra.compare.recommendation import about, usd
from infra.compare.serving_options import Option

LEAST_USD = 0.1  # a month; what is cheaper lies below the chart
MOST_LINES = 5
LONG = r"\d+\.\d{2,}"
WIDTH = 5.0  # inches: 360 units across, so that text can be read on a phone
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
    """USD a month against requests a day, both logarithmic, with the break-even points marked.

    At most five ways to serve: the cheapest somewhere, then those that cost the least.
    """
    options = shown(comparison)
    top = 10 ** math.ceil(math.log10(max(option.usd(HIGH) for option in options)))
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axis = _axis(figure)
    axis.set(xscale="log", yscale="log", xlim=(LOW, HIGH), ylim=(LEAST_USD, top))
    axis.set_xlabel("requests a day", color=_MUTED)
    axis.set_ylabel("USD a month", color=_MUTED)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_formatter("${x:,g}")
    requests = np.geomspace(LOW, HIGH, 241)
    series = _series()
    colours: dict[str, str] = {}
    for option in sorted(options, key=lambda option: -option.usd(HIGH)):
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
    figure.legend(loc="outside lower left", frameon=False, labelcolor=_INK)
    return figure


def shown(comparison: Comparison) -> list[Option]:
    """Return the options of the chart of costs, in the order in which they matter."""
    ranges = [*comparison.ranges_at_once, *comparison.ranges_any]
    best = {each.option.name: each.option for each in ranges}
    middle = math.sqrt(LOW * HIGH)
    others = sorted(
        comparison.options, key=lambda option: (bool(option.problem), option.usd(middle))
    )
    return list((best | {each.name: each for each in others}).values())[:MOST_LINES]


def plot_latencies(runs: Mapping[str, Run], limit_seconds: float) -> Figure:
    """The share of requests answered within a time, a panel for each run."""
    measured = {
        name: [each for each in run.scenarios if each.latencies_seconds]
        for name, run in runs.items()
    }
    latencies = [s for found in measured.values() for each in found for s in each.latencies_seconds]
    low = 10 ** math.floor(math.log10(min(latencies)))
    high = 10 ** math.ceil(math.log10(max(*latencies, limit_seconds) * 1.05))
    figure = Figure(figsize=(WIDTH, 3.0 * len(measured)), layout="constrained")
    for place, (name, scenarios) in enumerate(measured.items(), 1):
        axis = _axis(figure, len(measured), 1, place)
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


def plot_bars(names: Sequence[str], series: Mapping[str, Sequence[float]], *, unit: str) -> Figure:
    """A group of bars for each name, one of each series, with its dollars beside it."""
    height = 0.8 / len(series)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.7 * len(names)), layout="constrained")
    axis = _axis(figure)
    places = np.arange(len(names))
    for number, ((label, values), colour) in enumerate(
        zip(series.items(), _series(), strict=False)
    ):
        drawn = axis.barh(places + number * height, values, height, color=colour, label=label)
        axis.bar_label(drawn, [usd(value) for value in values], padding=3, color=_INK)
    axis.set_yticks(places + height * (len(series) - 1) / 2, names)
    axis.invert_yaxis()
    axis.set_xlabel(unit, color=_MUTED)
    axis.margins(x=0.2)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, labelcolor=_INK)
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
        rf'<svg class="chart" viewBox="\1" role="img" aria-label="{title}">',
        svg,
        count=1,
    )
    svg = re.sub(r'"[^"]*"', lambda found: re.sub(LONG, _short, found[0]), svg)  # not of texts
    svg = re.sub(r"\s+", " ", svg).strip()
    for colour, name in _THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}"  # of 360 across


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
