"""`train --plan` of a job with size=auto: what it would choose, and the time of each picture size.

Reads the captions and a sample of the pictures, and measures this device; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dalle.platform.environment import Job
from dalle.types import StageName
from training.config.fields import Hyperparameters
from training.data.sources.channel import open_channel
from training.loop.words import duration
from training.memory import instances
from training.memory.sizing import rules
from training.memory.sizing.choose import Chooser, Given, choose
from training.memory.sizing.facts import look_at
from training.memory.sizing.speed import Speed
from training.memory.sizing.timing import Timing
from training.stopping import NEVER


@dataclass(frozen=True)
class SizingPlan:
    """What size=auto would do. settled: the hyperparameters with it. lines: to be printed."""

    settled: Hyperparameters
    lines: list[str]


def plan_sizes(
    job: Job,
    hyperparameters: Hyperparameters,
    names: list[StageName],
    given: Given,
    speed: Speed,
    *,
    device_type: str,
    prices: Mapping[str, float],
) -> SizingPlan:
    """Return what a job would choose here. prices: instance type -> USD an hour.

    Without the channel train, or with the channel artefact, sizes are not chosen: the minutes are
    shared alone. Raises HyperparameterError when they are too few, DataError.
    """
    minutes = hyperparameters.job_minutes
    assert minutes is not None, "size=auto chooses by the minutes of the job"
    channel = job.channels.get("train")
    if channel is None or channel.input_mode == "Pipe" or "artefact" in job.channels:
        reason = "the plan opens neither an artefact nor a pipe, and needs a channel train"
        return SizingPlan(
            _shared(hyperparameters, names, minutes),
            [f"size=auto: planned as small, with {minutes:g} minutes shared; {reason}"],
        )
    pairs = open_channel(
        channel.directory,
        image_size=rules.IMAGE_SIZES[0],
        channel=channel.name,
        max_bad_share=1.0,
        caption_key=hyperparameters.caption_key or None,
    )
    facts = look_at(
        pairs,
        (),
        num_pairs=len(pairs),
        kind=hyperparameters.tokenizer_kind,
        vocab_size=hyperparameters.tokenizer_vocab_size,
        tokenizer=None,
        stop=NEVER,
    )
    timing = Timing(hyperparameters, facts, names, minutes, 1, device_type)
    chooser = Chooser(hyperparameters, facts, names, speed, given, timing)
    chooser.measure_probe()
    lines = []
    if given.dvae is None and given.transformer is None:
        lines = [_time_of(size, chooser, hyperparameters, prices) for size in chooser.sizes()]
        lines += _assumptions(prices)
    choice = choose(hyperparameters, facts, names, speed, given=given, device_type=device_type)
    settled = choice.apply(hyperparameters)
    left = minutes - timing.overhead / 60
    for name, share in choice.shares.items():
        settings = settled.of(name).model_copy(update={"max_minutes": max(0.01, share * left)})
        settled = settled.model_copy(update={name: settings})
    return SizingPlan(settled, [f"size=auto: {line}" for line in choice.why] + lines)


def _shared(
    hyperparameters: Hyperparameters, names: list[StageName], minutes: float
) -> Hyperparameters:
    total = sum(rules.SHARES[name] for name in names)
    for name in names:
        settings = hyperparameters.of(name)
        if f"{name}_max_minutes" not in hyperparameters.given and settings.max_minutes:
            shared = {"max_minutes": minutes * rules.SHARES[name] / total}
            settings = settings.model_copy(update=shared)
            hyperparameters = hyperparameters.model_copy(update={name: settings})
    return hyperparameters


def _time_of(
    size: int, chooser: Chooser, hyperparameters: Hyperparameters, prices: Mapping[str, float]
) -> str:
    """Return `64 pixels: 55 min here; about 25 min and $0.60 on ml.g5.xlarge, …`."""
    pairs, operations = chooser.work_for(size)
    share = rules.SHARES["transformer"]
    steps = pairs / rules.BATCHES["cuda"]["transformer"]
    is_half = hyperparameters.transformer.precision != "fp32"
    parts = []
    for name, gpu in instances.SHOWN.items():
        seconds = instances.estimated_seconds(
            instances.GPUS[gpu], operations / share, steps / share, is_half=is_half
        )
        usd = seconds / 3600 * prices[name] if name in prices else None
        cost = "" if usd is None else f" and ${usd:.2f} (spot ${instances.spot(usd):.2f})"
        parts.append(f"about {duration(seconds)}{cost} on {name}")
    here = duration(chooser.seconds_for(size))
    return f"{size} pixels: {here} here; {', '.join(parts)} (estimated)"


def _assumptions(prices: Mapping[str, float]) -> list[str]:
    what = (
        f"estimated: {instances.UTILISATION:.0%} of the operations by a GPU's data sheet, "
        f"{instances.STEP_MILLISECONDS:g} ms a step besides, {instances.START_MINUTES:g} min to "
        "start"
    )
    if not prices:
        return [f"{what}; dollars need a price table, see --prices"]
    return [
        f"{what}; on-demand prices of {instances.REGION}, spot at "
        f"{instances.SPOT_SHARE:.0%} of them with {instances.SPOT_REPEATED:.0%} repeated"
    ]
