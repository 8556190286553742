"""Parsing of hyperparameters: flat text in, typed models out, or one error with every problem.

Names are flat on the platform. A plain name (`learning_rate`) sets every stage that has the field;
a prefixed one (`dvae_learning_rate`) sets one stage and wins. The fields are in
`training.config.fields`. Imports no torch, so that a wrong job fails within a second.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from dalle.errors import HyperparameterError
from dalle.platform.environment import parse_value
from dalle.types import SMALLEST_BPE_VOCABULARY, ComponentName, StageName
from training.config import deepspeed as deepspeed_settings
from training.config.deepspeed import TRAINED_BY_DEEPSPEED
from training.config.fields import (
    AVERAGED_SIZES,
    AVERAGED_STAGES,
    BUDGETS,
    EMA_DECAY,
    STAGE_FIELDS,
    TRAINING_ON,
    Hyperparameters,
    JobHyperparameters,
    StageHyperparameters,
    TrainedOn,
)

MAX_HYPERPARAMETERS = 1_000  # the platform takes 100 of a job
IGNORED_PREFIX = "sagemaker_"
IGNORED_NAMES = frozenset({"_tuning_objective_metric"})
SCRIPT = "sagemaker_program"
"""By which the SDK's Estimator(entry_point=…) names a script of the user's."""

TOKENIZER_NAMES = frozenset({"tokenizer_kind", "tokenizer_vocab_size", "text_length"})
"""Hyperparameters of a new tokenizer only."""
READS_CAPTIONS = frozenset[StageName]({"transformer", "clip"})
TOKENIZER_MODEL = "tokenizer_model"
"""Channel of a published image tokenizer, in place of the stage dvae."""
LEGACY = "legacy"
"""Channel of a model of DALLE-pytorch: image tokenizer, transformer and tokenizer."""
FOR_DEEPSPEED = frozenset(
    {"zero_stage", "offload_optimizer", "offload_parameters", "deepspeed_config"}
)


@dataclass(frozen=True)
class _Target:
    """A field that a flat name sets; stage None is the job itself."""

    stage: StageName | None
    name: str
    field: FieldInfo


def parse(raw: Mapping[str, str]) -> Hyperparameters:
    """Parse the platform's name -> text into the job's hyperparameters.

    With engine=deepspeed, the keys of `deepspeed_config` set the hyperparameters that they decide.
    The platform's names (`sagemaker_…`, `_tuning_objective_metric`) are ignored, but for a script
    that would not run. Raises HyperparameterError with one line for every unknown name, wrong value
    and wrong combination.
    """
    given = {
        name: text
        for name, text in raw.items()
        if not name.startswith(IGNORED_PREFIX) and name not in IGNORED_NAMES
    }
    if len(given) > MAX_HYPERPARAMETERS:
        raise HyperparameterError(
            f"a job has at most {MAX_HYPERPARAMETERS} hyperparameters, got {len(given):,}"
        )
    given_by_author = frozenset(given)
    problems = [*_script(raw), *_take_implied(given)]
    job: dict[str, Any] = {}
    stages: dict[StageName, dict[str, Any]] = {stage: {} for stage in STAGE_FIELDS}
    # Plain names first, so that prefixed ones overwrite what they set.
    for name in sorted(given, key=lambda name: (_is_prefixed(name), name)):
        if name not in TARGETS:
            problems.append(_unknown(name))
            continue
        try:
            value = _typed(given[name], TARGETS[name][0].field)
        except ValueError:
            wanted = _describe(TARGETS[name][0].field)
            problems.append(f"{name} must be {wanted}, got {_shortened(given[name])!r}")
            continue
        for target in TARGETS[name]:
            if target.stage is None:
                job[target.name] = value
                continue
            settings = stages[target.stage]
            if target.name in BUDGETS and _is_prefixed(name):
                # It replaces a budget of another kind that was given for all stages.
                for budget in BUDGETS:
                    if f"{target.stage}_{budget}" not in given:
                        settings.pop(budget, None)
            settings[target.name] = value
    problems += _double_budgets(stages)
    problems += _take_fine_tune(job, stages["clip"])
    if not problems:
        parsed = Hyperparameters.model_validate({**job, **stages, "given": given_by_author})
        parsed = _averaging(training_on(parsed, parsed.train_on))
        parsed = parsed.model_copy(update={"job_minutes": _job_minutes(given, parsed)})
        problems = [*deepspeed_settings.refused_combinations(parsed), *_small_vocabulary(parsed)]
    if problems:
        raise HyperparameterError(summary(problems))
    return parsed


def _take_fine_tune(job: dict[str, Any], clip: dict[str, Any]) -> list[str]:
    """Make clip_fine_tune and `train_on` say the same; return a problem where they differ."""
    named = "clip" in job.get("train_on", ())
    if named and clip.get("fine_tune") is False:
        return ["clip_fine_tune is false and train_on names clip; leave one of them out"]
    if clip.get("fine_tune") and not named:
        job["train_on"] = (*job.get("train_on", ()), "clip")
    if named:
        clip["fine_tune"] = True
    return []


def training_on(hyperparameters: Hyperparameters, stages: Collection[TrainedOn]) -> Hyperparameters:
    """Return the hyperparameters of a job whose given stages begin with trained weights.

    Their learning rates are those of `TRAINING_ON`. Of CLIP the author's own count where they
    are CLIP's alone: those of all stages are meant for the other models, of another size.
    """
    update: dict[str, Any] = {"train_on": tuple(each for each in TRAINING_ON if each in stages)}
    for stage in update["train_on"]:
        settings, given = hyperparameters.of(stage), hyperparameters.given
        rates = {
            name: rate
            for name, rate in TRAINING_ON[stage].items()
            if f"{stage}_{name}" not in given and (stage == "clip" or name not in given)
        }
        if not {"ema_decay", f"{stage}_ema_decay"} & given:
            rates["ema_decay"] = 0.0  # the model that a channel brings may be of any size
        update[stage] = settings.model_copy(update=rates)
    return hyperparameters.model_copy(update=update)


def _averaging(hyperparameters: Hyperparameters) -> Hyperparameters:
    """Return the hyperparameters with averaged weights where the author does not say."""
    update: dict[str, Any] = {}
    for stage in AVERAGED_STAGES:
        if stage in hyperparameters.train_on:
            continue
        settings, given = hyperparameters.of(stage), hyperparameters.given
        if settings.base_size in AVERAGED_SIZES and not {"ema_decay", f"{stage}_ema_decay"} & given:
            update[stage] = settings.model_copy(update={"ema_decay": EMA_DECAY})
    return hyperparameters.model_copy(update=update)


def _job_minutes(given: Mapping[str, str], parsed: Hyperparameters) -> float | None:
    """Return the plain max_minutes where it is the whole job's, see `size=auto`."""
    field = TARGETS["size"][0].field
    is_auto = "size" not in given or _typed(given["size"], field) == "auto"
    if "max_minutes" not in given or not is_auto or not parsed.auto_stages():
        return None
    return float(_typed(given["max_minutes"], TARGETS["max_minutes"][0].field))


def _script(raw: Mapping[str, str]) -> list[str]:
    if not raw.get(SCRIPT):
        return []
    return [
        f"{SCRIPT} is {raw[SCRIPT]}, and this image trains by its own `train`, so that the script "
        "would not run; leave entry_point and source_dir out of the Estimator"
    ]


def _small_vocabulary(hyperparameters: JobHyperparameters) -> list[str]:
    size = hyperparameters.tokenizer_vocab_size
    if hyperparameters.tokenizer_kind != "bpe" or size >= SMALLEST_BPE_VOCABULARY:
        return []
    return [
        f"tokenizer_vocab_size must be at least {SMALLEST_BPE_VOCABULARY} with tokenizer_kind=bpe, "
        f"whose alphabet is the 256 bytes, got {size}; for fewer text tokens set "
        "tokenizer_kind=word"
    ]


def without_effect(
    hyperparameters: Hyperparameters,
    trained: Sequence[StageName],
    present: Collection[ComponentName] = (),
    channels: Collection[str] = (),
) -> dict[str, str]:
    """Return the given hyperparameters that this job does not use: name -> reason.

    trained: the stages that this job trains. present: components that its channels bring.
    """
    reasons: dict[str, str] = {}
    for name in sorted(hyperparameters.given):
        if TOKENIZER_MODEL in channels and TARGETS[name][0].name == "image_size":
            continue
        if name == "train_on" and not {*hyperparameters.train_on} & {*trained}:
            reasons[name] = f"this job trains {', '.join(trained)}"
            continue
        if not any(target.stage in (None, *trained) for target in TARGETS[name]):
            reasons[name] = f"this job trains {', '.join(trained)}"
        elif name in TOKENIZER_NAMES and "tokenizer" in present:
            reasons[name] = "the channel artefact brings a tokenizer"
        elif name in {"long_captions", *TOKENIZER_NAMES} and not READS_CAPTIONS & {*trained}:
            reasons[name] = f"this job trains {', '.join(trained)}, which reads no captions"
        elif name == "tokenizer_vocab_size" and hyperparameters.tokenizer_kind == "clip":
            reasons[name] = "tokenizer_kind=clip always has CLIP's 49,409 text tokens"
        elif name in FOR_DEEPSPEED and hyperparameters.engine != "deepspeed":
            reasons[name] = f"it is DeepSpeed's, and engine={hyperparameters.engine}"
        elif name in {"engine", *FOR_DEEPSPEED} and not {*TRAINED_BY_DEEPSPEED} & {*trained}:
            reasons[name] = f"this job trains {', '.join(trained)}, always by torch's engine"
        elif hyperparameters.engine == "deepspeed" and _is_for_muon(name, trained):
            reasons[name] = "Muon needs whole matrices; engine=deepspeed trains by AdamW alone"
    return reasons


def _is_for_muon(name: str, trained: Sequence[StageName]) -> bool:
    """Return whether a name sets Muon's learning rate only of stages that DeepSpeed trains."""
    stages = {target.stage for target in TARGETS[name] if target.stage in trained}
    return TARGETS[name][0].name == "muon_learning_rate" and stages <= {*TRAINED_BY_DEEPSPEED}


def render_table() -> str:
    """Render all hyperparameters as a Markdown table: name, value, default, meaning."""
    lines = ["| name | value | default | meaning |", "|---|---|---|---|"]
    for name, targets in TARGETS.items():
        if _is_prefixed(name):
            continue
        field = targets[0].field
        stages = [target.stage for target in targets if target.stage is not None]
        scope = f" ({', '.join(stages)})" if 0 < len(stages) < len(STAGE_FIELDS) else ""
        meaning = " ".join((field.description or "").split()) + scope
        cells = (f"`{name}`", _describe(field), _describe_default(targets), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _targets() -> dict[str, list[_Target]]:
    """Return flat name -> the fields it sets: names of the job, of all stages, of one stage."""
    plain: dict[str, list[_Target]] = {
        name: [_Target(None, name, field)]
        for name, field in JobHyperparameters.model_fields.items()
    }
    prefixed: dict[str, list[_Target]] = {}
    common = StageHyperparameters.model_fields
    plain |= {name: [] for name in common}  # first in the table, though not of every stage
    for stage, model in STAGE_FIELDS.items():
        fields = model.model_fields
        for name in [*common, *(name for name in fields if name not in common)]:
            if name in model.not_for_authors:
                continue
            target = _Target(stage, name, fields[name])
            plain.setdefault(name, []).append(target)
            prefixed[f"{stage}_{name}"] = [target]
    return plain | prefixed


TARGETS = _targets()
"""Flat name -> the fields that it sets."""


def _take_implied(given: dict[str, str]) -> list[str]:
    """Add the hyperparameters that the job's DeepSpeed JSON decides to the given ones.

    Returns one problem per key that contradicts a hyperparameter or cannot be used.
    """
    if given.get("engine", "").strip(' "') != "deepspeed":
        return []
    text = given.get("deepspeed_config", "")
    try:
        implied = deepspeed_settings.read_json(_typed(text, TARGETS["deepspeed_config"][0].field))
    except HyperparameterError as error:
        return str(error).splitlines()
    except ValueError:
        return []  # too long; `parse` reports it
    problems = []
    by_author = dict(given)
    for each in implied:
        for target in TARGETS[each.name]:
            if target.stage not in (None, *TRAINED_BY_DEEPSPEED):
                continue
            name = each.name if target.stage is None else f"{target.stage}_{each.name}"
            said = next((by for by in (name, each.name) if by in by_author), None)
            if said is None:
                given[name] = each.text
            elif not _are_equal(by_author[said], each.text, target.field):
                problems.append(
                    f"deepspeed_config: {'.'.join(each.key)} says {each.name}={each.text}, "
                    f"but {said} is {_shortened(by_author[said])}; leave one of them out"
                )
    return list(dict.fromkeys(problems))


def _are_equal(one: str, other: str, field: FieldInfo) -> bool:
    try:
        return bool(_typed(one, field) == _typed(other, field))
    except ValueError:
        return True  # one of them is wrong by itself; `parse` reports it


def _is_prefixed(name: str) -> bool:
    return name in TARGETS and TARGETS[name][0].name != name


def _double_budgets(stages: Mapping[StageName, Mapping[str, Any]]) -> list[str]:
    """Return one problem per pair of budgets that were given for the same stages."""
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
    """Return the value of one text. Raises ValueError when it is wrong."""
    value, schema = parse_value(text), _schema(field)
    kind = schema["type"]
    if kind == "string" and "enum" not in schema:
        value = value if isinstance(value, str) else text.strip()
    else:
        # The SDKs write text as JSON, some of them twice: "\"1e3\"" is 1e3.
        while isinstance(value, str) and (inner := parse_value(value)) != value:
            value = inner
    if kind == "string":
        value = value.strip() if isinstance(value, str) and "enum" in schema else value
    elif kind == "array" and isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    elif isinstance(value, bool) and kind != "boolean":
        raise ValueError("a truth value is not a number")
    return TypeAdapter(field.rebuild_annotation()).validate_python(value)


def _unknown(name: str) -> str:
    stage, _, plain = name.partition("_")
    if stage in STAGE_FIELDS and plain in TARGETS:
        owners = [target.stage for target in TARGETS[plain] if target.stage is not None]
        if owners:
            return f"{name} is unknown: {stage} has no {plain}, only {' and '.join(owners)}"
        return f"{name} is unknown: {plain} holds for the whole job, set it without the prefix"
    nearest = difflib.get_close_matches(name, TARGETS, n=1)
    if nearest:
        return f"{name} is unknown; did you mean {nearest[0]}?"
    return f"{name} is unknown; `train --list-hyperparameters` shows the known ones"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def summary(problems: list[str]) -> str:
    """Return the message of all problems of a job's hyperparameters."""
    if len(problems) == 1:
        return f"hyperparameter {problems[0]}"
    return "\n- ".join([f"{len(problems)} hyperparameters are wrong:", *problems])


def _schema(field: FieldInfo) -> dict[str, Any]:
    """Return the JSON schema of a field's values, None and `auto` left out."""
    schema = TypeAdapter(field.rebuild_annotation()).json_schema()
    first, *_ = schema.get("anyOf", [schema])
    return dict(first)


def _describe(field: FieldInfo) -> str:
    """Describe a field's type and range, in words that follow "must be"."""
    match _schema(field):
        case {"enum": [*words, last]}:
            return f"{', '.join(str(word) for word in words)} or {last}"
        case {"type": "array", "items": {"enum": words}}:
            return f"a list of {', '.join(words)}"
        case {"type": "string", "maxLength": length}:
            return f"a text of at most {length} characters"
        case {"type": "boolean"}:
            return "true or false"
        case limits:
            noun = "a whole number" if limits["type"] == "integer" else "a number"
            bounds = {
                "minimum": "from",
                "exclusiveMinimum": "above",
                "maximum": "to",
                "exclusiveMaximum": "below",
            }
            ends = [f"{word} {limits[key]:,}" for key, word in bounds.items() if key in limits]
            auto = " or auto" if Literal["auto"] in get_args(field.annotation) else ""
            return f"{noun} {' '.join(ends)}{auto}"


def _describe_default(targets: list[_Target]) -> str:
    defaults = {target.stage: _default_words(target) for target in targets}
    if len({*defaults.values()}) == 1:
        return _default_words(targets[0])
    return ", ".join(f"{stage} {default}" for stage, default in defaults.items())


def _default_words(target: _Target) -> str:
    default = target.field.default
    if default is None:
        overrides = (
            target.stage is not None and target.name not in StageHyperparameters.model_fields
        )
        return "of the size" if overrides else "—"
    return f"`{default}`" if default not in ("", ()) else "—"
