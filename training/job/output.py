"""Output of a job: the artefact with the trained models, and the report."""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

from dalle import artefact as artefacts
from dalle.errors import ArtefactError
from dalle.manifest import Manifest, StageRecord, read_manifest
from dalle.types import COMPONENTS, STAGES, StageName
from training.data.batching.preload import first_usable
from training.evaluate.choose_sampling import MOST_CAPTIONS, choose_sampling
from training.job.inputs import Inputs
from training.job.overfitting import overfitting
from training.loop.interface import FitResult, Stage
from training.report.job import build_report
from training.report.page import write_report
from training.stopping import Stopped

logger = logging.getLogger(__name__)

EXAMPLE_CAPTIONS = 4
"""Captions in the manifest of a model that generates images."""
SAMPLING_SHARE = 0.02
"""Of the seconds that the stages took, or that the whole job may take, in which sampling settings
are chosen."""
SAMPLING_SECONDS = (10.0, 60.0)
"""The fewest and the most."""


class Output:
    """The model directory and the report of a job; only the first rank writes.

    The artefact begins with the components of the input channels. The model of an earlier run in
    the model directory stays until there is one that has all of its components, as far trained.
    """

    def __init__(self, inputs: Inputs, names: Collection[StageName] = ()) -> None:
        """names: the stages to train. Raises ArtefactError when the artefact could never replace
        the one in the model directory, for want of components, or as it has the published model
        that one of them was trained on from; PlatformError."""
        self._inputs = inputs
        self._is_saved = False
        self._trained: set[StageName] = set()
        self._trained_seconds = 0.0
        self._earlier = Manifest()
        if inputs.ranks.is_first:
            self._earlier = _read_earlier(inputs.job.paths.model)
            left_out = {*self._lost()} - {*names}
            if left_out - {"tokenizer"}:
                raise ArtefactError(
                    f"{inputs.job.paths.model} holds an earlier model with "
                    f"{', '.join(sorted(left_out))}, which this job neither trains nor finds, as "
                    "far trained, in its channels, and would lose; move it away, or give it as the "
                    "channel artefact"
                )
        manifest = inputs.artefact.manifest
        manifest.licence = inputs.hyperparameters.licence or manifest.licence

    def keep(self, stage: Stage, result: FitResult) -> None:
        """Add a stage's trained model, frozen, and its record to the artefact, and write it."""
        inputs, artefact = self._inputs, self._inputs.artefact
        setattr(artefact, stage.name, stage.model.eval().requires_grad_(False))
        notes = self._notes(stage, result)
        artefact.manifest.sampling = None  # of the models before, by which it was chosen
        self._trained.add(stage.name)
        self._trained_seconds += result.seconds
        record = StageRecord(
            stage=stage.name,
            job_name=inputs.job.job_name,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            steps=result.step,
            is_finished=result.is_finished,
            wall_seconds=result.seconds,
            cpu_seconds=result.cpu_seconds,
            hyperparameters=inputs.hyperparameters.of(stage.name).model_dump(mode="json"),
            metrics=result.validation,
            kept_step=result.kept_step if result.kept_step < result.step else None,
            notes=notes,
            dataset_fingerprint=inputs.train.totals.fingerprint,
            dataset_counts={
                each.pairs.channel: each.totals.num_pairs
                for each in (inputs.train, inputs.validation)
                if each is not None
            },
            trained_on_from=stage.identity().get("trained_on_from", ""),
        )
        artefact.manifest.stages.append(record)
        if not inputs.trains_on(stage.name):
            artefact.manifest.imported.pop(stage.name, None)
        if stage.name == "transformer":
            pairs = (inputs.validation or inputs.train).pairs
            number = min(EXAMPLE_CAPTIONS, len(pairs))
            artefact.manifest.captions = [
                pairs.captions(index * len(pairs) // number)[0] for index in range(number)
            ]
        self._save()

    def _notes(self, stage: Stage, result: FitResult) -> list[str]:
        """Return sentences on how a stage's training went, and log them as warnings."""
        sentence = overfitting(stage.name, result, self._inputs.config(stage.name))
        if sentence and self._inputs.ranks.is_first:
            logger.warning("%s", sentence)
        return [sentence] if sentence else []

    def finish(self) -> None:
        """Write the artefact if `keep` has not, and the report."""
        inputs = self._inputs
        if not inputs.ranks.is_first:
            return
        if not inputs.artefact.components():
            logger.warning("stopped before there was a model to write")
            return
        if not self._is_saved:
            self._save()  # of the input channels alone
        self._choose_sampling()
        report = build_report(
            inputs.artefact,
            inputs.job,
            inputs.train,
            inputs.validation,
            seed=inputs.hyperparameters.seed,
            stop=inputs.stop,
        )
        path = inputs.job.paths.output_data / "report.html"
        write_report(report, path)
        logger.info("wrote %s", path)

    def _choose_sampling(self) -> None:
        """Choose how `serve` samples, on held-out pairs, and add it to the written artefact."""
        inputs, artefact = self._inputs, self._inputs.artefact
        is_whole = {*STAGES} <= {*artefact.components()}
        if not (self._is_saved and is_whole and self._trained & {"transformer", "clip"}):
            return
        if inputs.validation is None:
            logger.info("sampling: temperature 1; without held-out pairs no other is chosen")
            return
        lowest, highest = SAMPLING_SECONDS
        seconds = min(highest, max(lowest, SAMPLING_SHARE * self._trained_seconds))
        if (minutes := inputs.hyperparameters.job_minutes) is not None:
            seconds = min(seconds, SAMPLING_SHARE * 60 * minutes)
        try:
            images, captions = first_usable(inputs.validation.pairs, MOST_CAPTIONS, inputs.stop)
            chosen = choose_sampling(
                artefact,
                captions,
                images,
                guidance=artefact.require("transformer").config.caption_dropout > 0,
                seconds=seconds,
                seed=inputs.hyperparameters.seed,
                stop=inputs.stop,
            )
        except Stopped:
            return
        if chosen is not None:
            artefact.manifest.sampling = chosen
            artefacts.save_manifest(inputs.job.paths.model, artefact)

    def _save(self) -> None:
        if not self._inputs.ranks.is_first:
            return
        if missing := self._lost():
            logger.info(
                "the earlier model in %s stays: this job has not finished %s",
                self._inputs.job.paths.model,
                ", ".join(missing),
            )
            return
        job, artefact = self._inputs.job, self._inputs.artefact
        artefacts.save(job.paths.model, artefact, git_revision=job.git_revision)
        logger.info("wrote %s to %s", ", ".join(artefact.components()), job.paths.model)
        self._is_saved, self._earlier = True, Manifest()

    def _lost(self) -> list[str]:
        """Return the earlier model's components that the artefact lacks or has less finished.

        One without a record is as it was published, less than one that a job trained.
        """
        artefact, earlier = self._inputs.artefact, self._earlier
        kept = {*artefact.components()} - (_finished(earlier) - _finished(artefact.manifest))
        return [name for name in COMPONENTS if name in earlier.components() - kept]


def _finished(manifest: Manifest) -> set[str]:
    return {name for name, each in manifest.newest_records().items() if each.is_finished}


def _read_earlier(directory: Path) -> Manifest:
    """Return the manifest of the model that an earlier run left; an empty one without any."""
    artefacts.restore(directory)
    try:
        return read_manifest(directory)
    except ArtefactError:
        return Manifest()
