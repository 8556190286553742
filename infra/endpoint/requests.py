"""The requests for a model and for an endpoint's configuration: pure functions of a deployment."""

from __future__ import annotations

from typing import Any

from infra.aws.deployment import Deployment
from infra.aws.request import Request, digest, placeholder
from infra.aws.stack import StackOutputs
from infra.endpoint.fleet import copies, pool
from infra.endpoint.options import PROJECTS_TOPIC

VARIANT = "main"


def model_request(deployment: Deployment, outputs: StackOutputs) -> Request:
    """Return the request that creates the model: image, weights, environment, role, network.

    The network of a model that shares hosts is that of their configuration.
    """
    request: dict[str, Any] = {
        "PrimaryContainer": {
            "Image": deployment.image_uri,
            "ModelDataUrl": deployment.model_data,
            "Environment": dict(deployment.environment or {}),
        },
        "ExecutionRoleArn": outputs.role_arn,
    }
    if deployment.copies is None:
        request |= _network(deployment, outputs)
    name = f"{deployment.name}-{digest(request)}"
    return Request("sagemaker", "CreateModel", ModelName=name, **request, Tags=outputs.tags)


def config_request(deployment: Deployment, model_name: str, outputs: StackOutputs) -> Request:
    """Return the request that creates the endpoint configuration, without data capture."""
    keys = outputs.encryption
    request: dict[str, Any] = {
        "ProductionVariants": [variant(deployment, model_name)],
        **keys.volume_fields("KmsKeyId", deployment.instance_type),
    }
    if deployment.copies:
        request |= {"ExecutionRoleArn": outputs.role_arn, **_network(deployment, outputs)}
    if deployment.mode == "async":
        folder = f"s3://{outputs.bucket}/async/{deployment.name}"
        request["AsyncInferenceConfig"] = {
            "ClientConfig": {
                "MaxConcurrentInvocationsPerInstance": deployment.concurrent_per_instance
            },
            "OutputConfig": {
                "S3OutputPath": f"{folder}/replies/",
                "S3FailurePath": f"{folder}/failures/",
                **keys.output_fields,
                **notification(deployment, outputs.topic),
            },
        }
    name = f"{deployment.name}-{digest(request)}"
    operation = "CreateEndpointConfig"
    return Request("sagemaker", operation, EndpointConfigName=name, **request, Tags=outputs.tags)


def _network(deployment: Deployment, outputs: StackOutputs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if deployment.isolate:
        found["EnableNetworkIsolation"] = True
    if outputs.network.vpc_config:
        found["VpcConfig"] = outputs.network.vpc_config
    return found


def notification(deployment: Deployment, topic: str) -> dict[str, Any]:
    """Return the API's NotificationConfig with the topics that are told, or no field.

    topic: of the project, which stands behind the word `project`.
    """
    topic = topic or placeholder("TopicArn of the stack")
    given = {"SuccessTopic": deployment.success_topic, "ErrorTopic": deployment.error_topic}
    told = {
        key: topic if value == PROJECTS_TOPIC else value for key, value in given.items() if value
    }
    return {"NotificationConfig": told} if told else {}


def variant(deployment: Deployment, model_name: str) -> dict[str, Any]:
    """Return the one production variant: instances of a type, or a serverless configuration.

    It names no model where several share it: each of them names the variant.
    """
    found: dict[str, Any] = {"VariantName": VARIANT, "ModelName": model_name}
    if deployment.copies:
        found = {"VariantName": VARIANT, **copies.variant_fields(deployment)}
    if deployment.mode == "serverless":
        serverless = {
            "MemorySizeInMB": deployment.memory_mb,
            "MaxConcurrency": deployment.max_concurrency,
            "ProvisionedConcurrency": deployment.provisioned_concurrency,
        }
        given = {key: value for key, value in serverless.items() if value is not None}
        return {**found, "ServerlessConfig": given}
    found |= {
        **pool.variant_fields(deployment),
        # One at least, even with a minimum of 0: the scaling removes it without requests.
        "InitialInstanceCount": max(1, deployment.min_instances),
        "InitialVariantWeight": 1.0,
        **({} if deployment.copies else start_limits(deployment)),
    }
    if deployment.mode == "realtime":
        # Requests are long and differ in length: the next goes where the fewest are in progress.
        found["RoutingConfig"] = {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
    if deployment.volume_gb is not None:
        found["VolumeSizeInGB"] = deployment.volume_gb
    if deployment.ami is not None:
        found["InferenceAmiVersion"] = deployment.ami
    return found


def start_limits(deployment: Deployment) -> dict[str, int]:
    """Return the seconds that the start of a model may take: of a variant, or of a component."""
    return {
        "ModelDataDownloadTimeoutInSeconds": deployment.download_seconds,
        "ContainerStartupHealthCheckTimeoutInSeconds": deployment.startup_seconds,
    }
