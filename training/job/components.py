"""The data and models of one job: opened from its channels, kept as an artefact.

Knows channels, sizes and components; the stages' losses are in `training.loop.stages`, their order
and checkpoints in `training.job.trainer`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.errors import ArtefactError, HyperparameterError
from dalle.manifest import StageRecord
from dalle.models.clip import Clip, ClipConfig
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.platform.environment import Job
from dalle.preprocess.tokenizer import CaptionTokenizer
from dalle.types import ComponentName, StageName
from training.config.fields import Hyperparameters, StageHyperparameters
from training.config.models import Config, TextSizes, clip_config, dvae_config, transformer_config
from training.data.batching.batches import Batches
from training.data.batching.preload import Preloaded
from training.data.batching.token_cache import cache_tokens, tokens_fit
from training.data.open import OpenedChannel, open_data, totals_of
from training.data.pairs import Dataset
from training.data.sharded import on_all_ranks
from training.distributed.process_group import ALONE, Ranks
from training.engine.devices import check_precision, is_emulated
from training.engine.select import device_of_new
from training.loop.budget import Budget
from training.loop.checkpoints import stored_identity
from training.loop.loop import FitResult, Stage
from training.loop.stages import ClipStage, DVAEStage, StageData, TransformerStage, weights_hash
from training.report.job import build_report, unfinished
from training.report.page import write_report
from training.stopping import Stop, Stopped, unless_stopped

logger = logging.getLogger(__name__)

VALIDATION_PAIRS = 512  # looked at in each validation
EXAMPLE_CAPTIONS = 4  # kept with the model


def open_workshop(
    job: Job,
    hyperparameters: Hyperparameters,
    device: torch.device,
    stop: Stop,
    ranks: Ranks = ALONE,
) -> Workshop:
    """Read the job's channels; see `Workshop`. Raises DataError, ArtefactError; Stopped."""
    return Workshop(job, hyperparameters, device, stop, ranks)


class Workshop:
    """What `training.job.trainer` builds its stages from and hands its models to."""

    def __init__(
        self,
        job: Job,
        hyperparameters: Hyperparameters,
        device: torch.device,
        stop: Stop,
        ranks: Ranks,
    ) -> None:
        self._job = job
        self._hyperparameters = hyperparameters
        self._device = device
        self._stop = stop
        self._ranks = ranks
        self._is_saved = False
        self._artefact = _read_inputs(job, device)
        self._present = frozenset(self._artefact.components())
        self._artefact.manifest.licence = hyperparameters.licence or self._artefact.manifest.licence
        self._opened_train = self._open("train")
        self._train = self._opened_train.pairs
        self._validation: Dataset | None = None
        self._opened_validation: OpenedChannel | None = None
        if "validation" in job.channels:
            self._opened_validation = self._open("validation", VALIDATION_PAIRS)
            self._validation = self._opened_validation.pairs

    @property
    def present(self) -> frozenset[ComponentName]:
        """Components that the input channels brought along."""
        return self._present

    def check(self, names: Sequence[StageName]) -> None:
        """Find what is wrong with the stages before any of them is trained.

        Warns of components of the channel artefact whose training was stopped.
        Raises HyperparameterError with everything that does not fit, CaptionTooLong; Stopped.
        """
        if self._ranks.is_first:
            for sentence in unfinished(self._artefact, besides=names):
                logger.warning("%s", sentence)
            if any(
                is_emulated(self._hyperparameters.of(name).precision, self._device)
                for name in names
            ):
                logger.warning(
                    "precision=bf16 is slower than fp32 on this CPU, which has no instructions "
                    "for it (avx512_bf16 or amx_bf16)"
                )
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
                for index in unless_stopped(range(len(dataset)), self._stop):
                    tokenizer.encode(dataset.captions(index))

    def settle(self, names: Sequence[StageName]) -> Hyperparameters:
        """Find the batch sizes that were left open; see `training.memory.auto_batch`.

        Raises DeviceError; Stopped on every rank when one is stopped.
        """
        for name in names:
            settings = self._hyperparameters.of(name)
            if settings.batch_size != "auto":
                continue
            directory = self._job.paths.checkpoints / name
            stored = stored_identity(directory) if self._ranks.is_first else None
            batch_size = self._ranks.share((stored or {}).get("batch_size"))
            if batch_size is None:
                try:
                    share = self._find_share(name, settings)
                except Stopped:
                    share = 0  # and so all others learn of it
                shares = self._ranks.gather(torch.tensor([float(share)]))
                batch_size = int(shares.min()) * self._ranks.size
                if batch_size == 0:
                    raise Stopped
            if self._ranks.is_first:
                logger.info("%s: batch_size is %d", name, batch_size)
            settled = settings.model_copy(update={"batch_size": batch_size})
            self._hyperparameters = self._hyperparameters.model_copy(update={name: settled})
        return self._hyperparameters

    def _find_share(self, name: StageName, settings: StageHyperparameters) -> int:
        # Imported here: torch's fake tensors take seconds, which other jobs need not wait for.
        from training.memory.auto_batch import find_share
        from training.memory.estimate import Setting, StageMemory

        memory = StageMemory(
            name,
            self._config(name),
            dvae=self._dvae_config(),
            device_type="cuda" if self._device.type == "cuda" else "cpu",
        )
        setting = Setting.of(self._hyperparameters, name, num_devices=self._ranks.size)
        return find_share(
            memory,
            settings,
            setting,
            self._device,
            num_pairs=self._opened_train.totals.num_pairs,
            stop=self._stop,
        )

    def build(self, name: StageName) -> Stage | None:
        """A stage with its untrained model; None once a stop was asked for."""
        try:
            stage = self._build(name)
        except Stopped:
            return None
        return None if self._stop.is_set() else stage

    def _build(self, name: StageName) -> Stage:
        torch.manual_seed(self._hyperparameters.seed)
        settings = self._hyperparameters.of(name)
        device = device_of_new(self._hyperparameters, name, self._device)
        match self._config(name):
            case DVAEConfig() as config:
                dvae = DiscreteVAE(config).to(device)
                return DVAEStage(dvae, self._data(settings, None))
            case TransformerConfig() as config:
                trained = self._artefact.dvae
                assert trained is not None, "the worker orders the stages"
                model = Dalle(config).to(device)
                model.checkpoints_activations = settings.activation_checkpointing
                train = self._tokenised(settings, trained)
                data = self._data(settings, self._tokenizer(), train)
                return TransformerStage(model, trained, data)
            case ClipConfig() as config:
                clip = Clip(config).to(device)
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
            dataset_fingerprint=self._opened_train.totals.fingerprint,
            dataset_counts={
                each.pairs.channel: each.totals.num_pairs
                for each in (self._opened_train, self._opened_validation)
                if each is not None
            },
        )
        self._artefact.manifest.stages.append(record)
        if stage.name == "transformer":
            pairs = self._validation or self._train
            number = min(EXAMPLE_CAPTIONS, len(pairs))
            examples = [pairs.captions(index * len(pairs) // number)[0] for index in range(number)]
            self._artefact.manifest.captions = examples
        self._save()

    def finish(self) -> None:
        """Write the artefact, and the report unless a stop was asked for."""
        if not self._ranks.is_first:
            return
        if not self._artefact.components():
            logger.warning("stopped before there was a model to write")
            return
        if not self._is_saved:
            self._save()  # of the input channels alone
        try:
            report = build_report(
                self._artefact,
                self._job,
                self._opened_train,
                self._opened_validation,
                seed=self._hyperparameters.seed,
                stop=self._stop,
            )
        except Stopped:
            logger.warning("stopped: the model is written, the report is not")
            return
        path = self._job.paths.output_data / "report.html"
        write_report(report, path)
        logger.info("wrote %s", path)

    def _save(self) -> None:
        if not self._ranks.is_first:
            return
        artefacts.save(self._job.paths.model, self._artefact, git_revision=self._job.git_revision)
        logger.info("wrote %s to %s", ", ".join(self._artefact.components()), self._job.paths.model)
        self._is_saved = True

    def _open(self, name: str, most: int | None = None) -> OpenedChannel:
        return open_data(
            self._job.channels[name],
            image_size=self._dvae_config().image_size,
            max_bad_share=self._hyperparameters.max_bad_share,
            caption_key=self._hyperparameters.caption_key or None,
            ranks=self._ranks,
            num_hosts=len(self._job.hosts) if self._ranks.size > 1 else 1,
            stop=self._stop,
            most=most,
        )

    def _tokenised(self, settings: StageHyperparameters, dvae: DiscreteVAE) -> Dataset:
        """The training pairs, with image tokens if it pays to encode all of them ahead.

        That is when images are to be seen at least twice: a short run would wait for nothing.
        Raises Stopped.
        """
        part = self._opened_train.part
        num_batches = max(1, self._opened_train.totals.num_pairs // settings.pairs_per_step)
        max_steps = Budget.of(settings, num_batches).max_steps
        num_tokens = dvae.config.num_positions * dvae.config.num_codebooks
        if (
            isinstance(self._train, Preloaded)
            or max_steps is None
            or max_steps < 2 * num_batches
            or self._ranks.any(
                not tokens_fit(len(self._train), num_tokens, dvae.config.codebook_size)
            )
        ):
            return self._train
        encoded = on_all_ranks(
            self._ranks,
            lambda: cache_tokens(
                self._train,
                dvae.encode,
                directory=self._job.paths.checkpoints / "image-tokens",
                dvae_hash=weights_hash(dvae),
                codebook_size=dvae.config.codebook_size,
                device=self._device,
                num_workers=self._hyperparameters.num_workers,
                ranks=self._ranks if part is None else part.host_ranks,
                stop=self._stop,
            ),
        )
        if part is not None:
            part.share_skips(encoded.skips, encoded.max_bad_share)
        return encoded

    def _data(
        self,
        settings: StageHyperparameters,
        tokenizer: CaptionTokenizer | None,
        train_pairs: Dataset | None = None,
    ) -> StageData:
        """train_pairs: in place of the channel's, those with their image tokens."""
        workers = self._hyperparameters.num_workers
        pairs = self._train if train_pairs is None else train_pairs
        part = self._opened_train.part
        train = Batches(
            pairs,
            batch_size=settings.pairs_per_step,
            seed=self._hyperparameters.seed,
            tokenizer=tokenizer,
            num_workers=workers,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            part=part,
            totals=totals_of(pairs, part),
            stop=self._stop,
        )
        validation = None
        if self._validation is not None:
            validation = Batches(
                self._validation,
                batch_size=min(settings.pairs_per_step, len(self._validation)),
                seed=self._hyperparameters.seed,
                tokenizer=tokenizer,
                shuffle=False,
                last="keep",
                num_workers=workers,
                stop=self._stop,
            )
        held_out = self._opened_validation
        return StageData(
            train,
            validation,
            self._device,
            self._stop,
            self._ranks,
            is_validation_parted=held_out is not None and held_out.part is not None,
        )

    def _tokenizer(self) -> CaptionTokenizer:
        """The artefact's, or a new one learned from the training captions."""
        if self._artefact.tokenizer is None:
            numbers = unless_stopped(range(len(self._train)), self._stop)
            captions = (caption for number in numbers for caption in self._train.captions(number))
            settings = self._hyperparameters
            part = self._opened_train.part
            learn = CaptionTokenizer.train if part is None else part.tokenizer
            self._artefact.tokenizer = learn(
                captions,
                kind=settings.tokenizer_kind,
                vocab_size=settings.tokenizer_vocab_size,
                text_length=settings.text_length,
            )
        return self._artefact.tokenizer

    def _config(self, name: StageName) -> Config:
        """What a stage's model will be. Raises HyperparameterError when that cannot be built."""
        match name:
            case "dvae":
                return dvae_config(self._hyperparameters)
            case "transformer":
                dvae = self._dvae_config()
                return transformer_config(self._hyperparameters, self._text_sizes(), dvae)
            case "clip":
                image_size = self._train.image_size
                return clip_config(self._hyperparameters, self._text_sizes(), image_size)

    def _text_sizes(self) -> TextSizes:
        tokenizer = self._tokenizer()
        return TextSizes(tokenizer.vocab_size, tokenizer.text_length)

    def _dvae_config(self) -> DVAEConfig:
        """The artefact's, or that of the dVAE to be trained."""
        if self._artefact.dvae is not None:
            return self._artefact.dvae.config
        return dvae_config(self._hyperparameters)


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
