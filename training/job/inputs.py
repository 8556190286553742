"""Input channels of a job: its artefact, its image-text pairs, and what follows from them.

channels --Inputs--> artefact, pairs, tokenizer --data()--> the batches of one stage
Knows channels, configs and batches; knows nothing of losses and checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from dalle.errors import CaptionTooLong, HyperparameterError
from dalle.models.configs import ImageTokenizerConfig
from dalle.models.image_tokenizer import ImageTokenizer
from dalle.platform.environment import Job
from dalle.preprocess.clip_tokenizer import ClipTokenizer
from dalle.preprocess.tokenizer import CaptionTokenizer
from dalle.types import StageName
from training.config.fields import Hyperparameters, StageHyperparameters
from training.config.models import (
    Config,
    TextSizes,
    dvae_config,
    stage_config,
    trained_on_config,
)
from training.config.with_channels import stages_to_train
from training.data.batching.batches import Batches
from training.data.batching.mirrored import mirrorable
from training.data.batching.preload import Preloaded
from training.data.batching.sampler import UNMIRRORED_EPOCHS
from training.data.batching.token_cache import cache_tokens, tokens_fit
from training.data.held_out import TRAIN
from training.data.long_captions import fit_captions, too_long
from training.data.open import OpenedChannel, open_data, totals_of
from training.data.pairs import Dataset
from training.data.sharded import HostPart, on_all_ranks
from training.data.sources.index import Pairs
from training.data.unknown_words import check_words
from training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from training.job.auto_size import AutoSize
from training.job.channel_models import read_models
from training.loop.budget import Budget
from training.loop.stages import StageData, weights_hash
from training.stopping import Stop, unless_stopped

logger = logging.getLogger(__name__)

VALIDATION_PAIRS = 512
"""Pairs that each validation measures."""


@dataclass(eq=False)
class Inputs:
    """The opened channels of a job, the same on every rank.

    artefact: the components of the channels `artefact`, `clip`, `tokenizer_model` and `legacy`;
        training adds its own.
    present: names of the components that the channels brought.
    Raises DataError, ArtefactError; Stopped.
    """

    job: Job
    hyperparameters: Hyperparameters
    device: torch.device
    stop: Stop
    ranks: ProcessGroup = SINGLE_PROCESS

    def __post_init__(self) -> None:
        size = self.hyperparameters.dvae.image_size
        self.artefact = read_models(self.job, self.device, size)
        self.present = frozenset(self.artefact.components())
        self.auto_size = self._auto_size()
        self.train = self._open("train")
        self.validation = (
            self._open("validation", VALIDATION_PAIRS)
            if "validation" in self.job.channels
            else None
        )

    def _open(self, name: str, most: int | None = None) -> OpenedChannel:
        return open_data(
            self.job.channels[name],
            image_size=self.dvae_config().image_size,
            max_bad_share=self.hyperparameters.max_bad_share,
            caption_key=self.hyperparameters.caption_key or None,
            ranks=self.ranks,
            num_hosts=len(self.job.hosts) if self.ranks.size > 1 else 1,
            stop=self.stop,
            most=most,
            prepare=self._prepare,
        )

    def _auto_size(self) -> AutoSize:
        settings = self.hyperparameters
        names: list[StageName] = []
        if settings.job_minutes is not None:
            kept = [name for name in self.present if not settings.trains_on(name)]
            names = stages_to_train(settings.stage, kept)
        return AutoSize(
            self.job, settings, names, self.artefact, self.device, self.ranks, self.stop
        )

    def _prepare(self, pairs: Pairs, part: HostPart | None) -> None:
        """Choose sizes by the training pairs, and fit captions to the text length."""
        if pairs.channel == TRAIN:
            self.hyperparameters = self.auto_size.settle(pairs, part)
            pairs.image_size = self.dvae_config().image_size
        if self._cuts_or_skips():
            self._fit_captions(pairs, part)

    def _cuts_or_skips(self) -> bool:
        settings = self.hyperparameters
        return settings.long_captions != "fail" and settings.stage != "dvae"

    def _fit_captions(self, pairs: Pairs, part: HostPart | None) -> None:
        """Cut or leave out captions that are too long, by the tokenizer of all of them."""
        how = self.hyperparameters.long_captions
        assert how != "fail", "check_captions does that"

        def fit() -> None:
            for tokenizer in self._readers(lambda: self._tokenizer_of(pairs, part)):
                fit_captions(pairs, tokenizer, how, self.stop)

        on_all_ranks(self.ranks, fit)

    def _readers(self, own: Callable[[], CaptionTokenizer]) -> Iterator[CaptionTokenizer]:
        """Yield the tokenizers by which this job's stages read captions. own: the artefact's."""
        stage = self.hyperparameters.stage
        published = self._published_reader()
        if published is None or stage != "clip":
            yield own()
        if published is not None and stage in ("all", "clip"):
            yield published

    def _published_reader(self) -> ClipTokenizer | None:
        """Return the tokenizer of a published CLIP that is trained on; None without one."""
        clip = self.artefact.clip
        if not self.trains_on("clip") or clip is None:
            return None
        if clip.config.tokenizer == "artefact":
            return None
        return ClipTokenizer(clip.config.text_length)

    def trains_on(self, stage: StageName) -> bool:
        """Return whether a stage begins with the weights that a channel brings."""
        return self.hyperparameters.trains_on(stage)

    def reader(self, stage: StageName) -> CaptionTokenizer:
        """Return the tokenizer by which the model of a stage reads captions."""
        published = self._published_reader() if stage == "clip" else None
        return published or self.tokenizer()

    def tokenizer(self) -> CaptionTokenizer:
        """Return the artefact's tokenizer, or train one on the training captions first."""
        return self._tokenizer_of(self.train.pairs, self.train.part)

    def _tokenizer_of(self, pairs: Dataset, part: HostPart | None) -> CaptionTokenizer:
        if self.artefact.tokenizer is None:
            numbers = unless_stopped(range(len(pairs)), self.stop)
            settings = self.hyperparameters
            learn = CaptionTokenizer.train if part is None else part.tokenizer
            self.artefact.tokenizer = learn(
                (caption for number in numbers for caption in pairs.captions(number)),
                kind=settings.tokenizer_kind,
                vocab_size=settings.tokenizer_vocab_size,
                text_length=settings.text_length,
            )
            if self.ranks.is_first:
                logger.info(
                    "tokenizer: %s, %d different text tokens; tokenizer_vocab_size allows %d",
                    settings.tokenizer_kind,
                    self.artefact.tokenizer.vocab_size,
                    settings.tokenizer_vocab_size,
                )
        return self.artefact.tokenizer

    def check_captions(self) -> None:
        """Tokenize every caption once. Raises CaptionTooLong, DataError; Stopped."""
        for tokenizer in self._readers(self.tokenizer):
            for opened in filter(None, (self.train, self.validation)):
                for index in unless_stopped(range(len(opened.pairs)), self.stop):
                    try:
                        tokenizer.encode(opened.pairs.captions(index))
                    except CaptionTooLong as error:
                        kept = "tokenizer" in self.present
                        raise too_long(opened.pairs, index, error, tokenizer, kept) from error
        if self.trains_on("transformer"):
            share = self.hyperparameters.max_bad_share
            check_words(self.train.pairs, self.tokenizer(), share, self.stop)

    def check_image_size(self) -> None:
        """Raise HyperparameterError for an image size that is not of the model to train on."""
        wanted, dvae = self.hyperparameters.dvae.image_size, self.artefact.dvae
        if not self.hyperparameters.train_on or wanted is None or dvae is None:
            return
        if wanted != dvae.config.image_size:
            raise HyperparameterError(
                f"image_size is {wanted}, and train_on keeps the image tokenizer of the channel, "
                f"for images of {dvae.config.image_size} pixels; leave image_size out, and images "
                "of every size are scaled to it"
            )

    def config(self, stage: StageName) -> Config:
        """Return the config of a stage's model. Raises HyperparameterError when it is invalid."""
        if stage == "dvae":
            return dvae_config(self.hyperparameters)
        if self.trains_on(stage):
            brought = getattr(self.artefact, stage)
            config = None if brought is None else brought.config
            return trained_on_config(stage, self.hyperparameters, config)
        tokenizer = self.tokenizer()
        text = TextSizes(tokenizer.vocab_size, tokenizer.text_length)
        return stage_config(stage, self.hyperparameters, text, self.dvae_config())

    def dvae_config(self) -> ImageTokenizerConfig:
        """Return the config of the artefact's image tokenizer, or of the dVAE to be trained."""
        if self.artefact.dvae is not None:
            return self.artefact.dvae.config
        return dvae_config(self.hyperparameters)

    def data(
        self,
        settings: StageHyperparameters,
        *,
        tokenizer: CaptionTokenizer | None = None,
        train_pairs: Dataset | None = None,
    ) -> StageData:
        """Return the batches of one stage.

        tokenizer: of the captions; None leaves them out. train_pairs: with their image tokens, in
        place of the channel's pairs.
        """
        pairs = self.train.pairs if train_pairs is None else train_pairs
        batches = partial(
            Batches,
            seed=self.hyperparameters.seed,
            tokenizer=tokenizer,
            num_workers=self.hyperparameters.num_workers,
            stop=self.stop,
        )
        train = batches(
            pairs,
            batch_size=settings.pairs_per_step,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            part=self.train.part,
            totals=totals_of(pairs, self.train.part),
            mirrorable=self._mirrorable if settings.augment == "auto" else None,
        )
        validation = None
        if self.validation is not None:
            held_out = self.validation.pairs
            size = min(settings.pairs_per_step, len(held_out))
            validation = batches(held_out, batch_size=size, shuffle=False, last="keep")
        return StageData(
            train,
            validation,
            self.device,
            self.stop,
            self.ranks,
            is_validation_parted=self.validation is not None and self.validation.part is not None,
        )

    @cached_property
    def _mirrorable(self) -> Tensor | None:
        """Which training pictures may be mirrored; None where none may, or they are many."""
        if not isinstance(self.train.pairs, Preloaded):
            return None
        allowed = mirrorable(self.train.pairs, self.stop)
        if self.ranks.is_first:
            logger.info(
                "augment=auto: from epoch %d on, %d of %d pictures are mirrored half of the time",
                UNMIRRORED_EPOCHS + 1,
                int(allowed.sum()),
                len(allowed),
            )
        return allowed if allowed.any() else None

    def pairs_with_tokens(self, settings: StageHyperparameters, dvae: ImageTokenizer) -> Dataset:
        """Return the training pairs, with cached image tokens if the run sees every image twice.

        A shorter run would wait for the encoding and gain nothing. Raises Stopped.
        """
        pairs, part = self.train.pairs, self.train.part
        num_batches = max(1, self.train.totals.num_pairs // settings.pairs_per_step)
        budget = Budget.of(settings, num_batches)
        num_tokens = dvae.config.num_positions * dvae.config.num_codebooks
        if (
            isinstance(pairs, Preloaded)
            or budget.unit != "step"
            or budget.total < 2 * num_batches
            or self.ranks.any(not tokens_fit(len(pairs), num_tokens, dvae.config.codebook_size))
        ):
            return pairs
        encoded = on_all_ranks(
            self.ranks,
            lambda: cache_tokens(
                pairs,
                dvae.encode,
                directory=self.job.paths.checkpoints / "image-tokens",
                dvae_hash=weights_hash(dvae),
                codebook_size=dvae.config.codebook_size,
                device=self.device,
                num_workers=self.hyperparameters.num_workers,
                ranks=self.ranks if part is None else part.host_ranks,
                stop=self.stop,
            ),
        )
        if part is not None:
            part.share_skips(encoded.skips, encoded.max_bad_share)
        return encoded
