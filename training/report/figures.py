"""Charts of the report by matplotlib, as inline SVG in the page's colours.

Only matplotlib's `Figure` is used, never pyplot: nothing is registered, opened or left behind.
matplotlib is imported for the first chart. Its font cache goes to a directory that is removed at
once, because a training job writes into its own directories only.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from training.report.content import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
PANEL_WIDTH, PANEL_HEIGHT = 3.5, 2.35  # inches; three panels fill the page
LEAST_REM = 15  # width of a panel on the page
SMOOTH_FROM_POINTS = 60
LOG_FROM_RATIO = 20.0

# Placeholders that no chart uses otherwise; the page's style sheet gives the real colours.
_INK, _MUTED, _RULE = "#010101", "#010102", "#010103"
_SERIES = ("#010104", "#010105")
_THEME = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _SERIES[0]: "var(--series-1)",
    _SERIES[1]: "var(--series-2)",
}


@dataclass(frozen=True)
class Panel:
    """One chart: a title and one or two named curves on common axes.

    kept_step: the one whose weights were kept, where it is not the last; a line marks it.
    """

    title: str
    curves: Mapping[str, Curve]
    kept_step: int | None = None


def plot_curves(panels: Sequence[Panel]) -> str:
    """Plot curves over steps, three panels a row, as one `<svg>` element.

    Values that are not finite leave a gap. A curve of many points is faint, with its moving mean
    on top. Losses that span a factor over 20 have a logarithmic axis.
    """
    figure, axes = _grid(len(panels))
    for panel, axis in zip(panels, axes, strict=True):
        axis.set_title(panel.title, color=_INK, fontsize=9, loc="left", parse_math=False)
        finite: list[float] = []
        for colour, (name, curve) in zip(_SERIES, panel.curves.items(), strict=False):
            steps = np.array([step for step, _ in curve], dtype=float)
            values = np.array([value for _, value in curve], dtype=float)
            values[~np.isfinite(values)] = np.nan
            _plot_curve(axis, steps, values, colour, name)
            finite += values[np.isfinite(values)].tolist()
        if panel.kept_step is not None:
            axis.axvline(panel.kept_step, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        spans_much = finite and 0 < LOG_FROM_RATIO * min(finite) < max(finite)
        if spans_much and panel.title.endswith("loss"):
            _make_logarithmic(axis)
        axis.set_xlabel("step", color=_MUTED, fontsize=8)
        if len(panel.curves) > 1:
            axis.legend(frameon=False, fontsize=8, labelcolor=_MUTED)
    return _svg(figure)


def plot_usage(counts: Mapping[str, NDArray[np.int64]]) -> str:
    """Plot how often each entry of each codebook [V] was used, most used first, as one `<svg>`.

    The vertical axis is logarithmic; 1 is the share that every entry would have if all were used
    equally.
    """
    figure, axes = _grid(len(counts))
    for (name, uses), axis in zip(counts.items(), axes, strict=True):
        shares = np.sort(uses.astype(float))[::-1] * len(uses) / max(1, uses.sum())
        ranks = np.arange(1, len(uses) + 1)
        axis.axhline(1, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        # On a linear axis, a background that fills most of each image would hide all other entries.
        # Entries that were never used end at the foot.
        foot = min(0.5, shares[shares > 0].min(initial=0.5)) / 2
        axis.set_yscale("log")
        axis.fill_between(
            ranks, shares, foot, step="mid", color=_SERIES[0], alpha=0.25, linewidth=0
        )
        axis.step(ranks, np.maximum(shares, foot), where="mid", color=_SERIES[0], linewidth=1.2)
        axis.set_ylim(bottom=foot)
        axis.set_xlim(0.5, len(uses) + 0.5)
        axis.set_title(name, color=_INK, fontsize=9, loc="left", parse_math=False)
        axis.set_xlabel("entries, most used first", color=_MUTED, fontsize=8)
    return _svg(figure)


def _plot_curve(
    axis: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], colour: str, name: str
) -> None:
    marker = "o" if len(values) < 12 else ""  # a few points alone would be hard to see
    if len(values) < SMOOTH_FROM_POINTS or np.isnan(values).any():
        axis.plot(
            steps, values, color=colour, linewidth=1.4, label=name, marker=marker, markersize=3
        )
        return
    window = len(values) // 30 | 1  # odd, so that the mean sits on its middle
    padded = np.pad(values, window // 2, mode="edge")
    means = np.convolve(padded, np.full(window, 1 / window), mode="valid")
    axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    axis.plot(steps, means, color=colour, linewidth=1.4, label=name)


def _make_logarithmic(axis: Axes) -> None:
    """Label 1, 2 and 5 with plain numbers; matplotlib's powers of ten crowd a small panel."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _grid(num_panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, num_panels)
    rows = math.ceil(num_panels / columns)
    figure = _figure_class()(
        figsize=(columns * PANEL_WIDTH, rows * PANEL_HEIGHT), layout="constrained"
    )
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(num_panels)]
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_RULE)
        axis.tick_params(colors=_MUTED, labelsize=8, width=0.6, length=3, which="both")
        axis.grid(axis="y", color=_RULE, linewidth=0.5)
        axis.set_axisbelow(True)
        axis.margins(x=0.02)
    return figure, axes


def _figure_class() -> type[Figure]:
    if "matplotlib.font_manager" not in sys.modules and "MPLCONFIGDIR" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="matplotlib-") as directory:
            os.environ["MPLCONFIGDIR"] = directory
            try:
                import matplotlib.font_manager  # noqa: F401 - writes its cache when imported
            finally:
                del os.environ["MPLCONFIGDIR"]
    from matplotlib.figure import Figure

    return Figure


def _svg(figure: Figure) -> str:
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same in every figure; ids must be unique
    # A figure that is wider than a narrow screen is scrolled: scaled down, it could not be read.
    width = figure.get_figwidth() / (COLUMNS * PANEL_WIDTH)
    least = LEAST_REM * round(figure.get_figwidth() / PANEL_WIDTH)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" style="width: {width:.1%}; min-width: {least}rem" aria-hidden="true">',
        svg,
        count=1,
    )
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, variable)
    return svg
