"""`deploy`: a trained model as an endpoint, or as one batch.

    realtime     instances that are always on, scaled by the requests in progress
    async        requests wait in a queue; no instance while there are none
    serverless   CPU only, paid by the second of work
    batch        a file of captions in, images out, and nothing left running

Model and endpoint configuration are named by a digest of their content. So a second run finds them,
and a changed option or a newly pushed image creates new ones and updates the endpoint.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from dalle.errors import AwsError, UserError
from infra.aws.limits import Deployment, check_deployment
from infra.aws.project import (
    PRESUMED_IMAGE,
    PRESUMED_OUTPUTS,
    Image,
    Project,
    StackOutputs,
    add_project_arguments,
    open_project,
)
from infra.aws.request import Request, describe, digest, newest_first, placeholder
from infra.aws.storage import check_readable
from infra.endpoint import autoscaling, batch
from infra.endpoint import options as endpoint_options
from infra.endpoint.idle_cost import expected_idle_cost

VARIANT = "main"
POLL_SECONDS = 15.0
PRESUMED_MODEL = "s3://<Bucket>/<model>.tar.gz"


@dataclass(frozen=True)
class Plan:
    """What `deploy` creates. target: an endpoint's configuration, or a batch."""

    deployment: Deployment
    model: Request
    target: Request | batch.Batch

    @property
    def model_name(self) -> str:
        return str(self.model.parameters["ModelName"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    endpoint_options.add_arguments(parser)
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    endpoint_options.check_given(options)
    project = open_project(options)
    make_plan(options, project, PRESUMED_OUTPUTS, PRESUMED_IMAGE, options.model or PRESUMED_MODEL)
    outputs = project.stack_outputs()
    image = project.image(outputs.repository, options.tag)
    if options.model:
        check_readable(project, outputs, [options.model])
    model_data = options.model or newest_model(project)
    plan = make_plan(options, project, outputs, image, model_data)
    deployment, model_name = plan.deployment, plan.model_name
    project.ensure("Model", model_name, plan.model)
    if isinstance(plan.target, batch.Batch):
        return batch.run(project, plan.target, options.out)
    config_name = plan.target.parameters["EndpointConfigName"]
    project.ensure("EndpointConfig", config_name, plan.target)
    state = put_endpoint(project, deployment.name, config_name, wait=options.wait)
    if options.wait or project.aws.dry_run:
        autoscaling.scale(project, deployment, VARIANT)
    elif autoscaling.is_wanted(deployment):
        project.output.line("run the same command again once it is in service, to scale it")
    if not project.aws.dry_run:
        project.output.item("costs", expected_idle_cost(deployment, project.aws.region))
    suffix = f" --endpoint {deployment.name}" if options.name else ""
    project.output.line(f"\ntry it: python -m infra invoke 'a caption'{suffix}")
    return project.output.finish(
        endpoint=deployment.name,
        mode=deployment.mode,
        state=state,
        model=model_name,
        configuration=config_name,
        model_data=deployment.model_data,
        image=deployment.image_uri,
    )


def make_plan(
    options: argparse.Namespace,
    project: Project,
    outputs: StackOutputs,
    image: Image,
    model_data: str,
) -> Plan:
    """Return what the options describe. Raises PlanError for what the platform would refuse.

    Called twice: with stand-ins before the first request, and with AWS's answers after it.
    """
    deployment = endpoint_options.read(options, project.name, image, model_data)
    check_deployment(deployment)
    model = model_request(deployment, outputs, project.tags)
    project.aws.check(model)
    name = str(model.parameters["ModelName"])
    if deployment.mode == "batch":
        job = batch.plan(deployment, name, outputs.bucket, options.captions, project.tags)
        project.aws.check(job.request)
        return Plan(deployment, model, job)
    config = config_request(deployment, name, outputs, project.tags)
    project.aws.check(config)
    return Plan(deployment, model, config)


def newest_model(project: Project) -> str:
    """Return the model.tar.gz of the newest completed training job. Raises UserError."""
    jobs = project.aws.items(
        newest_first("TrainingJob", f"{project.name}-", StatusEquals="Completed"),
        "TrainingJobSummaries",
        answer=[{"TrainingJobName": placeholder("newest completed training job")}],
    )
    for job in jobs:
        described = project.aws.call(
            describe("TrainingJob", job["TrainingJobName"]),
            answer={"ModelArtifacts": {"S3ModelArtifacts": PRESUMED_MODEL}},
        )
        if project.aws.dry_run or project.owns(described["TrainingJobArn"]):
            return str(described["ModelArtifacts"]["S3ModelArtifacts"])
    raise UserError(
        f"project {project.name} has no completed training job; run `python -m infra train` "
        "first, or name a model by --model s3://…/model.tar.gz"
    )


def model_request(
    deployment: Deployment, outputs: StackOutputs, tags: list[dict[str, str]]
) -> Request:
    """Return the request that creates the model: image, weights, environment, role."""
    request: dict[str, Any] = {
        "PrimaryContainer": {
            "Image": deployment.image_uri,
            "ModelDataUrl": deployment.model_data,
            "Environment": dict(deployment.environment or {}),
        },
        "ExecutionRoleArn": outputs.role_arn,
    }
    if deployment.isolate:
        request["EnableNetworkIsolation"] = True
    name = f"{deployment.name}-{digest(request)}"
    return Request("sagemaker", "CreateModel", ModelName=name, **request, Tags=tags)


def config_request(
    deployment: Deployment, model_name: str, outputs: StackOutputs, tags: list[dict[str, str]]
) -> Request:
    """Return the request that creates the endpoint configuration, without data capture."""
    request: dict[str, Any] = {"ProductionVariants": [variant(deployment, model_name)]}
    if deployment.mode == "async":
        folder = f"s3://{outputs.bucket}/async/{deployment.name}"
        request["AsyncInferenceConfig"] = {
            "ClientConfig": {
                "MaxConcurrentInvocationsPerInstance": deployment.concurrent_per_instance
            },
            "OutputConfig": {
                "S3OutputPath": f"{folder}/replies/",
                "S3FailurePath": f"{folder}/failures/",
            },
        }
    name = f"{deployment.name}-{digest(request)}"
    return Request(
        "sagemaker", "CreateEndpointConfig", EndpointConfigName=name, **request, Tags=tags
    )


def variant(deployment: Deployment, model_name: str) -> dict[str, Any]:
    """Return the one production variant: instances of a type, or a serverless configuration."""
    found: dict[str, Any] = {"VariantName": VARIANT, "ModelName": model_name}
    if deployment.mode == "serverless":
        serverless = {
            "MemorySizeInMB": deployment.memory_mb,
            "MaxConcurrency": deployment.max_concurrency,
            "ProvisionedConcurrency": deployment.provisioned_concurrency,
        }
        given = {key: value for key, value in serverless.items() if value is not None}
        return {**found, "ServerlessConfig": given}
    found |= {
        "InstanceType": deployment.instance_type,
        # One at least, even with a minimum of 0: the scaling removes it without requests.
        "InitialInstanceCount": max(1, deployment.min_instances),
        "InitialVariantWeight": 1.0,
        "ModelDataDownloadTimeoutInSeconds": deployment.download_seconds,
        "ContainerStartupHealthCheckTimeoutInSeconds": deployment.startup_seconds,
    }
    if deployment.mode == "realtime":
        # Requests are long and differ in length: the next goes where the fewest are in progress.
        found["RoutingConfig"] = {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
    if deployment.volume_gb is not None:
        found["VolumeSizeInGB"] = deployment.volume_gb
    if deployment.ami is not None:
        found["InferenceAmiVersion"] = deployment.ami
    return found


def put_endpoint(project: Project, name: str, config_name: str, *, wait: bool) -> str:
    """Create the endpoint, or change its configuration; return `made`, `updated`, `already there`.

    Raises AwsError with the platform's reason when it does not come into service, and UserError
    when the endpoint of that name is not the project's.
    """
    output = project.output
    request = describe("Endpoint", name)
    target = {"EndpointName": name, "EndpointConfigName": config_name}
    found = project.find_ours("Endpoint", name)
    if found is not None and found["EndpointStatus"] not in ("InService", "Failed"):
        output.item(f"endpoint {name}", f"is {found['EndpointStatus']}; waiting")
        found = project.aws.wait(request, _rests, every_seconds=POLL_SECONDS)
    if found is not None and found["EndpointStatus"] == "Failed":
        # A failed endpoint can only be deleted; a new one takes its name.
        output.item(f"endpoint {name}", "had failed; deleted")
        project.aws.call(Request("sagemaker", "DeleteEndpoint", EndpointName=name))
        project.aws.until_gone(f"the end of endpoint {name}", request, every_seconds=POLL_SECONDS)
        found = None
    if found is None:
        state = "made"
        project.aws.call(Request("sagemaker", "CreateEndpoint", **target, Tags=project.tags))
    elif found["EndpointConfigName"] == config_name:
        state = "already there"
    else:
        state = "updated"
        project.aws.call(Request("sagemaker", "UpdateEndpoint", **target))
    if not wait:
        output.item(f"endpoint {name}", f"{state}; not waited for")
        return state
    ready = project.aws.wait(request, _rests, every_seconds=POLL_SECONDS)
    if not project.aws.dry_run and ready["EndpointStatus"] != "InService":
        raise AwsError(
            f"endpoint {name} is {ready['EndpointStatus']}: "
            f"{ready.get('FailureReason', 'no reason given')}; its log: python -m infra logs {name}"
        )
    if not project.aws.dry_run and ready["EndpointConfigName"] != config_name:
        raise AwsError(
            f"endpoint {name} went back to configuration {ready['EndpointConfigName']}: "
            f"{ready.get('FailureReason', 'no reason given')}; its log: python -m infra logs {name}"
        )
    output.item(f"endpoint {name}", f"{state}, in service")
    return state


def _rests(answer: dict[str, Any]) -> bool:
    return not answer["EndpointStatus"].endswith("ing")
