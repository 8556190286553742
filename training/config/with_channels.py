"""Hyperparameters beside the models which a job's channels bring, or should bring.

The stages that are left to train, and settings that do not fit.

No torch.
"""

from __future__ import annotations

from collections.abc import Collection

from dalle.errors import ArtefactError, HyperparameterError
from dalle.types import STAGES, ComponentName, StageName
from training.config.fields import Hyperparameters
from training.config.hyperparameters import TARGETS, TOKENIZER_MODEL, summary

_OF_NEW_CLIPS = frozenset(
    {"size", "embed_size", "patch_size"}
    | {"vision_width", "vision_layers", "text_width", "text_heads", "text_layers"}
)
"""Fields of a CLIP with random weights."""


def check_with_channels(hyperparameters: Hyperparameters, channels: Collection[str]) -> None:
    """Raise HyperparameterError for settings of a model that a channel brings, or should bring.

    With a published image tokenizer, image_size may be set: it is convolutional.
    """
    problems = _fine_tuning_problems(hyperparameters, channels)
    if TOKENIZER_MODEL in channels:
        problems += _tokenizer_problems(hyperparameters)
    if problems:
        raise HyperparameterError(summary(problems))


def _fine_tuning_problems(hyperparameters: Hyperparameters, channels: Collection[str]) -> list[str]:
    trains_clip = hyperparameters.stage in ("all", "clip")
    if not hyperparameters.clip.fine_tune:
        if hyperparameters.stage == "clip" and "clip" in channels:
            return [
                "stage=clip trains a CLIP and the channel clip brings one; leave one of them out, "
                "or set clip_fine_tune=true to train that one on"
            ]
        return []
    if trains_clip and not {"artefact", "clip"} & {*channels}:
        return [
            "clip_fine_tune=true trains on from a CLIP, and neither the channel clip nor artefact "
            "is there to bring one"
        ]
    return [
        f"{name} is of a new CLIP, and clip_fine_tune=true trains on from one that is there; leave "
        "one of them out"
        for name in sorted(hyperparameters.given)
        if trains_clip
        and {target.stage for target in TARGETS[name]} == {"clip"}
        and TARGETS[name][0].name in _OF_NEW_CLIPS
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
                "set stage to the one to train anew"
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
