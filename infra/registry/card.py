"""The model card of a registered model, in the form that the Model Registry reads.

It names the training job with its data, image and hyperparameters, and the last metrics. The
artefact's own MODEL_CARD.md says more: it is written where the models can be opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_CARD = 100_000
"""Characters, by the API's model."""
VALIDATION = "_validation_"
PURPOSE = "Generate images from captions, of the kind that the training data show."
LIMITS = (
    "It draws what its training data show, with their faults and biases. Look at generated images "
    "before they are published, and say that a model made them."
)


@dataclass(frozen=True)
class Trained:
    """A completed training job, as far as the registry is told of it.

    data: channel -> address. metrics: the last value of each.
    """

    job: str
    arn: str
    image: str
    model: str
    data: Mapping[str, str]
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def trained(job: Mapping[str, Any], metrics: Mapping[str, float]) -> Trained:
    """Return what SageMaker describes of a job. metrics: of its log, beside those it lists."""
    listed = {m["MetricName"]: m["Value"] for m in job.get("FinalMetricDataList", [])}
    channels = {
        each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"]
        for each in job.get("InputDataConfig", [])
    }
    return Trained(
        job=job["TrainingJobName"],
        arn=job["TrainingJobArn"],
        image=job["AlgorithmSpecification"]["TrainingImage"],
        model=job["ModelArtifacts"]["S3ModelArtifacts"],
        data=channels,
        hyperparameters=job.get("HyperParameters", {}),
        metrics={**listed, **metrics},
    )


def card(model: Trained, creator: str) -> dict[str, Any]:
    """Return the content of a card for a model package."""
    values = [{"name": name, "value": value} for name, value in sorted(model.metrics.items())]
    held_out = [{**each, "type": "number"} for each in values if VALIDATION in str(each["name"])]
    details = {
        "training_arn": model.arn,
        "training_datasets": [uri for _, uri in sorted(model.data.items())],
        "training_environment": {"container_image": [model.image]},
        "training_metrics": values,
        "hyper_parameters": [
            {"name": name, "value": value[:255]}
            for name, value in sorted(model.hyperparameters.items())
        ],
    }
    found: dict[str, Any] = {
        "model_overview": {"model_creator": creator, "model_artifact": [model.model]},
        "intended_uses": {"purpose_of_model": PURPOSE, "intended_uses": PURPOSE},
        "training_details": {"training_job_details": details},
        "additional_information": {"caveats_and_recommendations": LIMITS},
    }
    if held_out:
        group = {"name": "held-out pairs", "metric_data": held_out}
        found["evaluation_details"] = [{"name": "validation", "metric_groups": [group]}]
    return found
