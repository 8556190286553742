"""The data and models of one job: opened from its channels, kept as an artefact.

Knows channels, sizes and components; the stages' losses are in `training.stages`, their order and
checkpoints in `training.worker`.
"""

from __future__ import annotations

import logging
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dalle import artefact as artefacts
from dalle.artefact import Artefact, StageRecord
from dalle.clip import Clip, ClipConfig
from dalle.contract import Job
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.errors import ArtefactError, HyperparameterError
from dalle.sizes import CLIP_SIZES, DVAE_SIZES, TRANSFORMER_SIZES
from dalle.tokenizer import CaptionTokenizer
from dalle.transformer import Dalle, TransformerConfig
from training import pictures
from training.data.batches import Batches
from training.data.folder import ImageTextFolder, open_folder
from training.data.memory import decode_if_small, to_planes
from training.data.pairs import Dataset
from training.data.subset import Subset
from training.hyperparameter_fields import Hyperparameters, StageHyperparameters, StageName
from training.loop import FitResult, Stage, Stop
from training.report import DatasetSummary, Report, StageSummary, read_curves, write_report
from training.stages import ClipStage, DVAEStage, StageData, TransformerStage

logger = logging.getLogger(__name__)

VALIDATION_PAIRS = 512  # looked at in each validation
REPORT_CAPTIONS = 8
REPORT_CANDIDATES = 16

Config = TypeVar("Config", DVAEConfig, TransformerConfig, ClipConfig)


def open_workshop(
    job: Job, hyperparameters: Hyperparameters, device: torch.device, stop: Stop
) -> Workshop:
    """Read the job's channels; see `Workshop`. Raises DataError, ArtefactError."""
    return Workshop(job, hyperparameters, device, stop)


class Workshop:
    """What `training.worker` builds its stages from and hands its models to."""

    def __init__(
        self, job: Job, hyperparameters: Hyperparameters, device: torch.device, stop: Stop
    ) -> None:
        self._job = job
        self._hyperparameters = hyperparameters
        self._device = device
        self._stop = stop
        self._artefact = _read_inputs(job, device)
        self._artefact.manifest.licence = hyperparameters.licence or self._artefact.manifest.licence
        self._train = decode_if_small(self._open("train"))
        self._validation: Dataset | None = None
        if "validation" in job.channels:
            held_out = Subset(self._open("validation"), VALIDATION_PAIRS)
            self._validation = decode_if_small(held_out)

    @property
    def present(self) -> set[StageName]:
        """Stages whose component the input channels brought along."""
        names: tuple[StageName, ...] = ("dvae", "transformer", "clip")
        return {name for name in names if getattr(self._artefact, name) is not None}

    def build(self, name: StageName) -> Stage | None:
        """A stage with its untrained model."""
        if self._stop.is_set():
            return None
        torch.manual_seed(self._hyperparameters.seed)
        settings = self._hyperparameters.of(name)
        match name:
            case "dvae":
                dvae = DiscreteVAE(self._dvae_config()).to(self._device)
                return DVAEStage(dvae, self._data(settings, None))
            case "transformer":
                trained = self._artefact.dvae
                assert trained is not None, "the worker orders the stages"
                tokenizer = self._tokenizer()
                model = Dalle(self._transformer_config(trained, tokenizer)).to(self._device)
                return TransformerStage(model, trained, self._data(settings, tokenizer))
            case "clip":
                tokenizer = self._tokenizer()
                clip = Clip(self._clip_config(tokenizer)).to(self._device)
                return ClipStage(clip, self._data(settings, tokenizer))

    def keep(self, stage: Stage, result: FitResult) -> None:
        """Take a trained model over, frozen, and record how it came about."""
        model = stage.model.eval().requires_grad_(False)
        setattr(self._artefact, stage.name, model)
        record = StageRecord(
            stage=stage.name,
            job_name=self._job.job_name,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            steps=result.step,
            is_finished=result.is_finished,
            wall_seconds=result.seconds,
            cpu_seconds=result.cpu_seconds,
            hyperparameters=self._hyperparameters.of(stage.name).model_dump(mode="json"),
            metrics=result.validation,
            dataset_fingerprint=self._train.fingerprint,
            dataset_counts={"train": len(self._train)}
            | ({} if self._validation is None else {"validation": len(self._validation)}),
        )
        self._artefact.manifest.stages.append(record)

    def finish(self) -> None:
        """Write the artefact, and the report unless a stop was asked for."""
        if not self._artefact.components():
            logger.warning("stopped before there was a model to write")
            return
        artefacts.save(self._job.paths.model, self._artefact, git_revision=self._job.git_revision)
        logger.info("wrote %s to %s", ", ".join(self._artefact.components()), self._job.paths.model)
        if not self._stop.is_set():
            path = self._job.paths.output_data / "report.html"
            write_report(self._report(), path)
            logger.info("wrote %s", path)

    def _open(self, channel: str) -> ImageTextFolder:
        return open_folder(
            self._job.channels[channel].directory,
            image_size=self._image_size(),
            channel=channel,
            max_bad_share=self._hyperparameters.max_bad_share,
        )

    def _image_size(self) -> int:
        dvae = self._artefact.dvae
        return dvae.config.image_size if dvae is not None else self._dvae_config().image_size

    def _data(
        self, settings: StageHyperparameters, tokenizer: CaptionTokenizer | None
    ) -> StageData:
        workers = self._hyperparameters.num_workers
        train = Batches(
            self._train,
            batch_size=settings.batch_size,
            seed=self._hyperparameters.seed,
            tokenizer=tokenizer,
            num_workers=workers,
        )
        validation = None
        if self._validation is not None:
            validation = Batches(
                self._validation,
                batch_size=min(settings.batch_size, len(self._validation)),
                seed=self._hyperparameters.seed,
                tokenizer=tokenizer,
                shuffle=False,
                num_workers=workers,
            )
        return StageData(train, validation, self._device)

    def _tokenizer(self) -> CaptionTokenizer:
        """The artefact's, or a new one learned from the training captions."""
        if self._artefact.tokenizer is None:
            captions = (c for i in range(len(self._train)) for c in self._train.captions(i))
            settings = self._hyperparameters
            self._artefact.tokenizer = CaptionTokenizer.train(
                captions,
                kind=settings.tokenizer_kind,
                vocab_size=settings.tokenizer_vocab_size,
                text_length=settings.text_length,
            )
        return self._artefact.tokenizer

    def _dvae_config(self) -> DVAEConfig:
        settings = self._hyperparameters.dvae
        return _config("dvae", DVAEConfig, DVAE_SIZES[settings.size] | settings.overrides())

    def _transformer_config(
        self, dvae: DiscreteVAE, tokenizer: CaptionTokenizer
    ) -> TransformerConfig:
        settings = self._hyperparameters.transformer
        known = {
            "text_vocab_size": tokenizer.vocab_size,
            "text_length": tokenizer.text_length,
            "grid_size": dvae.config.grid_size,
            "codebook_size": dvae.config.codebook_size,
            "num_codebooks": dvae.config.num_codebooks,
        }
        values = TRANSFORMER_SIZES[settings.size] | settings.overrides() | known
        return _config("transformer", TransformerConfig, values)

    def _clip_config(self, tokenizer: CaptionTokenizer) -> ClipConfig:
        settings = self._hyperparameters.clip
        known = {
            "image_size": self._train.image_size,
            # An end mark above all of the tokenizer's ids, and room for it behind the caption.
            "text_vocab_size": tokenizer.vocab_size + 1,
            "text_length": tokenizer.text_length + 1,
        }
        values = CLIP_SIZES[settings.size] | settings.overrides() | known
        return _config("clip", ClipConfig, values)

    def _report(self) -> Report:
        artefact, metrics = self._artefact, self._job.paths.output_data / "metrics.jsonl"
        shown = self._train if self._validation is None else self._validation
        images = _images(shown, VALIDATION_PAIRS)
        captions = [shown.captions(i)[0] for i in range(min(len(shown), VALIDATION_PAIRS))]
        can_draw = artefact.dvae is not None and artefact.transformer is not None
        datasets = [self._train] if self._validation is None else [self._train, self._validation]
        return Report(
            title=f"Training job {self._job.job_name}",
            generated_at=datetime.now(UTC),
            stages=[
                StageSummary(
                    name=record.stage,
                    steps=record.steps,
                    wall_seconds=record.wall_seconds,
                    cpu_seconds=record.cpu_seconds,
                    metrics=record.metrics,
                )
                for record in artefact.manifest.stages
            ],
            curves=read_curves(metrics),
            codebooks=[]
            if artefact.dvae is None
            else pictures.codebook_usage(artefact.dvae, images),
            reconstructions=None
            if artefact.dvae is None
            else pictures.reconstructions(artefact.dvae, images[:16]),
            generated=pictures.generated(
                artefact,
                captions[:REPORT_CAPTIONS],
                images[:REPORT_CAPTIONS],
                num_candidates=REPORT_CANDIDATES,
                num_images=4,
                seed=self._hyperparameters.seed,
                stop=self._stop.is_set,
            )
            if can_draw
            else [],
            ranked_by="log_likelihood" if artefact.clip is None else "clip",
            retrieval=None
            if artefact.clip is None
            else pictures.retrieval(artefact, images, captions),
            datasets=[DatasetSummary.of(each) for each in datasets],
            hyperparameters=self._job.hyperparameters,
        )


def _read_inputs(job: Job, device: torch.device) -> Artefact:
    """The artefact of the channels `artefact` and `clip`; an empty one without them."""
    artefact = Artefact()
    if "artefact" in job.channels:
        with tempfile.TemporaryDirectory() as scratch:
            directory = artefacts.locate(job.channels["artefact"].directory, Path(scratch))
            artefact = artefacts.load(directory, device)
    if "clip" in job.channels:
        if artefact.clip is not None:
            raise ArtefactError("the channels artefact and clip both bring a CLIP; leave one out")
        directory = job.channels["clip"].directory
        files = sorted(path for path in directory.iterdir() if path.suffix in (".pt", ".pth"))
        if len(files) != 1:
            raise ArtefactError(
                f"the channel clip must hold one OpenAI checkpoint (.pt), found "
                f"{[path.name for path in files]}"
            )
        artefact.clip = Clip.from_openai(files[0]).requires_grad_(False).to(device)
    return artefact


def _config(stage: StageName, kind: type[Config], values: dict[str, Any]) -> Config:
    """A config object, its refusals told in terms of the stage's hyperparameters."""
    try:
        return kind(**values)
    except ValueError as error:
        raise HyperparameterError(f"{stage}: {error}") from error


def _images(dataset: Dataset, most: int) -> Tensor:
    """The first images of a data set, uint8 [B, 3, S, S]."""
    count = min(len(dataset), most)
    return torch.stack([to_planes(dataset.image(index)) for index in range(count)])
