"""size=auto in a job: the choice at its first start, and each stage's minutes until its end.

pairs --settle--> hyperparameters; before each stage --minutes--> its budget
Knows the job's files, clock and ranks; the rules are in `training.memory.sizing`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dalle.artefact import Artefact
from dalle.platform.environment import Job
from dalle.types import STAGES, StageName
from training.config.fields import Hyperparameters
from training.data.batching.preload import is_small
from training.data.open import totals_of
from training.data.sharded import HostPart, on_all_ranks
from training.data.sources.channel import open_channel
from training.data.sources.index import Pairs
from training.distributed.process_group import ProcessGroup
from training.loop.checkpoints import stored_run
from training.memory.sizing.choice import Choice
from training.memory.sizing.choose import Given, choose
from training.memory.sizing.facts import look_at
from training.memory.sizing.speed import MeasuredSpeed, Speed
from training.stopping import Stop

logger = logging.getLogger(__name__)

LEAST_SHARE = 0.1
"""Of a stage's planned time, where loading took so long that less would be left."""


@dataclass(eq=False)
class AutoSize:
    """The choice of one job. names: the stages that it trains. speed: None to measure it.

    Every rank calls the same methods; the first one chooses. Afterwards `choice` is what was
    chosen, None for a job without it: of named sizes, or whose checkpoints have none.
    """

    job: Job
    hyperparameters: Hyperparameters
    names: Sequence[StageName]
    artefact: Artefact
    device: torch.device
    ranks: ProcessGroup
    stop: Stop
    speed: Speed | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.choice: Choice | None = None
        self._started = self.clock()
        self._begun: dict[StageName, _Begun] = {}

    def settle(self, pairs: Pairs, part: HostPart | None) -> Hyperparameters:
        """Return the hyperparameters with what is chosen for these training pairs.

        Raises HyperparameterError when the minutes are too few; CheckpointError, DataError;
        Stopped on every rank.
        """
        if self.hyperparameters.job_minutes is None:
            return self.hyperparameters
        num_pairs = totals_of(pairs, part).num_pairs

        def on_first() -> Choice | None:
            return self._on_first(pairs, num_pairs) if self.ranks.is_first else None

        choice = on_all_ranks(self.ranks, on_first)
        content = self.ranks.share(choice and choice.model_dump())
        begun = self.ranks.share({name: tuple(each) for name, each in self._begun.items()})
        self._begun = {name: _Begun(*each) for name, each in begun.items()}
        if content is None:
            return self.hyperparameters
        self.choice = Choice.model_validate(content)
        self.artefact.manifest.chosen = self.choice.why
        settled = self.choice.apply(self.hyperparameters)
        for name in self.choice.shares:
            if name in self.names:
                settled = _with_minutes(settled, name, self._planned(name))
        return settled

    def share_minutes(
        self, hyperparameters: Hyperparameters, names: Sequence[StageName]
    ) -> Hyperparameters:
        """Return the hyperparameters with the minutes of the first of these stages.

        names: the stages that are left. What loading and earlier stages took more or less than was
        planned is shared by all that are left. A stage that an earlier start began keeps its own.
        """
        choice, name = self.choice, names[0]
        if choice is None or name not in choice.shares or self._kept_minutes(name) is not None:
            return hyperparameters
        of_others = sum(
            60 * (hyperparameters.of(each).max_minutes or 0)
            for each in names
            if each not in choice.shares
        )
        left = 60 * self._minutes() - self._seconds_spent() - choice.reserve_seconds - of_others
        left *= choice.shares[name] / sum(choice.shares.get(each, 0.0) for each in names)
        seconds = max(LEAST_SHARE * 60 * self._planned(name), left)
        if name in self._begun:  # by an earlier start with fewer minutes
            seconds += self._begun[name].seconds
        # Clocks differ between ranks.
        return _with_minutes(hyperparameters, name, float(self.ranks.share(seconds / 60)))

    def log_end(self) -> None:
        """Log what was promised and what it took."""
        if self.choice is not None and self.ranks.is_first and not self.stop.is_set():
            logger.info(
                "size=auto: %.1f of %g minutes taken",
                self._seconds_spent() / 60,
                self._minutes(),
            )

    # --- the first rank ---

    def _on_first(self, pairs: Pairs, num_pairs: int) -> Choice | None:
        checkpoints = self.job.paths.checkpoints
        for name in self.names:
            if (run := stored_run(checkpoints / name)) is not None:
                total, unit = run.budget or (0.0, "step")
                self._begun[name] = _Begun(run.seconds, total / 60 if unit == "s" else None)
        choice = Choice.load(checkpoints)
        if choice is not None:
            logger.info("size=auto: as at the first start of this job")
        elif self._begun:
            logger.info(
                "the checkpoints are of a version without size=auto: size=small, and max_minutes "
                "for each stage, as they began"
            )
            return None
        else:
            choice = self._choose(pairs, num_pairs)
            choice.save(checkpoints)
        for sentence in choice.why:
            logger.info("size=auto: %s", sentence)
        return choice

    def _choose(self, pairs: Pairs, num_pairs: int) -> Choice:
        settings, artefact = self.hyperparameters, self.artefact
        facts = look_at(
            pairs,
            self._held_out_captions(),
            num_pairs=num_pairs,
            kind=settings.tokenizer_kind,
            vocab_size=settings.tokenizer_vocab_size,
            tokenizer=artefact.tokenizer,
            stop=self.stop,
        )
        if artefact.tokenizer is not None:
            facts = replace(facts, longest_caption=artefact.tokenizer.text_length)
        if not is_small(pairs):  # decoded while the stages are trained
            facts = replace(facts, load_seconds=0.0)
        return choose(
            settings,
            facts,
            self.names,
            self.speed or MeasuredSpeed(self.device, self.stop),
            given=self._given(),
            num_ranks=self.ranks.size,
            device_type=self.device.type,
        )

    def _given(self) -> Given:
        """Return the configs of what the channels bring and this job does not choose."""
        artefact, settings = self.artefact, self.hyperparameters
        kept = {name for name in STAGES if settings.trains_on(name) or name not in self.names}
        return Given(
            dvae=None if artefact.dvae is None else artefact.dvae.config,
            transformer=artefact.transformer.config
            if artefact.transformer is not None and "transformer" in kept
            else None,
            clip=artefact.clip.config if artefact.clip is not None and "clip" in kept else None,
        )

    def _held_out_captions(self) -> Iterator[str]:
        """Yield the captions of the channel validation, but of one that can be read only once."""
        channel = self.job.channels.get("validation")
        if channel is None or channel.input_mode == "Pipe":
            return
        pairs = open_channel(
            channel.directory,
            image_size=self.hyperparameters.dvae.image_size or 32,
            channel=channel.name,
            max_bad_share=1.0,
            caption_key=self.hyperparameters.caption_key or None,
            is_streamed=channel.input_mode == "FastFile",
            is_part=channel.distribution == "ShardedByS3Key" and len(self.job.hosts) > 1,
            stop=self.stop,
        )
        for index in range(len(pairs)):
            yield from pairs.captions(index)

    # --- minutes ---

    def _minutes(self) -> float:
        minutes = self.hyperparameters.job_minutes
        assert minutes is not None, "a choice is made for the minutes of a job"
        return minutes

    def _planned(self, name: StageName) -> float:
        """Return a stage's minutes: those it began with, or its share of the time for training."""
        assert self.choice is not None, "it has the shares"
        kept = self._kept_minutes(name)
        left = self._minutes() - self.choice.reserve_seconds / 60
        return max(0.01, left * self.choice.shares[name]) if kept is None else kept

    def _kept_minutes(self, name: StageName) -> float | None:
        """Return the minutes of a stage that an earlier start began; None of one to begin.

        With other minutes than at the first start a transformer or CLIP gets more, the image
        tokenizer keeps what it had: a transformer may have been trained on its tokens.
        """
        assert self.choice is not None, "it has the minutes of the first start"
        begun = self._begun.get(name)
        if begun is None or (self._minutes() != self.choice.minutes and name != "dvae"):
            return None
        return begun.minutes

    def _seconds_spent(self) -> float:
        """Return the seconds of this start, and of earlier ones as far as checkpoints have them."""
        return self.clock() - self._started + sum(each.seconds for each in self._begun.values())


class _Begun(NamedTuple):
    """A stage that an earlier start began. seconds: spent on it; minutes: of its budget then."""

    seconds: float
    minutes: float | None


def _with_minutes(
    hyperparameters: Hyperparameters, name: StageName, minutes: float
) -> Hyperparameters:
    settings = hyperparameters.of(name).model_copy(update={"max_minutes": minutes})
    return hyperparameters.model_copy(update={name: settings})
