"""`train --plan`: what each device of a job will hold, before anything is paid for.

Needs the job's hyperparameters alone; data, GPU and the other hosts may all be missing. What it
reckons is in training.memory.estimate; this is the table, the advice and the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from dalle.artefact import CONFIG
from dalle.errors import ArtefactError
from dalle.manifest import MANIFEST
from dalle.models.dvae import DVAEConfig
from dalle.platform.environment import Job
from dalle.types import STAGES, StageName
from training.config.deepspeed import TRAINED_BY_DEEPSPEED
from training.config.fields import Hyperparameters
from training.config.models import TextSizes, clip_config, dvae_config, transformer_config
from training.memory.estimate import Memory, Setting, StageMemory

HEADROOM = 0.08
"""Share of a device's memory that is not planned with: what the allocator cannot use."""


@dataclass(frozen=True)
class Devices:
    """What a job runs on. memory: bytes of one device, None when nothing is known of it."""

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

    largest: the most of them that fit; None when the device's memory is not known.
    """

    setting: Setting
    part_size: int
    memory: Memory
    largest: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.largest is None else self.largest >= self.part_size


@dataclass(frozen=True)
class StagePlan:
    """A stage as the job has it, what else there is, and what is best among it."""

    stage: StageName
    size: str
    num_parameters: int
    batch_size: int | Literal["auto"]
    job: Row
    others: list[Row]

    def advice(self) -> str | None:
        """The first way in which it fits, cheapest first, as hyperparameters; None: none fits."""
        for row in [self.job, *self.others]:
            if row.largest:
                return " ".join(_as_hyperparameters(row, self.job))
        return None


def plan(job: Job, hyperparameters: Hyperparameters, devices: Devices) -> list[StagePlan]:
    """Every stage that the job trains. Raises HyperparameterError, ArtefactError."""
    present, frozen, vocab_size = _read_artefact(job)
    dvae = frozen or dvae_config(hyperparameters)
    text = TextSizes(
        vocab_size or hyperparameters.tokenizer_vocab_size, hyperparameters.text_length
    )
    wanted = hyperparameters.stage
    names = [name for name in STAGES if name not in present] if wanted == "all" else [wanted]
    plans = []
    for name in names:
        match name:
            case "dvae":
                memory = StageMemory(name, dvae, device_type=devices.kind)
            case "transformer":
                config = transformer_config(hyperparameters, text, dvae)
                memory = StageMemory(name, config, dvae=dvae, device_type=devices.kind)
            case "clip":
                clip = clip_config(hyperparameters, text, dvae.image_size)
                memory = StageMemory(name, clip, device_type=devices.kind)
        plans.append(_plan_stage(memory, hyperparameters, devices))
    return plans


def render(plans: Sequence[StagePlan], devices: Devices) -> str:
    """Tables for people, in GiB."""
    memory = "unknown memory" if devices.memory is None else f"{_gib(devices.memory)} GiB each"
    lines = [
        f"{devices.num_hosts} host(s) with {devices.per_host} {devices.kind} device(s), {memory}; "
        f"{HEADROOM:.0%} of it are left free. All figures in GiB on one device."
    ]
    for each in plans:
        pairs = f"batch_size {each.batch_size}"
        lines += [
            "",
            f"{each.stage}, size {each.size}: {each.num_parameters / 1e6:,.1f} million weights, "
            f"{pairs}, {each.job.part_size} pairs at once on a device, "
            f"{each.job.setting.precision}",
            f"{'':46}{'weights':>9}{'grads':>8}{'optim.':>8}{'activ.':>8}{'other':>7}"
            f"{'total':>8}{'host':>7}  {'largest part'}",
        ]
        for row in [each.job, *each.others]:
            m = row.memory
            verdict = {None: "", True: f"{row.largest}", False: f"{row.largest}, too large"}
            label = ("this job: " if row is each.job else "") + _label(row.setting)
            lines.append(
                f"{label:46}"
                f"{_gib(m.weights):>9}{_gib(m.gradients):>8}{_gib(m.optimiser):>8}"
                f"{_gib(m.activations):>8}{_gib(m.exchange + m.runtime):>7}{_gib(m.device):>8}"
                f"{_gib(m.host):>7}  {verdict[row.fits]}"
            )
        if each.job.fits is False:
            advice = each.advice()
            lines.append(
                "-> it fits with " + advice
                if advice
                else "-> nothing here fits: take larger or more devices, or a smaller size"
            )
        elif each.job.fits:
            lines.append("-> it fits as it is")
    return "\n".join(lines)


def as_json(plans: Sequence[StagePlan], devices: Devices) -> str:
    """One line for programs; sizes in bytes."""

    def row(each: Row) -> dict[str, Any]:
        return {
            **asdict(each.setting),
            "part_size": each.part_size,
            "memory": asdict(each.memory) | {"device": each.memory.device},
            "largest_part_size": each.largest,
            "fits": each.fits,
        }

    return json.dumps(
        {
            "devices": asdict(devices) | {"usable": devices.usable},
            "stages": [
                {
                    "stage": each.stage,
                    "size": each.size,
                    "num_parameters": each.num_parameters,
                    "batch_size": each.batch_size,
                    "job": row(each.job),
                    "others": [row(other) for other in each.others],
                    "advice": each.advice(),
                }
                for each in plans
            ],
        }
    )


def _plan_stage(
    memory: StageMemory, hyperparameters: Hyperparameters, devices: Devices
) -> StagePlan:
    settings = hyperparameters.of(memory.name)
    setting = Setting.of(hyperparameters, memory.name, num_devices=devices.number)
    share = 65_536
    if settings.batch_size != "auto":
        share = -(-settings.batch_size // devices.number)

    def row(setting: Setting) -> Row:
        largest = None
        if devices.usable is not None:
            most = -(-share // (setting.num_parts if settings.batch_size != "auto" else 1))
            largest = memory.largest_part(setting, devices.usable, at_most=max(most, 65_536))
        if settings.batch_size == "auto":
            part_size = max(1, largest or 1)
        else:
            part_size = -(-share // setting.num_parts)
        return Row(setting, part_size, memory.at(setting, part_size), largest)

    # A job by DeepSpeed is without it; by torch it would have it.
    with_muon = replace(setting, has_muon=settings.muon_learning_rate > 0)
    others = (
        [row(other) for other in _alternatives(with_muon, memory.name) if other != setting]
        if memory.name in TRAINED_BY_DEEPSPEED
        else []
    )
    return StagePlan(
        memory.name,
        settings.size,
        memory.num_parameters,
        settings.batch_size,
        row(setting),
        others,
    )


def _alternatives(setting: Setting, stage: StageName) -> Iterator[Setting]:
    """Ways to train in the same number format, from the quickest to the most frugal."""
    can_checkpoint = stage == "transformer"
    plain = replace(
        setting,
        engine="torch",
        zero_stage=0,
        activation_checkpointing=False,
        offload_optimizer=False,
        offload_parameters=False,
    )
    yield plain
    if can_checkpoint:
        yield replace(plain, activation_checkpointing=True)
    shared = replace(plain, engine="deepspeed", has_muon=False)
    for zero in (1, 2, 3):
        yield replace(shared, zero_stage=zero)
    if can_checkpoint:
        shared = replace(shared, activation_checkpointing=True)
        for zero in (2, 3):
            yield replace(shared, zero_stage=zero)
    yield replace(shared, zero_stage=2, offload_optimizer=True)
    yield replace(shared, zero_stage=3, offload_optimizer=True)
    yield replace(shared, zero_stage=3, offload_optimizer=True, offload_parameters=True)


def _label(setting: Setting) -> str:
    words = ["torch" if setting.engine == "torch" else f"ZeRO {setting.zero_stage}"]
    if setting.activation_checkpointing:
        words.append("checkpointing")
    if setting.offload_optimizer:
        words.append("offload" if not setting.offload_parameters else "offload all")
    if setting.num_parts > 1:
        words.append(f"{setting.num_parts} parts")
    return ", ".join(words)


def _as_hyperparameters(row: Row, job: Row) -> Iterator[str]:
    """What to set; parts are made more until they fit."""
    setting = row.setting
    yield f"engine={setting.engine}"
    if setting.engine == "deepspeed":
        yield f"zero_stage={setting.zero_stage}"
    for name in ("activation_checkpointing", "offload_optimizer", "offload_parameters"):
        if getattr(setting, name):
            yield f"{name}=true"
    assert row.largest, "advice is for what fits"
    if row.part_size > row.largest:
        share = row.part_size * setting.num_parts
        parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= row.largest)
        yield f"gradient_accumulation_steps={parts}"


def _read_artefact(job: Job) -> tuple[set[StageName], DVAEConfig | None, int | None]:
    """Stages that the channel artefact brings, its dVAE's config and its vocabulary's size.

    Of an artefact that lies there unpacked; an archive is not opened, and nothing is taken from it.
    """
    if "artefact" not in job.channels:
        return set(), None, None
    directory = job.channels["artefact"].directory
    if not (directory / MANIFEST).is_file():
        return set(), None, None
    present = {name for name in STAGES if (directory / name / CONFIG).is_file()}
    dvae = _dvae_of(directory) if "dvae" in present else None
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    vocab_size = None
    if tokenizer.is_file():
        from dalle.preprocess.tokenizer import CaptionTokenizer

        vocab_size = CaptionTokenizer.load(tokenizer.parent).vocab_size
    return present, dvae, vocab_size


def _dvae_of(directory: Path) -> DVAEConfig:
    path = directory / "dvae" / CONFIG
    try:
        return TypeAdapter(DVAEConfig).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
