"""The end of the demo: caption accuracy, one HTML report and a contact sheet.

Knows nothing of processes and of the reuse of steps.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dalle.platform.environment import Paths
from dalle.preprocess.images import Pixels, contact_sheet, decode_image, encode_image
from training.data.batching.preload import to_chw
from training.data.sources.channel import open_channel
from training.demo.run import CHANNELS, RainbowRun
from training.evaluate.ground_truth import GroundTruth
from training.evaluate.pixels import CLOSE
from training.evaluate.scores import ALL, GREEDY, Evaluation, evaluate, render_table
from training.report.content import DatasetSummary, Generated, Report, read_curves
from training.report.page import write_report
from training.report.samples import codebook_usage, reconstructions, retrieval

PILOT_CAPTIONS = 256  # evaluated first, to measure the speed of the machine
EVALUATION_SECONDS = 100.0
SHOWN_RECONSTRUCTIONS = 12
CELL_PIXELS = 128  # width of an image in the contact sheet
FONT_PIXELS = 12


def measure_accuracy(run: RainbowRun, limit: int | None) -> None:
    """Evaluate the run's artefact greedily; write `accuracy.json` and print the table.

    limit: captions to evaluate; None: as many as this machine manages in `EVALUATION_SECONDS`.
    """
    artefact, truth = run.read()
    if limit is None and len(truth.held_out) > PILOT_CAPTIONS:
        began = time.monotonic()
        evaluate(artefact, truth, greedy_only=True, limit=PILOT_CAPTIONS)
        seconds_each = (time.monotonic() - began) / PILOT_CAPTIONS
        limit = max(PILOT_CAPTIONS, int(EVALUATION_SECONDS / seconds_each))
    evaluation = evaluate(artefact, truth, greedy_only=True, limit=limit)
    print(render_table(evaluation))
    (run.out / "accuracy.json").write_text(evaluation.to_json() + "\n", encoding="utf-8")


def write_demo_report(run: RainbowRun) -> None:
    """Write `report.html` and `contact_sheet.png` from the files of the other steps.

    Reads `accuracy.json`, and `generated/` with `replies.json` and the images of `serve`.
    """
    artefact, truth = run.read()
    dvae = artefact.require("dvae")
    size = dvae.config.image_size
    generated = run.out / "generated"
    replies = json.loads((generated / "replies.json").read_text("utf-8"))
    rows = [_row(reply, generated, truth) for reply in replies]
    columns = [[row.actual, *row.images] for row in rows if row.actual is not None]
    sheet = caption_sheet([row.caption for row in rows], columns)
    (run.out / "contact_sheet.png").write_bytes(encode_image(sheet, "png"))
    train, validation = (open_channel(run.data / name, image_size=size) for name in CHANNELS)
    held_out = torch.stack([to_chw(validation.image(row)) for row in range(len(validation))])
    captions = [validation.captions(row)[0] for row in range(len(validation))]
    shown = np.linspace(0, len(held_out) - 1, SHOWN_RECONSTRUCTIONS).round().astype(int)
    evaluation = Evaluation.from_json((run.out / "accuracy.json").read_text("utf-8"))
    content = Report(
        title="Rainbow shapes: captions never trained on",
        generated_at=datetime.now(UTC),
        notes=[
            f"Trained on {len(train):,} captioned images of shapes. Everything shown here "
            f"is for captions that were held out; for {len(captions):,} of them there is a real "
            "image to compare with.",
            f"The dVAE alone leaves {evaluation.reconstruction:.1%} of the held-out images "
            "nearest to themselves; of the others, the tokens already show another image. In "
            f"{evaluation.reconstruction_pixels.close:.1%} of them no value of any pixel is off by "
            f"more than {CLOSE} of 255; of the images that are generated greedily, in "
            f"{evaluation.scores[ALL][GREEDY].pixels.close:.1%}.",
        ],
        stages=artefact.manifest.stages,
        curves=read_curves(Paths(run.root).output_data / "metrics.jsonl"),
        codebooks=codebook_usage(dvae, held_out),
        reconstructions=reconstructions(dvae, held_out[shown]),
        generated=rows,
        ranked_by=replies[0]["ranked_by"],
        accuracy=evaluation.accuracies(),
        retrieval=None if artefact.clip is None else retrieval(artefact, held_out, captions),
        datasets=[DatasetSummary.of(each) for each in (train, validation)],
        hyperparameters=run.recipe,
    )
    write_report(content, run.out / "report.html")


def caption_sheet(captions: Sequence[str], columns: Sequence[Sequence[Pixels]]) -> Pixels:
    """Return a sheet with a column for each caption: its real image above the generated ones.

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
    images = contact_sheet(rows, padding=padding, scale=scale)

    font = ImageFont.load_default(FONT_PIXELS)
    cell = scale * width + padding
    letters = max(8, int(cell / (0.55 * FONT_PIXELS)))
    texts = [textwrap.fill(caption, letters) for caption in captions]
    line_pixels = FONT_PIXELS + 4
    band = padding + line_pixels * max(text.count("\n") + 1 for text in texts)
    margin = 5 * FONT_PIXELS
    sheet = Image.new("RGB", (margin + images.shape[1], band + images.shape[0]), "white")
    sheet.paste(Image.fromarray(images), (margin, band))
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(texts):
        left = margin + padding + number * cell
        pen.multiline_text((left, padding), text, fill="black", font=font, spacing=4)
    for row in range(depth):
        middle = band + padding + row * (scale * height + padding) + scale * height // 2
        label = "real" if row == 0 else f"rank {row}"
        pen.text((padding, middle), label, fill="black", font=font, anchor="lm")
    return np.asarray(sheet)


def _row(reply: dict[str, Any], directory: Path, truth: GroundTruth) -> Generated:
    """The images of one reply beside the real one, each compared with all real images."""
    files = [directory / each["file"] for each in reply["images"]]
    images = [np.asarray(decode_image(file.read_bytes(), what=file.name)) for file in files]
    nearest = truth.nearest(torch.stack([to_chw(image.copy()) for image in images]))
    own = truth.own(reply["caption"])
    score = "clip_score" if reply["ranked_by"] == "clip" else "log_likelihood"
    return Generated(
        caption=reply["caption"],
        images=images,
        scores=[each[score] for each in reply["images"]],
        actual=truth.images([min(own)])[0].permute(1, 2, 0).numpy(),
        is_right=[number in own for number in nearest.tolist()],
    )
