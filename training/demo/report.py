"""What the demo shows at its end: caption accuracy, one HTML report and a contact sheet.

Knows models, pictures and reports; knows nothing of processes or of what may be reused.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.platform.environment import Paths
from dalle.preprocess.images import Pixels, contact_sheet, decode_image, encode_image
from training.data.batching.preload import to_chw
from training.data.sources.channel import open_channel
from training.evaluate.ground_truth import GroundTruth, read_ground_truth
from training.evaluate.scores import Evaluation, evaluate, render_table
from training.report.content import (
    DatasetSummary,
    Generated,
    Report,
    StageSummary,
    read_curves,
)
from training.report.page import write_report
from training.report.samples import codebook_usage, reconstructions, retrieval

PILOT_CAPTIONS = 256  # evaluated first, to know how many a machine manages
EVALUATION_SECONDS = 100.0
SHOWN_RECONSTRUCTIONS = 12
CELL_PIXELS = 128  # width of a picture in the contact sheet
FONT_PIXELS = 12


def measure_accuracy(root: Path, data: Path, out: Path, limit: int | None) -> None:
    """Write the greedy caption accuracy of the artefact below `root` to the JSON file `out`.

    limit: evaluate so many captions; when None, all that this machine manages in
    `EVALUATION_SECONDS`.
    """
    artefact, truth = _read(root, data)
    if limit is None and len(truth.held_out) > PILOT_CAPTIONS:
        began = time.monotonic()
        evaluate(artefact, truth, greedy_only=True, limit=PILOT_CAPTIONS)
        seconds_each = (time.monotonic() - began) / PILOT_CAPTIONS
        limit = max(PILOT_CAPTIONS, int(EVALUATION_SECONDS / seconds_each))
    evaluation = evaluate(artefact, truth, greedy_only=True, limit=limit)
    print(render_table(evaluation))
    out.write_text(evaluation.to_json() + "\n", encoding="utf-8")


def write_demo_report(
    root: Path,
    data: Path,
    replies: Path,
    accuracy: Path,
    hyperparameters: Mapping[str, str],
    report: Path,
    sheet: Path,
) -> None:
    """Write report and contact sheet from what the other steps left.

    root: of the training job. replies: the directory with `replies.json` and the pictures that
    `serve` returned. accuracy: file of `measure_accuracy`.
    """
    artefact, truth = _read(root, data)
    assert artefact.dvae is not None
    size = artefact.dvae.config.image_size
    rows = _read_replies(replies, truth)
    columns = [[row.actual, *row.images] for row in rows if row.actual is not None]
    sheet.write_bytes(encode_image(draw_sheet([row.caption for row in rows], columns), "png"))
    datasets = [open_channel(data / name, image_size=size) for name in ("train", "validation")]
    held_out = torch.stack([to_chw(datasets[1].image(row)) for row in range(len(datasets[1]))])
    captions = [datasets[1].captions(row)[0] for row in range(len(datasets[1]))]
    shown = np.linspace(0, len(held_out) - 1, SHOWN_RECONSTRUCTIONS).round().astype(int)
    evaluation = Evaluation.from_json(accuracy.read_text("utf-8"))
    content = Report(
        title="Rainbow shapes: captions never trained on",
        generated_at=datetime.now(UTC),
        notes=[
            f"Trained on {len(datasets[0]):,} captioned pictures of shapes. Everything shown here "
            f"is for captions that were held out; for {len(captions):,} of them there is a real "
            "picture to compare with.",
            f"The dVAE alone leaves {evaluation.reconstruction:.1%} of the held-out pictures "
            "nearest to themselves; of the others, the tokens already show another picture.",
        ],
        stages=[StageSummary.of(record) for record in artefact.manifest.stages],
        curves=read_curves(Paths(root).output_data / "metrics.jsonl"),
        codebooks=codebook_usage(artefact.dvae, held_out),
        reconstructions=reconstructions(artefact.dvae, held_out[shown]),
        generated=rows,
        ranked_by=_ranked_by(replies),
        accuracy=evaluation.accuracies(),
        retrieval=None if artefact.clip is None else retrieval(artefact, held_out, captions),
        datasets=[DatasetSummary.of(each) for each in datasets],
        hyperparameters=hyperparameters,
    )
    write_report(content, report)


def draw_sheet(captions: Sequence[str], columns: Sequence[Sequence[Pixels]]) -> Pixels:
    """A contact sheet with a column for each caption: its real picture above its generated ones.

    columns: uint8 [S, S, 3] each, all of one size, real first, then best first.
    """
    height, width = columns[0][0].shape[:2]
    scale = max(1, CELL_PIXELS // width)
    padding = 12
    depth = max(len(column) for column in columns)
    blank = np.full((height, width, 3), 255, dtype=np.uint8)
    rows = [
        [column[row] if row < len(column) else blank for column in columns] for row in range(depth)
    ]
    pictures = contact_sheet(rows, padding=padding, scale=scale)

    font = ImageFont.load_default(FONT_PIXELS)
    cell = scale * width + padding
    letters = max(8, int(cell / (0.55 * FONT_PIXELS)))
    texts = [textwrap.fill(caption, letters) for caption in captions]
    line_pixels = FONT_PIXELS + 4
    band = padding + line_pixels * max(text.count("\n") + 1 for text in texts)
    margin = 5 * FONT_PIXELS
    sheet = Image.new("RGB", (margin + pictures.shape[1], band + pictures.shape[0]), "white")
    sheet.paste(Image.fromarray(pictures), (margin, band))
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(texts):
        left = margin + padding + number * cell
        pen.multiline_text((left, padding), text, fill="black", font=font, spacing=4)
    for row in range(depth):
        middle = band + padding + row * (scale * height + padding) + scale * height // 2
        label = "real" if row == 0 else f"rank {row}"
        pen.text((padding, middle), label, fill="black", font=font, anchor="lm")
    return np.asarray(sheet)


def _read(root: Path, data: Path) -> tuple[Artefact, GroundTruth]:
    artefact = artefacts.load(Paths(root).model)
    assert artefact.dvae is not None, "the demo trains all stages"
    return artefact, read_ground_truth(data, artefact.dvae.config.image_size)


def _replies(directory: Path) -> list[dict[str, Any]]:
    replies: list[dict[str, Any]] = json.loads((directory / "replies.json").read_text("utf-8"))
    return replies


def _ranked_by(directory: Path) -> str:
    return str(_replies(directory)[0]["ranked_by"])


def _read_replies(directory: Path, truth: GroundTruth) -> list[Generated]:
    """The served pictures beside the real ones, each held against all real pictures."""
    rows = []
    for reply in _replies(directory):
        files = [directory / each["file"] for each in reply["images"]]
        images = [np.asarray(decode_image(file.read_bytes(), what=file.name)) for file in files]
        nearest = truth.nearest(torch.stack([to_chw(image.copy()) for image in images]))
        own = truth.own(reply["caption"])
        score = "clip_score" if reply["ranked_by"] == "clip" else "log_likelihood"
        rows.append(
            Generated(
                caption=reply["caption"],
                images=images,
                scores=[each[score] for each in reply["images"]],
                actual=truth.images([min(own)])[0].permute(1, 2, 0).numpy(),
                is_right=[number in own for number in nearest.tolist()],
            )
        )
    return rows
