"""`deploy`: a trained model as an endpoint, or as one batch.

    realtime     instances that are always on, scaled by the requests in progress
    async        requests wait in a queue; no instance while there are none
    serverless   CPU alone, paid by the second of work
    batch        a file of captions in, pictures out, and nothing left running

Model and endpoint configuration are named by a digest of what they say, so that a second run finds
them, and a changed option or a newly pushed image makes new ones and updates the endpoint.
"""

from __future__ import annotations

import argparse
from typing import Any

from dalle.errors import AwsError, UserError
from infra.aws import project
from infra.aws.limits import Deployment, check_deployment
from infra.aws.project import Outputs, Project
from infra.aws.request import Call, digest, placeholder
from infra.endpoint import autoscaling, batch
from infra.endpoint import options as endpoint_options
from infra.endpoint.standing_cost import expected

VARIANT = "main"
POLL_SECONDS = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    endpoint_options.add_arguments(parser)
    project.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    endpoint_options.check_given(options)
    opened = project.open_project(options)
    outputs = opened.outputs()
    image = opened.image(outputs.repository, options.tag)
    model_data = options.model or newest_model(opened)
    wanted = endpoint_options.read(options, opened.name, image, model_data)
    check_deployment(wanted)
    model = model_call(wanted, outputs, opened.tags)
    model_name = model.parameters["ModelName"]
    if wanted.mode == "batch":
        work = batch.plan(wanted, model_name, outputs.bucket, options.captions, opened.tags)
        opened.aws.check(work.job)
        opened.ensure(f"model {model_name}", _look("Model", model_name), model)
        return batch.run(opened, work, options.out)
    config = config_call(wanted, model_name, outputs, opened.tags)
    config_name = config.parameters["EndpointConfigName"]
    # The whole plan is looked at before its first part is made.
    opened.aws.check(config)
    opened.ensure(f"model {model_name}", _look("Model", model_name), model)
    opened.ensure(f"configuration {config_name}", _look("EndpointConfig", config_name), config)
    state = put_endpoint(opened, wanted.name, config_name, wait=options.wait)
    if options.wait or opened.aws.dry_run:
        autoscaling.scale(opened, wanted, VARIANT)
    elif autoscaling.is_wanted(wanted):
        opened.console.say("run the same command again once it is in service, for its scaling")
    if not opened.aws.dry_run:
        opened.console.item("costs", expected(wanted, opened.aws.region))
    opened.console.say(f"\ndraw: python -m infra invoke 'a caption'{_suffix(options, wanted)}")
    return opened.console.finish(
        endpoint=wanted.name,
        mode=wanted.mode,
        state=state,
        model=model_name,
        configuration=config_name,
        model_data=wanted.model_data,
        image=wanted.image_uri,
    )


def _suffix(options: argparse.Namespace, wanted: Deployment) -> str:
    return f" --endpoint {wanted.name}" if options.name else ""


def newest_model(opened: Project) -> str:
    """The model.tar.gz of the training job that finished last. Raises UserError without one."""
    jobs = opened.aws.items(
        Call(
            "sagemaker",
            "ListTrainingJobs",
            {
                "NameContains": f"{opened.name}-",
                "StatusEquals": "Completed",
                "SortBy": "CreationTime",
                "SortOrder": "Descending",
            },
        ),
        "TrainingJobSummaries",
        answer=[{"TrainingJobName": placeholder("newest completed training job")}],
    )
    for job in jobs:
        described = opened.aws.call(
            Call("sagemaker", "DescribeTrainingJob", {"TrainingJobName": job["TrainingJobName"]}),
            answer={"ModelArtifacts": {"S3ModelArtifacts": "s3://<Bucket>/<model>.tar.gz"}},
        )
        if opened.aws.dry_run or opened.owns(described["TrainingJobArn"]):
            return str(described["ModelArtifacts"]["S3ModelArtifacts"])
    raise UserError(
        f"project {opened.name} has no completed training job; run `python -m infra train` "
        "first, or name a model by --model s3://…/model.tar.gz"
    )


def model_call(wanted: Deployment, outputs: Outputs, tags: list[dict[str, str]]) -> Call:
    """The request that makes the model: image, weights, environment, role."""
    request: dict[str, Any] = {
        "PrimaryContainer": {
            "Image": wanted.image_uri,
            "ModelDataUrl": wanted.model_data,
            "Environment": dict(wanted.environment or {}),
        },
        "ExecutionRoleArn": outputs.role_arn,
    }
    if wanted.isolate:
        request["EnableNetworkIsolation"] = True
    name = f"{wanted.name}-{digest(request)}"
    return Call("sagemaker", "CreateModel", {"ModelName": name, **request, "Tags": tags})


def config_call(
    wanted: Deployment, model_name: str, outputs: Outputs, tags: list[dict[str, str]]
) -> Call:
    """The request that makes the endpoint configuration. Data capture is off: there is no word of
    it."""
    request: dict[str, Any] = {"ProductionVariants": [variant(wanted, model_name)]}
    if wanted.mode == "async":
        folder = f"s3://{outputs.bucket}/async/{wanted.name}"
        request["AsyncInferenceConfig"] = {
            "ClientConfig": {"MaxConcurrentInvocationsPerInstance": wanted.concurrent_per_instance},
            "OutputConfig": {
                "S3OutputPath": f"{folder}/replies/",
                "S3FailurePath": f"{folder}/failures/",
            },
        }
    name = f"{wanted.name}-{digest(request)}"
    return Call(
        "sagemaker", "CreateEndpointConfig", {"EndpointConfigName": name, **request, "Tags": tags}
    )


def variant(wanted: Deployment, model_name: str) -> dict[str, Any]:
    """The one production variant: instances of a type, or a serverless share."""
    found: dict[str, Any] = {"VariantName": VARIANT, "ModelName": model_name}
    if wanted.mode == "serverless":
        serverless = {
            "MemorySizeInMB": wanted.memory_mb,
            "MaxConcurrency": wanted.max_concurrency,
            "ProvisionedConcurrency": wanted.provisioned_concurrency,
        }
        given = {key: value for key, value in serverless.items() if value is not None}
        return {**found, "ServerlessConfig": given}
    found |= {
        "InstanceType": wanted.instance_type,
        # One at least, even where none may remain: scaling takes it away when nobody asks.
        "InitialInstanceCount": max(1, wanted.min_instances),
        "InitialVariantWeight": 1.0,
        "ModelDataDownloadTimeoutInSeconds": wanted.download_seconds,
        "ContainerStartupHealthCheckTimeoutInSeconds": wanted.startup_seconds,
    }
    if wanted.mode == "realtime":
        # Drawings take long and differ in length: the next goes where fewest are in progress.
        found["RoutingConfig"] = {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
    if wanted.volume_gb is not None:
        found["VolumeSizeInGB"] = wanted.volume_gb
    if wanted.ami is not None:
        found["InferenceAmiVersion"] = wanted.ami
    return found


def put_endpoint(opened: Project, name: str, config_name: str, *, wait: bool) -> str:
    """Make the endpoint, or change its configuration; returns what became of it.

    Raises AwsError with the platform's reason when it does not come into service.
    """
    console = opened.console
    call = _look("Endpoint", name)
    target = {"EndpointName": name, "EndpointConfigName": config_name}
    found = opened.aws.find(call)
    if found is not None and found["EndpointStatus"] not in ("InService", "Failed"):
        console.item(f"endpoint {name}", f"is {found['EndpointStatus']}; waiting")
        found = opened.aws.wait(call, _rests, every_seconds=POLL_SECONDS)
    if found is not None and found["EndpointStatus"] == "Failed":
        # It can only be deleted; a new one takes its name.
        console.item(f"endpoint {name}", "had failed; deleted")
        opened.aws.call(Call("sagemaker", "DeleteEndpoint", {"EndpointName": name}))
        opened.aws.until(
            f"the end of endpoint {name}",
            lambda: opened.aws.find(call) is None,
            every_seconds=POLL_SECONDS,
        )
        found = None
    if found is None:
        state = "made"
        opened.aws.call(Call("sagemaker", "CreateEndpoint", {**target, "Tags": opened.tags}))
    elif found["EndpointConfigName"] == config_name:
        state = "already there"
    else:
        state = "updated"
        opened.aws.call(Call("sagemaker", "UpdateEndpoint", target))
    if not wait:
        console.item(f"endpoint {name}", f"{state}; not waited for")
        return state
    ready = opened.aws.wait(call, _rests, every_seconds=POLL_SECONDS)
    if not opened.aws.dry_run and ready["EndpointStatus"] != "InService":
        raise AwsError(
            f"endpoint {name} is {ready['EndpointStatus']}: "
            f"{ready.get('FailureReason', 'no reason given')}; its log: python -m infra logs {name}"
        )
    if not opened.aws.dry_run and ready["EndpointConfigName"] != config_name:
        raise AwsError(
            f"endpoint {name} went back to configuration {ready['EndpointConfigName']}: "
            f"{ready.get('FailureReason', 'no reason given')}; its log: python -m infra logs {name}"
        )
    console.item(f"endpoint {name}", f"{state}, in service")
    return state


def _rests(answer: dict[str, Any]) -> bool:
    return not answer["EndpointStatus"].endswith("ing")


def _look(kind: str, name: str) -> Call:
    return Call("sagemaker", f"Describe{kind}", {f"{kind}Name": name})
