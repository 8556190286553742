"""The report of a job: one HTML file that needs nothing else, not even a network.

    report = Report(title=…, generated_at=…, stages=[…], curves=read_curves(metrics_file), …)
    write_report(report, directory / "report.html")

`training.report.content` says what a report may hold, `training.report.figures` draws the charts.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from dalle.platform.disk import disk_error
from dalle.preprocess.images import ImageFormat, Pixels, contact_sheet, encode_image
from training.report.content import (
    CaptionAccuracy,
    CodebookUsage,
    Curve,
    DatasetSummary,
    Generated,
    Reconstructions,
    Report,
    Retrieval,
    StageSummary,
    read_curves,
)
from training.report.figures import Panel, draw_curves, draw_usage

__all__ = [
    "CaptionAccuracy",
    "CodebookUsage",
    "DatasetSummary",
    "Generated",
    "Reconstructions",
    "Report",
    "Retrieval",
    "StageSummary",
    "read_curves",
    "render_report",
    "write_report",
]

EXACT_UP_TO_PIXELS = 200  # a side; larger pictures are embedded as WebP, or the file would be huge
TICK = ' <span class="right" title="right">✓</span>'
_UNPLOTTED = {"epoch", "seconds"}  # say the same as the step


def write_report(report: Report, path: Path) -> None:
    """Write `render_report` to a file, at once or not at all; its directory is made if needed.

    Raises DiskFullError, or PlatformError for other trouble with the disk.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    content = render_report(report).encode("utf-8", errors="backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise disk_error(
            error,
            f"write the report {path}",
            if_full="what was trained is written already. Give a larger volume",
            directory=path.parent,
            num_bytes=len(content),
        ) from error


def render_report(report: Report) -> str:
    """The report as one HTML document, in which all pictures and styles are embedded."""
    templates = resources.files("training.report") / "templates"
    body = [
        _headline(report),
        *(f"<p>{escape(note)}</p>" for note in report.notes),
        _generated_section(report),
        _accuracy_section(report.accuracy),
        _reconstructions_section(report.reconstructions),
        _codebook_section(report.codebooks),
        _retrieval_section(report.retrieval),
        _training_section(report.stages, report.curves),
        _data_section(report.datasets),
        _hyperparameters_section(report.hyperparameters),
    ]
    return Template((templates / "report.html").read_text("utf-8")).substitute(
        title=escape(report.title),
        style=(templates / "report.css").read_text("utf-8"),
        meta=f"{report.generated_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        body="\n".join(part for part in body if part),
    )


# --- sections: each returns its HTML, or nothing when there is nothing to say


def _headline(report: Report) -> str:
    rows: list[tuple[str, str, str]] = []
    for accuracy in report.accuracy:
        (method, share), *others = accuracy.overall.items()
        error = math.sqrt(share * (1 - share) / max(1, accuracy.num_captions))
        rows.append(
            (
                f"Caption accuracy, {method}",
                f"{share:.3f}",
                f"{accuracy.scope} ({accuracy.num_captions:,}), ± {error:.3f}"
                + "".join(f"; {name} {value:.3f}" for name, value in others),
            )
        )
    if report.retrieval is not None:
        rows.append(
            (
                "CLIP retrieval, top-1",
                f"{report.retrieval.top1:.3f}",
                f"among {report.retrieval.num_pairs:,}; "
                f"chance is {1 / max(1, report.retrieval.num_pairs):.4f}",
            )
        )
    for usage in report.codebooks:
        rows.append(
            (f"{_capital(usage.name)} in use", f"{usage.used_share:.1%}", _describe_usage(usage))
        )
    if report.stages:
        rows.append(
            (
                "Training time",
                _duration(sum(stage.wall_seconds for stage in report.stages)),
                f"{_duration(sum(stage.cpu_seconds for stage in report.stages))} of CPU; "
                + ", ".join(stage.name for stage in report.stages),
            )
        )
    for dataset in report.datasets:
        skipped = f"{dataset.num_bad:,} skipped" if dataset.num_bad else "none skipped"
        rows.append(
            (
                f"Pairs in {dataset.channel}",
                f"{dataset.num_pairs:,}",
                f"{dataset.num_captions:,} captions; {skipped}",
            )
        )
    if not rows:
        return ""
    cells = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td class="number">{escape(value)}</td>'
        f"<td>{escape(note)}</td></tr>"
        for label, value, note in rows
    )
    return f'<div class="scroll"><table class="headline"><tbody>{cells}</tbody></table></div>'


def _generated_section(report: Report) -> str:
    if not report.generated:
        return ""
    score = {"clip": "CLIP score", "log_likelihood": "log likelihood"}.get(
        report.ranked_by, report.ranked_by
    )
    judged = any(row.is_right is not None for row in report.generated)
    return _section(
        "Generated images",
        f"Left of the line the real picture, right of it what was generated for the caption, best "
        f"first by {score}, which stands below each."
        + (
            " A tick marks an image whose nearest real picture is the caption's own."
            if judged
            else ""
        ),
        f'<div class="gallery">{"".join(map(_generated_row, report.generated))}</div>',
    )


def _generated_row(row: Generated) -> str:
    marks = row.is_right or [False] * len(row.images)
    figures = "".join(
        f"<figure>{_img(image, f'{row.caption}, rank {rank}')}<figcaption>"
        f"{score:.3f}{TICK if right else ''}"
        "</figcaption></figure>"
        for rank, (image, score, right) in enumerate(
            zip(row.images, row.scores, marks, strict=True), start=1
        )
    )
    actual = (
        ""
        if row.actual is None
        else f'<figure class="actual">{_img(row.actual, f"{row.caption}, real")}'
        "<figcaption>real</figcaption></figure>"
    )
    return (
        f"<div><p>{escape(row.caption)}</p>"
        f'<div class="generated">{actual}<div>{figures}</div></div></div>'
    )


def _accuracy_section(accuracies: Sequence[CaptionAccuracy]) -> str:
    if not accuracies:
        return ""
    parts = []
    for accuracy in accuracies:
        methods = list(accuracy.overall)
        rows = [_share_row("whole caption", accuracy.overall, methods, kind="total")]
        rows += [
            _share_row(attribute, shares, methods)
            for attribute, shares in accuracy.per_attribute.items()
        ]
        parts.append(
            f"<h3>{escape(_capital(accuracy.scope))} "
            f'<span class="meta">({accuracy.num_captions:,})</span></h3>'
            + _table(["right in", *methods], rows)
        )
    return _section(
        "Caption accuracy",
        "A generated picture is right when its nearest real picture, by pixels and over the whole "
        "data set, is the caption's own.",
        *parts,
    )


def _share_row(
    label: str, shares: Mapping[str, float], methods: Iterable[str], kind: str = ""
) -> str:
    cells = "".join(
        f'<td class="share" style="--share: {min(1, max(0, shares[method])):.3f}">'
        f"{shares[method]:.3f}</td>"
        if method in shares
        else "<td>–</td>"
        for method in methods
    )
    return f'<tr class="{kind}"><th scope="row">{escape(label)}</th>{cells}</tr>'


def _reconstructions_section(pairs: Reconstructions | None) -> str:
    if pairs is None or not pairs.originals:
        return ""
    figures = "".join(
        f"<figure>{_img(contact_sheet([[original], [again]], padding=1), 'original, then dVAE')}"
        "</figure>"
        for original, again in zip(pairs.originals, pairs.reconstructions, strict=True)
    )
    return _section(
        "Reconstructions",
        "Above the original, below it what the dVAE makes of its image tokens. Generated images "
        "are made of such tokens too, and lack what is lost here.",
        f'<div class="pictures">{figures}</div>',
    )


def _codebook_section(codebooks: Sequence[CodebookUsage]) -> str:
    if not codebooks:
        return ""
    described = "; ".join(f"{usage.name}: {_describe_usage(usage)}" for usage in codebooks)
    return _section(
        "Codebook usage",
        "How often each entry stands for a part of an image. The dashed line is equal use of all.",
        draw_usage({usage.name: usage.counts for usage in codebooks}),
        f'<p class="note">{escape(described)}.</p>',
    )


def _describe_usage(usage: CodebookUsage) -> str:
    used = int((usage.counts > 0).sum())
    return f"{used:,} of {len(usage.counts):,} entries, perplexity {usage.perplexity:,.0f}"


def _retrieval_section(retrieval: Retrieval | None) -> str:
    if retrieval is None:
        return ""
    return _section(
        "CLIP retrieval",
        f"For {retrieval.top1:.1%} of {retrieval.num_pairs:,} captions, the image with the highest "
        "CLIP score among all of them is the caption's own.",
    )


def _training_section(stages: Sequence[StageSummary], curves: Mapping[str, Curve]) -> str:
    panels = _panels(curves)
    if not stages and not panels:
        return ""
    parts = []
    if stages:
        rows = [
            f'<tr><th scope="row">{escape(stage.name)}</th>'
            f'<td class="number">{stage.steps:,}</td>'
            f'<td class="number">{_duration(stage.wall_seconds)}</td>'
            f'<td class="number">{_duration(stage.cpu_seconds)}</td>'
            f"<td>{escape(', '.join(f'{n} {v:.4g}' for n, v in stage.metrics.items()))}</td>"
            f"<td>{escape(stage.job_name)}{'' if stage.is_finished else ', stopped early'}</td>"
            "</tr>"
            for stage in stages
        ]
        columns = ["stage", "#steps", "#wall time", "#CPU time", "last validation", "by the job"]
        parts.append(_table(columns, rows))
    for stage, charts in panels.items():
        parts.append(f"<h3>{escape(stage)}</h3>{draw_curves(charts)}")
    notes = ["CPU time leaves out the processes that load images."] if stages else []
    notes += ["Faint: every logged value; strong: their moving mean."] if panels else []
    return _section("Training", " ".join(notes), *parts)


def _panels(curves: Mapping[str, Curve]) -> dict[str, list[Panel]]:
    """Stage -> its charts: losses first, and a metric together with its validation twin."""
    grouped: dict[str, dict[str, dict[str, Curve]]] = {}
    for key, curve in curves.items():
        stage, _, metric = key.rpartition("/")
        name, kind = metric.removeprefix("train_"), "training"
        if metric.startswith("validation_"):
            name, kind = metric.removeprefix("validation_"), "validation"
        if name not in _UNPLOTTED and any(math.isfinite(value) for _, value in curve):
            grouped.setdefault(stage, {}).setdefault(name, {})[kind] = curve
    return {
        stage: [
            Panel(name.replace("_", " "), dict(sorted(metrics[name].items())))
            for name in sorted(metrics, key=lambda name: (name != "loss", "loss" not in name, name))
        ]
        for stage, metrics in grouped.items()
    }


def _data_section(datasets: Sequence[DatasetSummary]) -> str:
    if not datasets:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(data.channel)}</th>'
        f'<td class="number">{data.num_pairs:,}</td><td class="number">{data.num_captions:,}</td>'
        f'<td class="number">{data.image_size} × {data.image_size}</td>'
        f'<td><code title="{escape(data.fingerprint)}">{escape(data.fingerprint[:12])}</code></td>'
        "</tr>"
        for data in datasets
    ]
    parts = [_table(["channel", "#pairs", "#captions", "#image size", "fingerprint"], rows)]
    skips = [
        f'<tr><th scope="row">{escape(data.channel)}</th><td>{escape(reason)}</td>'
        f'<td class="number">{count:,}</td>'
        f'<td class="note">{escape(", ".join(data.examples.get(reason, ())))}</td></tr>'
        for data in datasets
        for reason, count in data.skipped.items()
    ]
    if skips:
        parts += ["<h3>Left out</h3>", _table(["channel", "reason", "#count", "such as"], skips)]
    return _section("Data", "", *parts)


def _hyperparameters_section(hyperparameters: Mapping[str, object]) -> str:
    if not hyperparameters:
        return ""
    rows = [
        f'<tr><th scope="row"><code>{escape(name)}</code></th>'
        f'<td><code class="long">{escape(str(value))}</code></td></tr>'
        for name, value in hyperparameters.items()
    ]
    return _section("Hyperparameters", "", _table(["name", "value"], rows))


# --- parts


def _section(title: str, note: str, *parts: str) -> str:
    introduction = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{introduction}{''.join(parts)}</section>"


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    """columns: headings; one that begins with # is of numbers. rows: `<tr>` elements."""
    heads = "".join(
        f'<th scope="col"{" class=number" if name.startswith("#") else ""}>'
        f"{escape(name.removeprefix('#'))}</th>"
        for name in columns
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _img(pixels: Pixels, description: str) -> str:
    format: ImageFormat = "png" if max(pixels.shape[:2]) <= EXACT_UP_TO_PIXELS else "webp"
    data = base64.b64encode(encode_image(pixels, format)).decode()
    return f'<img src="data:image/{format};base64,{data}" alt="{escape(description)}">'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _duration(seconds: float) -> str:
    """`41.3 s`, `8 min 03 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
