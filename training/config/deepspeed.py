"""DeepSpeed's configuration, from hyperparameters and from the JSON of a job. No torch.

A key of the JSON (`deepspeed_config`) that a hyperparameter decides sets that hyperparameter, or
must agree with it. Of the other keys those may be set that change how DeepSpeed works but not what
it computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dalle.errors import HyperparameterError
from dalle.types import StageName
from training.config.fields import Hyperparameters, StageHyperparameters

TRAINED_BY_DEEPSPEED: tuple[StageName, ...] = ("transformer",)
"""Stages for DeepSpeed. dVAE and CLIP fit on any device and stay with torch's engine.

DeepSpeed would also train them wrongly: the dVAE's quantiser writes new vectors into weights, which
ZeRO's copies would undo a step later, and DeepSpeed 0.19 cannot broadcast a parameter without
dimensions, such as CLIP's logit scale.
"""

AUTO = "auto"
"""Value that stands for the hyperparameter's, as in other tools' files."""

BUCKET_ELEMENTS = 50_000_000
"""Most gradients or weights exchanged at once: 100 MB of bf16."""

Key = tuple[str, ...]


@dataclass(frozen=True)
class Implied:
    """A hyperparameter that a key of the JSON decides; text: its value as a hyperparameter."""

    key: Key
    name: str
    text: str


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _is_on_cpu(value: Any) -> str:
    words = {"cpu": "true", "none": "false"}
    if value not in words:
        raise ValueError(f"must be cpu or none, got {value!r}")
    return words[value]


# Key -> the hyperparameter that decides the same, and the conversion of the JSON's value.
_DECIDED: dict[Key, tuple[str, Callable[[Any], str]]] = {
    ("train_batch_size",): ("batch_size", _plain),
    ("gradient_accumulation_steps",): ("gradient_accumulation_steps", _plain),
    ("gradient_clipping",): ("gradient_clipping", _plain),
    ("zero_optimization", "stage"): ("zero_stage", _plain),
    ("zero_optimization", "offload_optimizer", "device"): ("offload_optimizer", _is_on_cpu),
    ("zero_optimization", "offload_param", "device"): ("offload_parameters", _is_on_cpu),
}
_PRECISIONS: dict[Key, str] = {("fp16", "enabled"): "fp16", ("bf16", "enabled"): "bf16"}
_MICRO_BATCH: Key = ("train_micro_batch_size_per_gpu",)

# Keys that may be set without a hyperparameter.
_FREE_KEYS = """
communication_data_type comms_logger.enabled comms_logger.verbose data_types.grad_accum_dtype
dump_state gradient_predivide_factor memory_breakdown prescale_gradients steps_per_print
wall_clock_breakdown fp16.consecutive_hysteresis fp16.hysteresis fp16.initial_scale_power
fp16.loss_scale fp16.loss_scale_window fp16.min_loss_scale zero_optimization.allgather_bucket_size
zero_optimization.allgather_partitions zero_optimization.contiguous_gradients
zero_optimization.overlap_comm zero_optimization.reduce_bucket_size zero_optimization.reduce_scatter
zero_optimization.round_robin_gradients zero_optimization.stage3_max_live_parameters
zero_optimization.stage3_max_reuse_distance zero_optimization.stage3_param_persistence_threshold
zero_optimization.stage3_prefetch_bucket_size zero_optimization.sub_group_size
zero_optimization.offload_optimizer.pin_memory zero_optimization.offload_param.pin_memory
"""
_FREE: frozenset[Key] = frozenset(tuple(key.split(".")) for key in _FREE_KEYS.split())

# Advice for the commonest of the refused keys.
_INSTEAD: dict[str, str] = {
    "optimizer": "it is AdamW; set learning_rate and weight_decay",
    "scheduler": "set learning_rate and warmup_steps",
    "activation_checkpointing": "set activation_checkpointing=true as a hyperparameter",
    "tensorboard": "TensorBoard's files are written anyway",
    "amp": "set precision",
    "torch_autocast": "set precision",
}
_MAX_DEPTH = 8  # of objects in a deepspeed_config; no key of DeepSpeed's is deeper


def read_json(text: str) -> list[Implied]:
    """Return the hyperparameters that a `deepspeed_config` decides; none for an empty text.

    Raises HyperparameterError with every key that is unknown, unsupported or decided elsewhere.
    """
    implied: list[Implied] = []
    problems: list[str] = []
    enabled: list[Key] = []
    for key, value in _leaves(_parsed(text)):
        name = ".".join(key)
        if value == AUTO:
            if key not in _DECIDED and key not in _PRECISIONS and key != _MICRO_BATCH:
                problems.append(f"{name} must be given; auto stands for a hyperparameter's value")
        elif key in _DECIDED:
            hyperparameter, in_words = _DECIDED[key]
            try:
                implied.append(Implied(key, hyperparameter, in_words(value)))
            except ValueError as error:
                problems.append(f"{name} {error}")
        elif key in _PRECISIONS:
            if not isinstance(value, bool):
                problems.append(f"{name} must be true or false, got {value!r}")
            elif value:
                enabled.append(key)
        elif key not in _FREE and key != _MICRO_BATCH:
            instead = _INSTEAD.get(key[0])
            problems.append(
                f"{name} is not for a job to set"
                if instead is None
                else f"{key[0]} is not for a job to set: {instead}"
            )
    if len(enabled) > 1:
        problems.append("fp16 and bf16 are both enabled; enable one of them")
    elif enabled:
        implied.append(Implied(enabled[0], "precision", _PRECISIONS[enabled[0]]))
    if problems:
        raise HyperparameterError(
            "\n".join(f"deepspeed_config: {problem}" for problem in dict.fromkeys(problems))
        )
    return implied


def refused_combinations(hyperparameters: Hyperparameters) -> list[str]:
    """Return a line for each combination of hyperparameters that DeepSpeed cannot train with."""
    if hyperparameters.engine != "deepspeed":
        return []
    problems = []
    zero_stage = hyperparameters.zero_stage
    if hyperparameters.offload_optimizer and zero_stage == 0:
        problems.append(
            "offload_optimizer needs zero_stage 1, 2 or 3: at 0 no device has only its share"
        )
    if hyperparameters.offload_parameters and zero_stage != 3:
        problems.append(f"offload_parameters needs zero_stage=3, got zero_stage={zero_stage}")
    for stage in TRAINED_BY_DEEPSPEED:
        precision = hyperparameters.of(stage).precision
        is_trained = hyperparameters.stage in ("all", stage)
        if is_trained and zero_stage == 0 and precision != "fp32":
            problems.append(
                f"{stage}: precision={precision} needs zero_stage 1, 2 or 3: at 0 there are no "
                "fp32 weights for updates that are small beside them"
            )
    return problems


def configuration(
    hyperparameters: Hyperparameters,
    settings: StageHyperparameters,
    *,
    num_ranks: int,
    num_parameters: int,
    is_on_cpu: bool,
) -> dict[str, Any]:
    """Return the config for `deepspeed.initialize` of one stage.

    Raises HyperparameterError for a micro-batch size in the JSON that contradicts the batch size.
    """
    parts = settings.gradient_accumulation_steps
    part_size = settings.pairs_per_step // (num_ranks * parts)
    zero_stage = hyperparameters.zero_stage
    # An even number, and no more than the model has.
    bucket = min(BUCKET_ELEMENTS, num_parameters + num_parameters % 2)
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "allgather_bucket_size": bucket,
        "reduce_bucket_size": bucket,
    }
    if zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
    # Page-locked memory speeds up copies to a GPU.
    in_host_memory = {"device": "cpu", "pin_memory": not is_on_cpu}
    if hyperparameters.offload_optimizer:
        zero["offload_optimizer"] = in_host_memory
    if hyperparameters.offload_parameters:
        zero["offload_param"] = in_host_memory
    config: dict[str, Any] = {
        "train_batch_size": part_size * num_ranks * parts,
        "train_micro_batch_size_per_gpu": part_size,
        "gradient_accumulation_steps": parts,
        # Without the key it is 1. At ZeRO 0 `DeepSpeedEngine` clips, because it reports the norm.
        "gradient_clipping": settings.gradient_clipping if zero_stage else 0.0,
        "fp16": {"enabled": settings.precision == "fp16"},
        # A gradient that is not finite ends the job; with fp16 the step is skipped.
        "bf16": {"enabled": settings.precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": zero,
        # torch's AdamW in host memory too: DeepSpeed's needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }
    if parts > 1 and settings.precision != "fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # sums of rounded numbers round again
    for key, value in _leaves(_parsed(hyperparameters.deepspeed_config)):
        if key == _MICRO_BATCH and value not in (AUTO, part_size):
            raise HyperparameterError(
                f"deepspeed_config: train_micro_batch_size_per_gpu must be {part_size} "
                f"(batch_size {settings.pairs_per_step} / {num_ranks} devices / "
                f"gradient_accumulation_steps {parts}), got {value!r}"
            )
        if key in _FREE and value != AUTO:
            section = config
            for name in key[:-1]:
                section = section.setdefault(name, {})
            section[key[-1]] = value
    return config


def _parsed(text: str) -> Mapping[str, Any]:
    if not text:
        return {}
    try:
        config = json.loads(text)
    except RecursionError:
        raise HyperparameterError(
            "deepspeed_config is nested too deeply", field="deepspeed_config"
        ) from None
    except ValueError as error:
        raise HyperparameterError(f"deepspeed_config is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise HyperparameterError(f"deepspeed_config must be a JSON object, got {text[:40]!r}")
    return config


def _leaves(config: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every value that is not an object, with the keys that lead to it."""
    for name, value in config.items():
        # A deeper object is a value, and its key is refused.
        if isinstance(value, dict) and len(above) < _MAX_DEPTH:
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value
