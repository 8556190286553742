"""The report of a job: one HTML file that needs nothing else, not even a network.

    report = Report(title=…, generated_at=…, stages=[…], curves=read_curves(metrics_file), …)
    write_report(report, directory / "report.html")

`training.report.content` says what a report may hold, `training.report.figures` makes the charts,
and `templates/report.html` lays out the page.
"""

from __future__ import annotations

import base64
import math
from datetime import UTC
from functools import partial
from pathlib import Path

from markupsafe import Markup, escape

from dalle.pages.environment import SMALL_UP_TO_PIXELS, page_environment, shown_width
from dalle.platform.disk import disk_errors, write_atomically
from dalle.preprocess.images import ImageFormat, Pixels, contact_sheet, encode_image
from training.report.content import Curve, Report
from training.report.figures import Panel, plot_curves, plot_usage

EXACT_UP_TO_PIXELS = 200  # a side; larger images are embedded as WebP, or the file would be huge
SHOWN_PIXELS = 160  # about so wide is a picture on the page
_UNPLOTTED = {"epoch", "seconds"}  # say the same as the step


def write_report(report: Report, path: Path) -> None:
    """Write `render_report` to a file, whole or not at all; make its directory if needed.

    Raises DiskFullError, or PlatformError for other trouble with the disk.
    """
    content = render_report(report).encode("utf-8", errors="backslashreplace")
    with disk_errors(
        f"write the report {path}",
        if_full="the trained models are written already. Give a larger volume",
        directory=path.parent,
        num_bytes=len(content),
    ):
        write_atomically(path, content)


def render_report(report: Report) -> str:
    """Return the report as one HTML document with all images and styles embedded."""
    environment = page_environment("training.report")
    environment.filters |= {
        "capital": lambda text: text[:1].upper() + text[1:],
        "duration": _duration,
        "image": _image,
        "thousands": "{:,.0f}".format,
    }
    usage = {codebook.name: codebook.counts for codebook in report.codebooks}
    return environment.get_template("report.html").render(
        report=report,
        generated_at=f"{report.generated_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        is_judged=any(row.is_right is not None for row in report.generated),
        charts={stage: plot_curves(panels) for stage, panels in _panels(report).items()},
        usage_chart=plot_usage(usage) if usage else "",
        contact_sheet=contact_sheet,
        zip=partial(zip, strict=True),
    )


def _panels(report: Report) -> dict[str, list[Panel]]:
    """Stage -> its charts: losses first; a metric and its validation share one."""
    kept_steps: dict[str, int | None] = {each.stage: each.kept_step for each in report.stages}
    grouped: dict[str, dict[str, dict[str, Curve]]] = {}
    for key, curve in report.curves.items():
        stage, _, metric = key.rpartition("/")
        name, kind = metric.removeprefix("train_"), "training"
        if metric.startswith("validation_"):
            name, kind = metric.removeprefix("validation_"), "validation"
        if name not in _UNPLOTTED and any(math.isfinite(value) for _, value in curve):
            grouped.setdefault(stage, {}).setdefault(name, {})[kind] = curve
    return {
        stage: [
            Panel(
                name.replace("_", " "),
                dict(sorted(metrics[name].items())),
                kept_step=kept_steps.get(stage),
            )
            for name in sorted(metrics, key=lambda name: (name != "loss", "loss" not in name, name))
        ]
        for stage, metrics in grouped.items()
    }


def _image(pixels: Pixels, description: str) -> Markup:
    """An `<img>` element that holds its image, large enough to judge it."""
    height, width, _ = pixels.shape
    format: ImageFormat = "png" if max(height, width) <= EXACT_UP_TO_PIXELS else "webp"
    data = base64.b64encode(encode_image(pixels, format)).decode()
    look = ' class="pixelated"' if width <= SMALL_UP_TO_PIXELS else ""
    return Markup(  # noqa: S704
        f'<img{look} width="{shown_width(width, SHOWN_PIXELS)}" alt="{escape(description)}" '
        f'src="data:image/{format};base64,{data}">'
    )


def _duration(seconds: float) -> str:
    """`41.3 s`, `8 min 03 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
