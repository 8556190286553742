"""The two charts of a comparison, written as SVG that follows the page's colours.

Text stays text, so that it can be read out, searched and copied. Lines are told apart by colour
and by dashes, and named where they end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from infra.benchmark.run_file import Run, Scenario
from infra.compare.join import HIGH, LOW, Comparison
from infra.compare.options import Option
from infra.compare.words import about

COLOURS = 5  # --series-1 to --series-5 of the style sheet
DASHES = {"always on": "", "scaled to zero": "7 4", "serverless": "", "lambda": "2 4"}
LEAST_USD = 0.1  # a month; what is cheaper lies below the chart
LINE_HEIGHT = 15


@dataclass(frozen=True)
class _Plot:
    """A rectangle of the drawing with logarithmic axes."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    y_is_log: bool = True

    def x(self, value: float) -> float:
        low, high = map(math.log10, self.x_range)
        return self.left + self.width * (math.log10(value) - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.y_is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.top + self.height * (1 - (value - low) / (high - low))

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def foot(self) -> float:
        return self.top + self.height


def draw_costs(comparison: Comparison) -> str:
    """USD a month against requests a day, both logarithmic, with break-even points marked."""
    width, height = 1000.0, 500.0
    places = [10 ** (math.log10(LOW) + step * 6 / 240) for step in range(241)]
    most = max(option.usd(HIGH) for option in comparison.options)
    top = 10 ** math.ceil(math.log10(most))
    plot = _Plot(72, 16, 684, 430, (LOW, HIGH), (LEAST_USD, top))
    parts = [_grid_x(plot, _powers(LOW, HIGH), lambda value: f"{value:,.0f}", "requests a day")]
    parts.append(
        _grid_y(plot, _powers(LEAST_USD, top), lambda value: f"${value:,g}", "USD a month")
    )
    ends: list[tuple[float, str, str]] = []
    colours = _colours(comparison)
    for option in comparison.options:
        values = [option.usd(place) for place in places]
        points = [
            f"{plot.x(place):.1f},{plot.y(value):.1f}"
            for place, value in zip(places, values, strict=True)
            if value >= LEAST_USD
        ]
        colour = colours[option.joined.stands_for]
        parts.append(
            f'<polyline class="line" style="stroke: {colour}; stroke-dasharray: '
            f'{DASHES[option.kind] or "none"}" points="{" ".join(points)}">'
            f"<title>{escape(option.name)}</title></polyline>"
        )
        ends.append((plot.y(max(LEAST_USD, values[-1])), colour, option.name))
    parts += _end_labels(plot.right, ends, plot.top, plot.foot)
    for crossing in comparison.crossings:
        x, y = plot.x(crossing.requests_per_day), plot.y(max(LEAST_USD, crossing.usd))
        parts.append(
            f'<line class="drop" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{plot.foot:.1f}"/>'
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>'
            f"{escape(_crossing_words(crossing.cheaper_below, crossing.cheaper_above))}</title>"
            f'</circle><text class="note" x="{x - 8:.1f}" y="{y - 10:.1f}" text-anchor="end">'
            f"{about(crossing.requests_per_day)} a day</text>"
        )
    return _svg(width, height, "Cost against requests a day", parts)


def draw_latencies(runs: dict[str, Run], limit_seconds: float) -> str:
    """The share of requests that were answered within a time, a panel for each run."""
    closed = {
        name: [each for each in run.scenarios if each.latencies_seconds]
        for name, run in runs.items()
    }
    longest = max(each.latencies_seconds[-1] for found in closed.values() for each in found)
    shortest = min(each.latencies_seconds[0] for found in closed.values() for each in found)
    low = 10 ** math.floor(math.log10(shortest))
    high = 10 ** math.ceil(math.log10(max(longest, limit_seconds) * 1.05))
    columns = min(2, len(closed))
    wide, tall = 1000.0 / columns, 300.0
    parts = []
    for place, (name, found) in enumerate(closed.items()):
        left, top = (place % columns) * wide, (place // columns) * tall
        plot = _Plot(left + 52, top + 34, wide - 70, tall - 88, (low, high), (0, 1), y_is_log=False)
        parts.append(
            f'<text class="title" x="{plot.left:.1f}" y="{top + 18:.1f}">{escape(name)}</text>'
        )
        parts.append(_grid_x(plot, _powers(low, high), lambda value: f"{value:g} s", ""))
        parts.append(_grid_y(plot, [0, 0.5, 0.95], lambda value: f"{value:.0%}", ""))
        parts.append(
            f'<line class="limit" x1="{plot.x(limit_seconds):.1f}" x2="{plot.x(limit_seconds):.1f}"'
            f' y1="{plot.top:.1f}" y2="{plot.foot:.1f}"/><text class="note" text-anchor="end" '
            f'x="{plot.x(limit_seconds) - 4:.1f}" y="{plot.foot - 6:.1f}">limit {limit_seconds:g} s'
            "</text>"
        )
        for number, scenario in enumerate(found):
            parts.append(_distribution(plot, scenario, number))
    rows = math.ceil(len(closed) / columns)
    return _svg(1000.0, rows * tall, "Share of requests answered within a time", parts)


def _distribution(plot: _Plot, scenario: Scenario, number: int) -> str:
    """Steps up by one request each; the name stands below the axes, in a row of its own."""
    seconds = scenario.latencies_seconds
    points = [(seconds[0], 0.0)]
    for place, value in enumerate(seconds):
        points += [(value, points[-1][1]), (value, (place + 1) / len(seconds))]
    path = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
    colour = f"var(--series-{number % COLOURS + 1})"
    x = plot.left + number * plot.width / 3.2
    return (
        f'<polyline class="line" style="stroke: {colour}" points="{path}"><title>'
        f"{escape(scenario.name)}</title></polyline>"
        f'<line class="line" style="stroke: {colour}" x1="{x:.1f}" x2="{x + 18:.1f}" '
        f'y1="{plot.foot + 38:.1f}" y2="{plot.foot + 38:.1f}"/>'
        f'<text class="note" x="{x + 24:.1f}" y="{plot.foot + 42:.1f}">{escape(scenario.name)}'
        "</text>"
    )


def _crossing_words(below: Option, above: Option) -> str:
    return f"below: {below.name}; above: {above.name}"


def _colours(comparison: Comparison) -> dict[str, str]:
    types = list(dict.fromkeys(each.joined.stands_for for each in comparison.options))
    return {name: f"var(--series-{place % COLOURS + 1})" for place, name in enumerate(types)}


def _powers(low: float, high: float) -> list[float]:
    first, last = round(math.log10(low)), round(math.log10(high))
    return [float(10.0**power) for power in range(first, last + 1)]


def _grid_x(plot: _Plot, values: Sequence[float], words: Callable[[float], str], title: str) -> str:
    lines = [
        f'<line class="grid" x1="{plot.x(value):.1f}" x2="{plot.x(value):.1f}" '
        f'y1="{plot.top:.1f}" y2="{plot.foot:.1f}"/>'
        f'<text class="tick" text-anchor="middle" x="{plot.x(value):.1f}" '
        f'y="{plot.foot + 18:.1f}">{escape(words(value))}</text>'
        for value in values
    ]
    if title:
        middle = plot.left + plot.width / 2
        lines.append(
            f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{plot.foot + 40:.1f}">'
            f"{escape(title)}</text>"
        )
    return "".join(lines)


def _grid_y(plot: _Plot, values: Sequence[float], words: Callable[[float], str], title: str) -> str:
    lines = [
        f'<line class="grid" x1="{plot.left:.1f}" x2="{plot.right:.1f}" '
        f'y1="{plot.y(value):.1f}" y2="{plot.y(value):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{plot.left - 8:.1f}" '
        f'y="{plot.y(value) + 4:.1f}">{escape(words(value))}</text>'
        for value in values
    ]
    if title:
        lines.append(
            f'<text class="tick" x="{plot.left + 6:.1f}" y="{plot.top + 14:.1f}">{escape(title)}'
            "</text>"
        )
    return "".join(lines)


def _end_labels(
    x: float, ends: Sequence[tuple[float, str, str]], top: float, foot: float
) -> list[str]:
    """Names beside the ends of lines, moved apart where they would lie on each other."""
    ordered = sorted(ends)
    places: list[float] = []
    for y, _, _ in ordered:
        places.append(max(y, places[-1] + LINE_HEIGHT) if places else max(y, top))
    over = max(0.0, places[-1] - foot) if places else 0.0
    for number in range(len(places) - 1, -1, -1):
        most = places[number + 1] - LINE_HEIGHT if number + 1 < len(places) else foot
        places[number] = min(places[number] - (over if number + 1 == len(places) else 0), most)
    return [
        f'<line class="leader" x1="{x:.1f}" x2="{x + 10:.1f}" y1="{y:.1f}" y2="{place:.1f}" '
        f'style="stroke: {colour}"/><text class="name" x="{x + 14:.1f}" y="{place + 4:.1f}" '
        f'style="fill: {colour}">{escape(name)}</text>'
        for (y, colour, name), place in zip(ordered, places, strict=True)
    ]


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
