"""The report of a training job: images, figures and notes of its models and data.

Knows nothing of HTML: `training.report.page` lays out the report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from dalle.artefact import Artefact
from dalle.manifest import StageRecord
from dalle.platform.environment import Job
from dalle.types import ComponentName
from training.data.batching.preload import first_usable
from training.data.open import OpenedChannel
from training.data.pairs import Dataset
from training.report import samples
from training.report.content import DatasetSummary, Report, read_curves
from training.report.nearest import TrainingPictures
from training.stopping import DelayedStop, Stop, Stopped

SHOWN_PAIRS = 512  # for reconstructions, codebook usage and retrieval
SHOWN_RECONSTRUCTIONS = 16
CAPTIONS = 8
CANDIDATES, IMAGES = 16, 4  # of each caption: generated, and shown
MEMORISATION_CAPTIONS = 64  # one image each
STOPPED_SECONDS = 5.0  # for images and figures after a stop; the whole job has 20


def build_report(
    artefact: Artefact,
    job: Job,
    train: OpenedChannel,
    validation: OpenedChannel | None,
    *,
    seed: int,
    stop: Stop,
) -> Report:
    """Build the report on held-out pairs, or on training pairs where there are none.

    After a stop the images and figures are left out, and named, that are not computed within
    `STOPPED_SECONDS`. Raises DataError when not one image can be decoded.
    """
    shown = train if validation is None else validation
    report = Report(
        title=f"Training job {job.job_name}",
        generated_at=datetime.now(UTC),
        stages=artefact.manifest.stages,
        curves=read_curves(job.paths.output_data / "metrics.jsonl"),
        sampling=artefact.manifest.sampling,
        ranked_by="log_likelihood" if artefact.clip is None else "clip",
        datasets=[
            DatasetSummary.of(each.pairs, each.totals)
            for each in (train, validation)
            if each is not None
        ],
        hyperparameters=job.hyperparameters,
    )
    latest = DelayedStop(stop, STOPPED_SECONDS)
    notes: list[str] = []
    left_out = []
    try:
        images, captions = first_usable(shown.pairs, SHOWN_PAIRS, latest)
    except Stopped:
        left_out = ["images", "codebook usage", "retrieval", "memorisation"]
    else:
        notes.append(_which_pairs(shown, len(images), validation is not None))
        parts = _parts(artefact, train.pairs, images, captions, seed, latest)
        for name, compute in parts.items():
            try:
                report = replace(report, **compute())
            except Stopped:
                left_out.append(name)
    notes += unfinished(artefact)
    notes += [f"{note}." for each in _records(artefact) for note in each.notes]
    if left_out:
        notes.append(f"The job was stopped: this report lacks {', '.join(left_out)}.")
    return replace(report, notes=notes)


def _parts(
    artefact: Artefact,
    train: Dataset,
    images: Tensor,
    captions: Sequence[str],
    seed: int,
    stop: Stop,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return name -> function that computes fields of the report, or raises Stopped."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    dvae = artefact.dvae
    if dvae is not None:
        parts["reconstructions"] = lambda: {
            "reconstructions": samples.reconstructions(dvae, images[:SHOWN_RECONSTRUCTIONS], stop)
        }
        parts["codebook usage"] = lambda: {
            "codebooks": samples.codebook_usage(dvae, images, stop),
        }
    if dvae is not None and artefact.transformer is not None:
        parts["generated images"] = lambda: {
            "generated": samples.generate_best(
                artefact,
                captions[:CAPTIONS],
                images[:CAPTIONS],
                num_candidates=CANDIDATES,
                num_images=IMAGES,
                seed=seed,
                training=TrainingPictures(train, stop),
                stop=stop,
            )
        }
        parts["memorisation"] = lambda: {
            "memorisation": samples.memorisation(
                artefact,
                captions[:MEMORISATION_CAPTIONS],
                images[:MEMORISATION_CAPTIONS],
                TrainingPictures(train, stop),
                seed=seed,
                stop=stop,
            )
        }
    if artefact.clip is not None:
        parts["retrieval"] = lambda: {
            "retrieval": samples.retrieval(artefact, images, captions, stop)
        }
    return parts


def unfinished(artefact: Artefact, besides: Collection[ComponentName] = ()) -> list[str]:
    """Return a sentence for each component whose training was stopped, and how to go on with it.

    besides: components to leave out, since they are trained anew.
    """
    return [
        f"The training of {name} was stopped at step {record.steps:,}, before its budget was "
        f"spent; it is used as it was then. To train it to its end, run the job "
        f"{record.job_name} again with its hyperparameters, channels and checkpoints."
        for name, record in artefact.manifest.newest_records().items()
        if name in artefact.components() and name not in besides and not record.is_finished
    ]


def _records(artefact: Artefact) -> list[StageRecord]:
    """Return the records of the components that the artefact has."""
    newest = artefact.manifest.newest_records()
    return [record for name, record in newest.items() if name in artefact.components()]


def _which_pairs(shown: OpenedChannel, num_pairs: int, is_held_out: bool) -> str:
    part = "" if shown.part is None else "the first host's part of "
    channel = f"{part}the channel {shown.pairs.channel}"
    what = f"Images, codebook usage and retrieval are of {num_pairs:,} pairs of {channel}"
    if is_held_out:
        return f"{what}, which this job did not train on."
    return (
        f"{what}, which was trained on: without the channel validation, this report cannot show "
        "how the models do with other captions and images."
    )
