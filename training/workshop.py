"""The data and models of one job: opened from its channels, kept as an artefact.

Knows channels, sizes and components; the stages' losses are in `training.stages`, their order and
checkpoints in `training.worker`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

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
from training.data.memory import decode_if_small, first_usable
from training.data.pairs import Dataset
from training.data.subset import Subset
from training.engine import check_precision
from training.hyperparameter_fields import Hyperparameters, StageHyperparameters, StageName
from training.loop import FitResult, Stage, Stop
from training.report import DatasetSummary, Report, StageSummary, read_curves, write_report
from training.stages import ClipStage, DVAEStage, StageData, TransformerStage

logger = logging.getLogger(__name__)

VALIDATION_PAIRS = 512  # looked at in each validation
REPORT_CAPTIONS = 8
REPORT_CANDIDATES = 16


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
        self._is_saved = False
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

    def check(self, names: Sequence[StageName]) -> None:
        """Find what is wrong with the stages before any of them is trained.

        Raises HyperparameterError with everything that does not fit, CaptionTooLong.
        """
        problems: list[str] = []
        for name in names:
            try:
                check_precision(self._hyperparameters.of(name), self._device)
            except HyperparameterError as error:
                problems.append(f"{name}: {error}")
            try:
                self._config(name)
            except HyperparameterError as error:
                problems.append(str(error))
        if "clip" in names and "clip" in self._job.channels:
            problems.append(
                "stage=clip trains a CLIP and the channel clip brings one; leave one of them out"
            )
        if problems:
            raise HyperparameterError("\n".join(problems))
        if set(names) - {"dvae"}:
            tokenizer = self._tokenizer()
            for dataset in filter(None, (self._train, self._validation)):
                for index in range(len(dataset)):
                    tokenizer.encode(dataset.captions(index))

    def build(self, name: StageName) -> Stage | None:
        """A stage with its untrained model."""
        if self._stop.is_set():
            return None
        torch.manual_seed(self._hyperparameters.seed)
        settings = self._hyperparameters.of(name)
        match self._config(name):
            case DVAEConfig() as config:
                dvae = DiscreteVAE(config).to(self._device)
                return DVAEStage(dvae, self._data(settings, None))
            case TransformerConfig() as config:
                trained = self._artefact.dvae
                assert trained is not None, "the worker orders the stages"
                model = Dalle(config).to(self._device)
                return TransformerStage(model, trained, self._data(settings, self._tokenizer()))
            case ClipConfig() as config:
                clip = Clip(config).to(self._device)
                return ClipStage(clip, self._data(settings, self._tokenizer()))

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
        self._save()

    def finish(self) -> None:
        """Write the artefact, and the report unless a stop was asked for."""
        if not self._artefact.components():
            logger.warning("stopped before there was a model to write")
            return
        if not self._is_saved:
            self._save()  # of the input channels alone
        if not self._stop.is_set():
            path = self._job.paths.output_data / "report.html"
            write_report(self._report(), path)
            logger.info("wrote %s", path)

    def _save(self) -> None:
        artefacts.save(self._job.paths.model, self._artefact, git_revision=self._job.git_revision)
        logger.info("wrote %s to %s", ", ".join(self._artefact.components()), self._job.paths.model)
        self._is_saved = True

    def _open(self, channel: str) -> ImageTextFolder:
        return open_folder(
            self._job.channels[channel].directory,
            image_size=self._dvae_config().image_size,
            channel=channel,
            max_bad_share=self._hyperparameters.max_bad_share,
        )

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
                last="keep",
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

    def _config(self, name: StageName) -> DVAEConfig | TransformerConfig | ClipConfig:
        """What a stage's model will be. Raises HyperparameterError when that cannot be built."""
        overrides = self._hyperparameters.of(name).overrides()
        size = self._hyperparameters.of(name).size
        try:
            match name:
                case "dvae":
                    return DVAEConfig(**DVAE_SIZES[size] | overrides)
                case "transformer":
                    known = self._dimensions_of_tokens()
                    return TransformerConfig(**TRANSFORMER_SIZES[size] | overrides | known)
                case "clip":
                    tokenizer = self._tokenizer()
                    known = {
                        "image_size": self._train.image_size,
                        # An end mark above all ids of the tokenizer, and room for it.
                        "text_vocab_size": tokenizer.vocab_size + 1,
                        "text_length": tokenizer.text_length + 1,
                    }
                    return ClipConfig(**CLIP_SIZES[size] | overrides | known)
        except ValueError as error:
            raise HyperparameterError(f"{name}: {error}") from error

    def _dimensions_of_tokens(self) -> dict[str, int]:
        """What the transformer takes over from the tokenizer and the dVAE."""
        tokenizer, dvae = self._tokenizer(), self._dvae_config()
        return {
            "text_vocab_size": tokenizer.vocab_size,
            "text_length": tokenizer.text_length,
            "grid_size": dvae.grid_size,
            "codebook_size": dvae.codebook_size,
            "num_codebooks": dvae.num_codebooks,
        }

    def _dvae_config(self) -> DVAEConfig:
        """The artefact's, or that of the dVAE to be trained."""
        if self._artefact.dvae is not None:
            return self._artefact.dvae.config
        config = self._config("dvae")
        assert isinstance(config, DVAEConfig)
        return config

    def _report(self) -> Report:
        artefact, metrics = self._artefact, self._job.paths.output_data / "metrics.jsonl"
        shown = self._train if self._validation is None else self._validation
        images, captions = first_usable(shown, VALIDATION_PAIRS)
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
