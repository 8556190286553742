"""The requests that register a model: its group, its metrics in the bucket, its package."""

from __future__ import annotations

import json
from typing import Any

from infra.aws.request import Request
from infra.aws.stack import StackOutputs
from infra.registry.card import Trained, card

CONTENT_TYPES = ["application/json", "application/jsonlines", "text/plain"]
REPLY_TYPES = ["application/json", "application/jsonlines", "image/png", "image/jpeg", "image/webp"]
PENDING, APPROVED = "PendingManualApproval", "Approved"
JSON = "application/json"


def description(job: str) -> str:
    """Return the description of a package, by which a job's is found again."""
    return f"Training job {job}"


def group_request(group: str, tags: list[dict[str, str]]) -> Request:
    """Return the request that creates the group of a project's models."""
    return Request(
        "sagemaker",
        "CreateModelPackageGroup",
        ModelPackageGroupName=group,
        ModelPackageGroupDescription="Models of a dalle-sagemaker project: captions to images.",
        Tags=tags,
    )


def metrics_key(job: str) -> str:
    return f"registry/{job}/metrics.json"


def metrics_body(model: Trained) -> bytes:
    """Return the metrics in the form that the Model Registry shows."""
    values = {
        name: {"value": value, "standard_deviation": "NaN"}
        for name, value in sorted(model.metrics.items())
    }
    return json.dumps({"generation_metrics": values}, indent=2).encode()


def package(group: str, image: object, model: object, status: object) -> dict[str, Any]:
    """Return the part of a package that a registered model and a pipeline's step share.

    image, model, status: texts, or a pipeline's references to values of earlier steps.
    """
    return {
        "ModelPackageGroupName": group,
        "ModelApprovalStatus": status,
        "InferenceSpecification": {
            "Containers": [{"Image": image, "ModelDataUrl": model}],
            "SupportedContentTypes": CONTENT_TYPES,
            "SupportedResponseMIMETypes": REPLY_TYPES,
        },
    }


def package_request(model: Trained, group: str, outputs: StackOutputs, *, approve: bool) -> Request:
    """Return the request that registers a trained model with its metrics and its card."""
    found = package(group, model.image, model.model, APPROVED if approve else PENDING)
    statistics = {"ContentType": JSON, "S3Uri": f"s3://{outputs.bucket}/{metrics_key(model.job)}"}
    content = json.dumps(card(model, creator=group), sort_keys=True)
    return Request(
        "sagemaker",
        "CreateModelPackage",
        **found,
        ModelPackageDescription=description(model.job),
        ModelMetrics={"ModelQuality": {"Statistics": statistics}},
        ModelCard={"ModelCardContent": content, "ModelCardStatus": "Draft"},
        CustomerMetadataProperties={"training-job": model.job},
    )
