"""Hyperparameters beside the models which a job's channels bring, or should bring.

The stages that are left to train, and settings that do not fit.

No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dalle.errors import ArtefactError, HyperparameterError
from dalle.types import STAGES, ComponentName, StageName
from training.config.fields import Hyperparameters, TrainedOn
from training.config.hyperparameters import (
    LEGACY,
    TARGETS,
    TOKENIZER_MODEL,
    summary,
    training_on,
)

_WORDS: Mapping[TrainedOn, str] = {"transformer": "transformer", "clip": "CLIP"}
_BROUGHT_BY: Mapping[TrainedOn, tuple[str, ...]] = {
    "transformer": (LEGACY, "artefact"),
    "clip": ("clip", "artefact"),
}
"""Stage -> the channels that may bring its model."""
_OF_NEW_MODELS: Mapping[TrainedOn, frozenset[str]] = {
    "transformer": frozenset({"size"}),  # other sizes are refused beside the model's config
    "clip": frozenset(
        {"size", "embed_size", "patch_size"}
        | {"vision_width", "vision_layers", "text_width", "text_heads", "text_layers"}
    ),
}
"""Fields of a model with random weights."""


def with_channels(hyperparameters: Hyperparameters, channels: Collection[str]) -> Hyperparameters:
    """Return the hyperparameters of a job that has these channels.

    stage=transformer trains on from the model of the channel `legacy`. Raises HyperparameterError
    for settings of a model that a channel brings, or should bring. With a published image
    tokenizer, image_size may be set: it is convolutional.
    """
    if LEGACY in channels and hyperparameters.stage == "transformer":
        stages = {"transformer", *hyperparameters.train_on}
        hyperparameters = training_on(hyperparameters, stages)
    problems = []
    if (
        hyperparameters.stage == "clip"
        and "clip" in channels
        and not hyperparameters.trains_on("clip")
    ):
        problems.append(
            "stage=clip trains a CLIP and the channel clip brings one; leave one of them out, "
            "or set train_on=clip to train that one on"
        )
    for stage in hyperparameters.train_on:
        problems += _training_on_problems(hyperparameters, stage, channels)
    if TOKENIZER_MODEL in channels:
        problems += _tokenizer_problems(hyperparameters)
    if problems:
        raise HyperparameterError(summary(problems))
    return hyperparameters


def _training_on_problems(
    hyperparameters: Hyperparameters, stage: TrainedOn, channels: Collection[str]
) -> list[str]:
    if hyperparameters.stage not in ("all", stage):
        return []
    what = f"train_on={stage} trains on from a {_WORDS[stage]}"
    if not {*_BROUGHT_BY[stage]} & {*channels}:
        wanted = " nor ".join(_BROUGHT_BY[stage])
        return [f"{what}, and neither the channel {wanted} is there to bring one"]
    return [
        f"{name} is of a new {_WORDS[stage]}, and {what} that is there; leave one of them out"
        for name in sorted(hyperparameters.given)
        if {target.stage for target in TARGETS[name]} == {stage}
        and TARGETS[name][0].name in _OF_NEW_MODELS[stage]
    ]


def _tokenizer_problems(hyperparameters: Hyperparameters) -> list[str]:
    problems = []
    if hyperparameters.stage == "dvae":
        problems.append(
            f"stage=dvae trains an image tokenizer and the channel {TOKENIZER_MODEL} brings one; "
            "leave one of them out"
        )
    problems += [
        f"{name} is of the stage dvae, which is not trained: the channel {TOKENIZER_MODEL} brings "
        "an image tokenizer; leave one of them out"
        for name in sorted(hyperparameters.given)
        if {target.stage for target in TARGETS[name]} == {"dvae"}
        and TARGETS[name][0].name != "image_size"
    ]
    return problems


def stages_to_train(wanted: str, present: Collection[ComponentName]) -> list[StageName]:
    """Return the stages in order; `all` are those not present. Raises ArtefactError."""
    if "transformer" in present and "dvae" not in present:
        raise ArtefactError(
            "the artefact has a transformer without the dvae whose tokens it was trained on; "
            "give the channel `artefact` a model that has both, or neither"
        )
    if wanted == "all":
        missing = [name for name in STAGES if name not in present]
        if not missing:
            raise ArtefactError(
                "stage=all trains what the artefact lacks, but it has dvae, transformer and clip; "
                "set train_on=transformer,clip to train those on, or stage to the one to train anew"
            )
        return missing
    (name,) = (name for name in STAGES if name == wanted)
    if name == "transformer" and "dvae" not in present:
        raise ArtefactError(
            "stage=transformer needs a trained dvae; give one in the channel `artefact`, "
            "or set stage=all"
        )
    if name == "dvae" and "transformer" in present:
        raise ArtefactError(
            "stage=dvae would leave the artefact's transformer without the tokens it was trained "
            "on; leave out the channel `artefact`"
        )
    return [name]
