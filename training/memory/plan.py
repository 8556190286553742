"""What each device of a job will hold in memory, for the job and for cheaper ways to train it.

Needs the job's hyperparameters only, neither data nor GPUs nor other hosts. The memory comes from
training.memory.estimate; training.memory.command prints the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from dalle.artefact import CONFIG
from dalle.errors import ArtefactError, HyperparameterError
from dalle.manifest import MANIFEST
from dalle.models.configs import ClipConfig, ImageTokenizerConfig
from dalle.models.legacy.build import parse_transformer_config
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.models.tokenizers.configs import parse_config
from dalle.platform.environment import Job
from dalle.platform.json_file import read_json
from dalle.preprocess.tokenizer import CaptionTokenizer
from dalle.types import STAGES, StageName
from training.config.deepspeed import TRAINED_BY_DEEPSPEED
from training.config.fields import BUDGETS, DEFAULT_EPOCHS, MAX_BATCH_SIZE, Hyperparameters
from training.config.models import (
    Config,
    TextSizes,
    dvae_config,
    stage_config,
    trained_on_config,
)
from training.config.with_channels import stages_to_train
from training.memory.estimate import Memory, Setting, StageMemory

_PARSERS: Mapping[StageName, Callable[[Any], Any]] = {
    "dvae": parse_config,
    "transformer": parse_transformer_config,
    "clip": TypeAdapter(ClipConfig).validate_python,
}
"""Stage -> how its model's config is read from JSON."""
HEADROOM = 0.08
"""Share of a device's memory that is not planned with: the allocator cannot use it."""


@dataclass(frozen=True)
class Devices:
    """The devices of a job. memory: bytes of one device, None when it is unknown."""

    num_hosts: int
    per_host: int
    kind: Literal["cpu", "cuda"]
    memory: int | None

    @property
    def number(self) -> int:
        return self.num_hosts * self.per_host

    @property
    def usable(self) -> int | None:
        """Bytes of one device that may be planned with."""
        return None if self.memory is None else round(self.memory * (1 - HEADROOM))


@dataclass(frozen=True)
class Row:
    """One way to train a stage. part_size: pairs that a device computes at once.

    largest: the most pairs at once that fit; None when the device's memory is unknown.
    """

    setting: Setting
    part_size: int
    memory: Memory
    largest: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.largest is None else self.largest >= self.part_size

    def as_hyperparameters(self) -> Iterator[str]:
        """Return `name=value` of this way, with as many accumulation steps as it needs to fit."""
        setting = self.setting
        yield f"engine={setting.engine}"
        if setting.engine == "deepspeed":
            yield f"zero_stage={setting.zero_stage}"
        for name in ("activation_checkpointing", "offload_optimizer", "offload_parameters"):
            if getattr(setting, name):
                yield f"{name}=true"
        assert self.largest, "not even one pair fits"
        if self.part_size > self.largest:
            share = self.part_size * setting.num_parts
            divisors = (n for n in range(1, share + 1) if share % n == 0)
            parts = next(n for n in divisors if share // n <= self.largest)
            yield f"gradient_accumulation_steps={parts}"


@dataclass(frozen=True)
class StagePlan:
    """A stage as the job trains it, and other ways to train it, the fastest first.

    step_flops: floating-point operations of a step, on all devices together.
    budget: `epochs`, `max_steps` or `max_minutes`, as the job has it.
    """

    stage: StageName
    size: str
    num_parameters: int
    batch_size: int | Literal["auto"]
    step_flops: float
    budget: dict[str, float]
    job: Row
    others: list[Row]

    def advice(self) -> str | None:
        """Return the hyperparameters of the first way that fits, the job's included, or None."""
        for row in [self.job, *self.others]:
            if row.largest:
                return " ".join(row.as_hyperparameters())
        return None


def plan(
    job: Job,
    hyperparameters: Hyperparameters,
    devices: Devices,
    tokenizer_model: ImageTokenizerConfig | None = None,
    clip: ClipConfig | None = None,
    legacy: LegacyTransformerConfig | None = None,
) -> list[StagePlan]:
    """Plan every stage that the job trains. Raises HyperparameterError, ArtefactError.

    tokenizer_model, clip, legacy: configs of the models of these channels; with the latter,
    tokenizer_model is that of its image tokenizer.
    """
    present, frozen, vocab_size = _read_artefact(job)
    if clip is not None:
        present = {*present, "clip"}
    if tokenizer_model is not None:
        present, frozen = {*present, "dvae"}, tokenizer_model
    dvae = frozen or dvae_config(hyperparameters)
    text = TextSizes(
        vocab_size or hyperparameters.tokenizer_vocab_size, hyperparameters.text_length
    )
    brought: dict[StageName, Config | None] = {"transformer": legacy, "clip": clip}
    for stage in present:
        if hyperparameters.trains_on(stage) and brought.get(stage) is None:
            brought[stage] = _read_config(job.channels["artefact"].directory, stage)
    if legacy is not None:
        present = {*present, "transformer"}
        text = TextSizes(legacy.text_vocab_size, legacy.text_length)
    wanted = hyperparameters.stage
    kept = {name for name in present if not hyperparameters.trains_on(name)}
    if "transformer" in present:
        names = stages_to_train(wanted, kept)
    else:  # a plan needs no channels: the dvae of stage=transformer may come later
        names = [name for name in STAGES if name not in kept] if wanted == "all" else [wanted]
    plans = []
    for name in names:
        config: Config
        if hyperparameters.trains_on(name):
            if brought[name] is None and not present and "artefact" in job.channels:
                raise HyperparameterError(
                    f"train_on={name} trains on from the {name} in the channel artefact, which "
                    "the plan reads of an unpacked artefact only; unpack model.tar.gz there"
                )
            config = trained_on_config(name, hyperparameters, brought[name])
        else:
            config = stage_config(name, hyperparameters, text, dvae)
        memory = StageMemory(name, config, dvae=dvae, device_type=devices.kind)
        plans.append(_plan_stage(memory, hyperparameters, devices))
    return plans


def _plan_stage(
    memory: StageMemory, hyperparameters: Hyperparameters, devices: Devices
) -> StagePlan:
    settings = hyperparameters.of(memory.name)
    batch_size = settings.batch_size
    setting = Setting.of(hyperparameters, memory.name, num_devices=devices.number)

    def row(setting: Setting) -> Row:
        part_size = 1
        if batch_size != "auto":
            share = math.ceil(batch_size / devices.number)
            part_size = math.ceil(share / setting.num_parts)
        largest = None
        if devices.usable is not None:
            at_most = max(part_size, MAX_BATCH_SIZE)
            largest = memory.largest_part(setting, devices.usable, at_most=at_most)
        if batch_size == "auto":
            part_size = max(1, largest or 1)
        return Row(setting, part_size, memory.at(setting, part_size), largest)

    others: list[Row] = []
    if memory.name in TRAINED_BY_DEEPSPEED:
        # DeepSpeed trains without Muon; torch would have it.
        with_muon = replace(setting, has_muon=settings.muon_learning_rate > 0)
        alternatives = _alternatives(with_muon, memory.name)
        others = [row(other) for other in alternatives if other != setting]
    size: str = settings.size
    if isinstance(memory.config, LegacyTransformerConfig):
        size = "of the model of DALLE-pytorch"
    elif hyperparameters.trains_on(memory.name):
        size = "of the CLIP" if memory.name == "clip" else f"of the {memory.name}"
    job = row(setting)
    parts = setting.num_parts * devices.number
    budget = {name: getattr(settings, name) for name in BUDGETS if getattr(settings, name)}
    return StagePlan(
        stage=memory.name,
        size=size,
        num_parameters=memory.num_parameters,
        batch_size=batch_size,
        step_flops=parts * memory.operations(setting, job.part_size),
        budget=budget or {"epochs": DEFAULT_EPOCHS},
        job=job,
        others=others,
    )


def _alternatives(setting: Setting, stage: StageName) -> Iterator[Setting]:
    """Return ways to train in the same number format, from the fastest to the smallest."""
    plain = replace(
        setting,
        engine="torch",
        zero_stage=0,
        activation_checkpointing=False,
        offload_optimizer=False,
        offload_parameters=False,
    )
    sharded = replace(plain, engine="deepspeed", has_muon=False)
    yield plain
    if stage == "transformer":
        yield replace(plain, activation_checkpointing=True)
    for zero in (1, 2, 3):
        yield replace(sharded, zero_stage=zero)
    if stage == "transformer":
        sharded = replace(sharded, activation_checkpointing=True)
        for zero in (2, 3):
            yield replace(sharded, zero_stage=zero)
    yield replace(sharded, zero_stage=2, offload_optimizer=True)
    yield replace(sharded, zero_stage=3, offload_optimizer=True)
    yield replace(sharded, zero_stage=3, offload_optimizer=True, offload_parameters=True)


def _read_artefact(job: Job) -> tuple[set[StageName], ImageTokenizerConfig | None, int | None]:
    """Return the channel artefact's stages, its dVAE's config and its vocabulary's size.

    Only of an unpacked artefact; an archive is not opened.
    """
    if "artefact" not in job.channels:
        return set(), None, None
    directory = job.channels["artefact"].directory
    if not (directory / MANIFEST).is_file():
        return set(), None, None
    present = {name for name in STAGES if (directory / name / CONFIG).is_file()}
    dvae = _read_config(directory, "dvae") if "dvae" in present else None
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    vocab_size = None
    if tokenizer.is_file():
        vocab_size = CaptionTokenizer.load(tokenizer.parent).vocab_size
    return present, dvae, vocab_size


def _read_config(directory: Path, stage: StageName) -> Any:
    """Return the config of a component of an unpacked artefact."""
    path = directory / stage / CONFIG
    try:
        return _PARSERS[stage](read_json(path))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
