"""Hyperparameters: flat text in, typed models out, or one error that names every problem.

Names are flat on the platform. A plain name (`learning_rate`) sets every stage that has the field;
a prefixed one (`dvae_learning_rate`) sets one stage and wins. The fields themselves are in
training.config.fields. Needs no torch, so that a wrong job fails within a second.
"""

from __future__ import annotations

import difflib
import types
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dalle.errors import HyperparameterError
from dalle.platform.environment import parse_value
from dalle.types import ComponentName, StageName
from training.config import deepspeed as deepspeed_settings
from training.config.deepspeed import TRAINED_BY_DEEPSPEED, Implied
from training.config.fields import (
    BUDGETS,
    STAGE_FIELDS,
    Hyperparameters,
    JobHyperparameters,
    StageHyperparameters,
)

__all__ = [
    "Hyperparameters",
    "StageHyperparameters",
    "parse",
    "render_table",
    "without_effect",
]

IGNORED_PREFIX = "sagemaker_"
IGNORED_NAMES = frozenset({"_tuning_objective_metric"})

TOKENIZER_NAMES = frozenset({"tokenizer_kind", "tokenizer_vocab_size", "text_length"})
"""What decides a new tokenizer, and nothing else."""
READS_CAPTIONS = frozenset[StageName]({"transformer", "clip"})
FOR_DEEPSPEED = frozenset(
    {"zero_stage", "offload_optimizer", "offload_parameters", "deepspeed_config"}
)


@dataclass(frozen=True)
class _Target:
    """Where a flat name goes; stage None is the job itself."""

    stage: StageName | None
    name: str
    field: FieldInfo


def parse(raw: Mapping[str, str]) -> Hyperparameters:
    """The job's hyperparameters from the platform's name -> text.

    With engine=deepspeed, a `deepspeed_config` stands for the hyperparameters that it decides.
    Names of the platform's own (`sagemaker_…`, `_tuning_objective_metric`) are ignored.
    Raises HyperparameterError with one line for every unknown name, every wrong value and all that
    does not go together.
    """
    given = {
        name: text
        for name, text in raw.items()
        if not name.startswith(IGNORED_PREFIX) and name not in IGNORED_NAMES
    }
    targets = _targets()
    given_by_author = frozenset(given)
    problems = _take_implied(given, targets)
    job: dict[str, Any] = {}
    stages: dict[StageName, dict[str, Any]] = {stage: {} for stage in STAGE_FIELDS}
    # Plain names first, so that prefixed ones overwrite what they set.
    for name in sorted(given, key=lambda name: (_is_prefixed(name, targets), name)):
        if name not in targets:
            problems.append(_unknown(name, targets))
            continue
        try:
            value = _typed(given[name], targets[name][0].field)
        except (ValidationError, ValueError):
            wanted = _describe(targets[name][0].field)
            problems.append(f"{name} must be {wanted}, got {_shortened(given[name])!r}")
            continue
        for target in targets[name]:
            if target.stage is None:
                job[target.name] = value
                continue
            settings = stages[target.stage]
            if target.name in BUDGETS and _is_prefixed(name, targets):
                _forget_plain_budgets(settings, target.stage, given)
            settings[target.name] = value
    problems += _double_budgets(stages)
    if not problems:
        parsed = Hyperparameters.model_validate({**job, **stages, "given": given_by_author})
        problems = deepspeed_settings.refused_combinations(parsed)
    if problems:
        raise HyperparameterError(_summary(problems))
    return parsed


def without_effect(
    hyperparameters: Hyperparameters,
    trained: Sequence[StageName],
    present: Collection[ComponentName] = (),
) -> dict[str, str]:
    """Hyperparameters that the job's author set in vain, and why.

    trained: the stages that this job trains. present: components that its channels bring.
    """
    targets = _targets()
    reasons: dict[str, str] = {}
    for name in sorted(hyperparameters.given):
        if not any(target.stage in (None, *trained) for target in targets[name]):
            reasons[name] = f"this job trains {', '.join(trained)}"
        elif name in TOKENIZER_NAMES and "tokenizer" in present:
            reasons[name] = "the channel artefact brings a tokenizer"
        elif name in TOKENIZER_NAMES and not READS_CAPTIONS & {*trained}:
            reasons[name] = f"this job trains {', '.join(trained)}, which reads no captions"
        elif name in FOR_DEEPSPEED and hyperparameters.engine != "deepspeed":
            reasons[name] = f"it is DeepSpeed's, and engine={hyperparameters.engine}"
        elif name in {"engine", *FOR_DEEPSPEED} and not {*TRAINED_BY_DEEPSPEED} & {*trained}:
            reasons[name] = f"this job trains {', '.join(trained)}, always by torch's engine"
        elif hyperparameters.engine == "deepspeed" and _is_for_muon(name, targets, trained):
            reasons[name] = "Muon needs whole matrices; engine=deepspeed trains by AdamW alone"
    return reasons


def _is_for_muon(
    name: str, targets: Mapping[str, list[_Target]], trained: Sequence[StageName]
) -> bool:
    """Whether a name sets Muon's learning rate where DeepSpeed trains, and nowhere else."""
    stages = {target.stage for target in targets[name] if target.stage in trained}
    return targets[name][0].name == "muon_learning_rate" and stages <= {*TRAINED_BY_DEEPSPEED}


def render_table() -> str:
    """All hyperparameters as a Markdown table: name, value, default, meaning."""
    lines = ["| name | value | default | meaning |", "|---|---|---|---|"]
    for name, targets in _targets().items():
        if _is_prefixed(name, {name: targets}):
            continue
        field = targets[0].field
        stages = [target.stage for target in targets if target.stage is not None]
        scope = f" ({', '.join(stages)})" if 0 < len(stages) < len(STAGE_FIELDS) else ""
        meaning = f"{field.description}{scope}"
        cells = (f"`{name}`", _describe(field), _describe_default(targets), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _targets() -> dict[str, list[_Target]]:
    """Flat name -> the fields it sets; plain names of the job, then of stages, then prefixed."""
    plain: dict[str, list[_Target]] = {
        name: [_Target(None, name, field)]
        for name, field in JobHyperparameters.model_fields.items()
    }
    prefixed: dict[str, list[_Target]] = {}
    common = StageHyperparameters.model_fields
    plain |= {name: [] for name in common}  # these first, also those that not every stage has
    for stage, model in STAGE_FIELDS.items():
        fields = model.model_fields
        for name in [*common, *(name for name in fields if name not in common)]:
            if name in model.not_for_authors:
                continue
            target = _Target(stage, name, fields[name])
            plain.setdefault(name, []).append(target)
            prefixed[f"{stage}_{name}"] = [target]
    return plain | prefixed


def _take_implied(given: dict[str, str], targets: Mapping[str, list[_Target]]) -> list[str]:
    """Add to the given hyperparameters what the job's DeepSpeed JSON says in their stead.

    Returns a problem for each key that contradicts a hyperparameter, or cannot be used.
    """
    if given.get("engine", "").strip(' "') != "deepspeed":
        return []
    text = given.get("deepspeed_config", "")
    try:
        implied = deepspeed_settings.read_json(_typed(text, targets["deepspeed_config"][0].field))
    except ValidationError:
        return []  # too long; found again with all others
    except HyperparameterError as error:
        return str(error).splitlines()
    problems = []
    spoken = dict(given)
    for each in implied:
        for name, field in _implied_names(each, targets):
            said = next((by for by in (name, each.name) if by in spoken), None)
            if said is None:
                given[name] = each.text
            elif not _are_equal(spoken[said], each.text, field):
                problems.append(
                    f"deepspeed_config: {'.'.join(each.key)} says {each.name}={each.text}, "
                    f"but {said} is {_shortened(spoken[said])}; leave one of them out"
                )
    return list(dict.fromkeys(problems))


def _implied_names(
    implied: Implied, targets: Mapping[str, list[_Target]]
) -> list[tuple[str, FieldInfo]]:
    """The flat names, of the job or of DeepSpeed's stages, that a key of the JSON sets."""
    return [
        (implied.name if target.stage is None else f"{target.stage}_{implied.name}", target.field)
        for target in targets[implied.name]
        if target.stage is None or target.stage in TRAINED_BY_DEEPSPEED
    ]


def _are_equal(one: str, other: str, field: FieldInfo) -> bool:
    try:
        return bool(_typed(one, field) == _typed(other, field))
    except (ValidationError, ValueError):
        return True  # one of them is wrong by itself, and found as such


def _is_prefixed(name: str, targets: Mapping[str, list[_Target]]) -> bool:
    return name in targets and targets[name][0].name != name


def _forget_plain_budgets(
    settings: dict[str, Any], stage: StageName, given: Mapping[str, str]
) -> None:
    """A stage's own budget replaces one of another kind that was given for all stages."""
    for budget in BUDGETS:
        if f"{stage}_{budget}" not in given:
            settings.pop(budget, None)


def _double_budgets(stages: Mapping[StageName, Mapping[str, Any]]) -> list[str]:
    """One problem per pair of budgets that were given together, naming the stages they meet in."""
    clashes: defaultdict[str, list[str]] = defaultdict(list)
    for stage, settings in stages.items():
        budgets = [budget for budget in BUDGETS if settings.get(budget) is not None]
        if len(budgets) > 1:
            clashes[" and ".join(budgets)].append(stage)
    return [
        f"{budgets} are given together for {', '.join(names)}; give one of them"
        for budgets, names in clashes.items()
    ]


def _typed(text: str, field: FieldInfo) -> Any:
    """The value of one text. Raises ValidationError or ValueError when it is not right."""
    value = parse_value(text)
    kind = _without_none(field.annotation)
    if kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str)):
        value = value if isinstance(value, str) else text.strip()
    elif get_origin(kind) is tuple and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    elif isinstance(value, bool) and kind is not bool:
        raise ValueError("a truth value is not a number")
    return TypeAdapter(field.rebuild_annotation()).validate_python(value)


def _unknown(name: str, targets: Mapping[str, list[_Target]]) -> str:
    stage, _, plain = name.partition("_")
    if stage in STAGE_FIELDS and plain in targets:
        owners = [target.stage for target in targets[plain] if target.stage is not None]
        if owners:
            return f"{name} is unknown: {stage} has no {plain}, only {' and '.join(owners)}"
        return f"{name} is unknown: {plain} holds for the whole job, set it without the prefix"
    nearest = difflib.get_close_matches(name, targets, n=1)
    if nearest:
        return f"{name} is unknown; did you mean {nearest[0]}?"
    return f"{name} is unknown; `train --list-hyperparameters` shows the known ones"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def _summary(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"hyperparameter {problems[0]}"
    return "\n- ".join([f"{len(problems)} hyperparameters are wrong:", *problems])


def _without_none(annotation: Any) -> Any:
    """The type inside `X | None` or `X | Literal["auto"]`, without its `Annotated` constraints."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = get_args(annotation)
        (annotation,) = (kind for kind in kinds if kind not in (type(None), Literal["auto"]))
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def _may_be_auto(field: FieldInfo) -> bool:
    return Literal["auto"] in get_args(field.annotation)


def _describe(field: FieldInfo) -> str:
    """A field's type and range in words, as they follow "must be"."""
    kind = _without_none(field.annotation)
    limits = _limits(field)
    if get_origin(kind) is Literal:
        words = [str(word) for word in get_args(kind)]
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    if get_origin(kind) is tuple:
        return "a list of " + ", ".join(get_args(get_args(kind)[0]))
    if kind is str:
        return f"a text of at most {limits['max_length']} characters"
    if kind is bool:
        return "true or false"
    assert kind in (int, float), f"no words for {kind}"
    noun = "a whole number" if kind is int else "a number"
    lowest = f"above {limits['gt']:,}" if "gt" in limits else f"from {limits['ge']:,}"
    highest = f"below {limits['lt']:,}" if "lt" in limits else f"to {limits['le']:,}"
    return f"{noun} {lowest} {highest}{' or auto' if _may_be_auto(field) else ''}"


def _limits(field: FieldInfo) -> dict[str, Any]:
    """gt, ge, lt, le and max_length, wherever the annotation carries them."""
    metadata = list(field.metadata)
    for part in (field.annotation, *get_args(field.annotation)):
        for item in getattr(part, "__metadata__", ()):
            metadata.extend(item.metadata if isinstance(item, FieldInfo) else [item])
    names = ("gt", "ge", "lt", "le", "max_length")
    return {name: getattr(m, name) for m in metadata for name in names if hasattr(m, name)}


def _describe_default(targets: list[_Target]) -> str:
    defaults = [_default_words(target) for target in targets]
    if len(set(defaults)) == 1:
        return defaults[0]
    return ", ".join(
        f"{target.stage} {default}" for target, default in zip(targets, defaults, strict=True)
    )


def _default_words(target: _Target) -> str:
    default = target.field.default
    if default is None:
        overrides = (
            target.stage is not None and target.name not in StageHyperparameters.model_fields
        )
        return "of the size" if overrides else "—"
    return f"`{default}`" if default != "" else "—"
