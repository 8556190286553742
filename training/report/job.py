"""The report of a training job: images, figures and notes of its models and data.

Knows nothing of HTML: `training.report.page` lays out the report.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime

from dalle.artefact import Artefact
from dalle.platform.environment import Job
from dalle.types import ComponentName
from training.data.batching.preload import first_usable
from training.data.open import OpenedChannel
from training.report import samples
from training.report.content import DatasetSummary, Report, read_curves
from training.stopping import Stop

SHOWN_PAIRS = 512  # for reconstructions, codebook usage and retrieval
SHOWN_RECONSTRUCTIONS = 16
CAPTIONS = 8
CANDIDATES, IMAGES = 16, 4  # of each caption: generated, and shown


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

    Raises DataError when not one image can be decoded; Stopped.
    """
    shown = train if validation is None else validation
    images, captions = first_usable(shown.pairs, SHOWN_PAIRS, stop)
    report = Report(
        title=f"Training job {job.job_name}",
        generated_at=datetime.now(UTC),
        notes=[_which_pairs(shown, len(images), validation is not None), *unfinished(artefact)],
        stages=artefact.manifest.stages,
        curves=read_curves(job.paths.output_data / "metrics.jsonl"),
        ranked_by="log_likelihood" if artefact.clip is None else "clip",
        datasets=[
            DatasetSummary.of(each.pairs, each.totals)
            for each in (train, validation)
            if each is not None
        ],
        hyperparameters=job.hyperparameters,
    )
    dvae = artefact.dvae
    if dvae is not None:
        codebooks = samples.codebook_usage(dvae, images, stop)
        again = samples.reconstructions(dvae, images[:SHOWN_RECONSTRUCTIONS], stop)
        report = replace(report, codebooks=codebooks, reconstructions=again)
    if dvae is not None and artefact.transformer is not None:
        generated = samples.generate_best(
            artefact,
            captions[:CAPTIONS],
            images[:CAPTIONS],
            num_candidates=CANDIDATES,
            num_images=IMAGES,
            seed=seed,
            stop=stop,
        )
        report = replace(report, generated=generated)
    if artefact.clip is not None:
        retrieval = samples.retrieval(artefact, images, captions, stop)
        report = replace(report, retrieval=retrieval)
    return report


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
