"""The definition of a pipeline that trains, evaluates and registers, as the JSON of SageMaker's.

    Train      a training job; it evaluates on the held-out pairs
    Measure    a condition for each metric that is required
    Register   the model into the project's group, when all conditions hold
    Refuse     otherwise: the run fails and names what was required

Pure functions; no SDK is needed to make or to run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.aws.request import Request
from infra.registry.package import PENDING, package

VERSION = "2020-12-01"
TRAIN = "Train"
LESS_OR_EQUAL, GREATER_OR_EQUAL = "LessThanOrEqualTo", "GreaterThanOrEqualTo"


def definition(
    training: Request, group: str, required: Mapping[str, float], *, image: str
) -> dict[str, Any]:
    """Return the definition. training: CreateTrainingJob, as `train` would send it.

    required: metric -> the value that it must not be above, or below for an accuracy. Each is a
    parameter of the pipeline, which a run may set to another value.
    """
    parameters: list[dict[str, Any]] = [
        {"Name": "ApprovalStatus", "Type": "String", "DefaultValue": PENDING}
    ]
    parameters += [
        {"Name": parameter(metric), "Type": "Float", "DefaultValue": value}
        for metric, value in required.items()
    ]
    register = {
        "Name": "Register",
        "Type": "RegisterModel",
        "Arguments": package(
            group,
            image,
            _get(f"Steps.{TRAIN}.ModelArtifacts.S3ModelArtifacts"),
            _get("Parameters.ApprovalStatus"),
        ),
    }
    limits = ", ".join(f"{metric} {_words(metric)} {value:g}" for metric, value in required.items())
    refuse = {
        "Name": "Refuse",
        "Type": "Fail",
        "Arguments": {"ErrorMessage": f"The model is not registered. Required: {limits}"},
    }
    measure = {
        "Name": "Measure",
        "Type": "Condition",
        "Arguments": {
            "Conditions": [condition(metric) for metric in required],
            "IfSteps": [register],
            "ElseSteps": [refuse],
        },
    }
    train = {"Name": TRAIN, "Type": "Training", "Arguments": training_arguments(training)}
    return {
        "Version": VERSION,
        "Metadata": {},
        "Parameters": parameters,
        "Steps": [train, measure],
    }


def training_arguments(training: Request) -> dict[str, Any]:
    """Return the arguments of the training step: without a name, which every run makes anew.

    Checkpoints have a folder for each run: another run must not continue from them.
    """
    found = {key: value for key, value in training.parameters.items() if key != "TrainingJobName"}
    for key, field in (("CheckpointConfig", "S3Uri"), ("TensorBoardOutputConfig", "S3OutputPath")):
        folder = found[key][field].rstrip("/")
        run = {"Std:Join": {"On": "/", "Values": [folder, _get("Execution.PipelineExecutionId")]}}
        found[key] = {**found[key], field: run}
    return found


def condition(metric: str) -> dict[str, Any]:
    """Return the condition of one metric: its last value against the pipeline's parameter."""
    return {
        "Type": GREATER_OR_EQUAL if _is_better_high(metric) else LESS_OR_EQUAL,
        "LeftValue": _get(f"Steps.{TRAIN}.FinalMetricDataList['{metric}'].Value"),
        "RightValue": _get(f"Parameters.{parameter(metric)}"),
    }


def parameter(metric: str) -> str:
    """Return the pipeline's parameter of a metric: MaxClipValidationLoss."""
    words = "".join(word.capitalize() for word in metric.split("_"))
    return ("Min" if _is_better_high(metric) else "Max") + words


def _is_better_high(metric: str) -> bool:
    return not metric.endswith("loss")


def _words(metric: str) -> str:
    return "at least" if _is_better_high(metric) else "at most"


def _get(path: str) -> dict[str, str]:
    return {"Get": path}
