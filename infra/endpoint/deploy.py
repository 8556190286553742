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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dalle.errors import PlanError, UserError
from infra.aws import settings
from infra.aws.deployment import Deployment
from infra.aws.limits import check_deployment, has_own_disk, raise_all
from infra.aws.project import PRESUMED_IMAGE, Image, Project, add_project_arguments, open_project
from infra.aws.request import Request, describe, newest_first, placeholder
from infra.aws.stack import StackOutputs
from infra.aws.storage import check_readable
from infra.endpoint import autoscaling, batch, components, rollout
from infra.endpoint import options as endpoint_options
from infra.endpoint.fleet import copies, pool
from infra.endpoint.idle_cost import expected_idle_cost
from infra.endpoint.options import PROJECTS_TOPIC
from infra.endpoint.requests import VARIANT, config_request, model_request
from infra.endpoint.update import put_endpoint

PRESUMED_MODEL = "s3://<Bucket>/<model>.tar.gz"


@dataclass(frozen=True)
class Plan:
    """What `deploy` creates. target: an endpoint's configuration, or a batch.

    component: the model's place on hosts that it shares; None where it has its own.
    """

    deployment: Deployment
    model: Request
    target: Request | batch.Batch
    component: Request | None = None

    @property
    def model_name(self) -> str:
        return str(self.model.parameters["ModelName"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    endpoint_options.add_arguments(parser)
    rollout.add_arguments(parser)
    settings.add_arguments(parser)
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    endpoint_options.check_given(options)
    project = open_project(options)
    presumed = settings.presumed_outputs(project, options)
    model_data = options.model or PRESUMED_MODEL
    first = make_plan(options, project, presumed, PRESUMED_IMAGE, model_data)
    outputs = settings.stack_outputs(project, options)
    image = project.image(outputs.repository, options.tag)
    config_name = ""
    if first.component:
        options, config_name = components.on_present_hosts(project, options, first.deployment)
    if options.model:
        check_readable(project, outputs, [options.model])
    if options.registered:
        model_data, image = approved_model(project, image)
    else:
        model_data = options.model or model_of(newest_job(project))
    plan = make_plan(options, project, outputs, image, model_data)
    deployment, model_name = plan.deployment, plan.model_name
    project.ensure("Model", model_name, plan.model)
    if isinstance(plan.target, batch.Batch):
        return batch.run(project, plan.target, options.out)
    if not config_name:
        config_name = plan.target.parameters["EndpointConfigName"]
        project.ensure("EndpointConfig", config_name, plan.target)
    state = put_endpoint(
        project,
        deployment,
        config_name,
        outputs.tags,
        rollout=rollout.read(options),
        wait=options.wait,
    )
    if deployment.copies:
        scaling = autoscaling.of_copies(deployment.copies, deployment.concurrent_per_instance)
    else:
        scaling = autoscaling.of_instances(deployment, VARIANT)
    if options.wait or project.aws.dry_run:
        if plan.component:
            components.put_component(project, plan.component)
        autoscaling.scale(project, scaling, outputs.tags)
    elif plan.component or scaling.is_wanted:
        rest = "to put the model on it" if plan.component else "to scale it"
        project.output.line(f"run the same command again once it is in service, {rest}")
    if not project.aws.dry_run:
        project.output.item("costs", expected_idle_cost(deployment, project.aws.region))
    suffix = f" --endpoint {deployment.name}" if options.name else ""
    suffix += f" --component {deployment.copies.name}" if deployment.copies else ""
    project.output.line(f"\ntry it: python -m infra invoke 'a caption'{suffix}")
    return project.output.finish(
        endpoint=deployment.name,
        mode=deployment.mode,
        state=state,
        model=model_name,
        configuration=config_name,
        component=deployment.copies.name if deployment.copies else None,
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
    check_place(deployment, outputs)
    check_topics(project, deployment, outputs)
    update = rollout.read(options)
    raise_all(f"update of {deployment.name}", list(update.problems(deployment)) if update else [])
    model = model_request(deployment, outputs)
    project.aws.check(model)
    name = str(model.parameters["ModelName"])
    if deployment.mode == "batch":
        job = batch.plan(deployment, name, outputs, options.captions)
        project.aws.check(job.request)
        return Plan(deployment, model, job)
    config = config_request(deployment, name, outputs)
    project.aws.check(config)
    if deployment.copies is None:
        return Plan(deployment, model, config)
    shared = deployment, deployment.copies
    component = components.component_request(*shared, name, outputs.tags)
    project.aws.check(component)
    return Plan(deployment, model, config, component)


def check_place(deployment: Deployment, outputs: StackOutputs) -> None:
    """Raise PlanError where the hosts of this mode take no network or key of a team's."""
    wrong = list(
        outputs.encryption.problems(deployment.instance_type, is_job=deployment.mode == "batch")
    )
    if deployment.mode == "serverless" and outputs.network.vpc_config:
        wrong.append(
            "a serverless endpoint cannot be in a network of the account, and this project's "
            "hosts are in subnets; take --mode async, which costs nothing when idle either"
        )
    wrong += pool.problems(deployment)
    wrong += copies.problems(deployment)
    if outputs.encryption.volume and len(set(map(has_own_disk, deployment.pool))) > 1:
        wrong.append(
            f"of {', '.join(deployment.pool)} some have a built-in disk, which takes no key of "
            f"KMS, and the disks of the others have {outputs.encryption.volume}; an endpoint has "
            "one key for all: take types of one sort"
        )
    raise_all(f"deployment {deployment.name} ({deployment.mode})", wrong)


def check_topics(project: Project, deployment: Deployment, outputs: StackOutputs) -> None:
    """Raise PlanError for topics of another mode, and for that of a stack that has none."""
    given = (deployment.success_topic, deployment.error_topic)
    if any(given) and deployment.mode != "async":
        raise PlanError("--success-topic and --error-topic are for --mode async alone")
    if PROJECTS_TOPIC in given and not (outputs.topic or project.aws.dry_run):
        raise PlanError(
            "the project has no topic yet: `python -m infra bootstrap --mail ADDRESS` makes one, "
            "or name one by its ARN"
        )


def newest_job(project: Project) -> dict[str, Any]:
    """Return the newest completed training job as it is described. Raises UserError."""
    name = placeholder("newest completed training job")
    presumed = presumed_job(name)
    jobs = project.aws.items(
        newest_first("TrainingJob", f"{project.name}-", StatusEquals="Completed"),
        "TrainingJobSummaries",
        answer=[{"TrainingJobName": name}],
    )
    for job in jobs:
        described = project.aws.call(
            describe("TrainingJob", job["TrainingJobName"]), answer=presumed
        )
        if project.aws.dry_run or project.owns(described["TrainingJobArn"]):
            return described
    raise UserError(
        f"project {project.name} has no completed training job; run `python -m infra train` "
        "first, or name a model by --model s3://…/model.tar.gz"
    )


def presumed_job(name: str) -> dict[str, Any]:
    """Return a stand-in for a completed job, as a dry run has it."""
    return {
        "TrainingJobName": name,
        "TrainingJobArn": placeholder("ARN of the job"),
        "TrainingJobStatus": "Completed",
        "AlgorithmSpecification": {"TrainingImage": placeholder("address of the image")},
        "ModelArtifacts": {"S3ModelArtifacts": PRESUMED_MODEL},
    }


def model_of(job: Mapping[str, Any]) -> str:
    return str(job["ModelArtifacts"]["S3ModelArtifacts"])


def approved_model(project: Project, image: Image) -> tuple[str, Image]:
    """Return the newest approved model of the project's group, with the image it was trained by.

    image: the repository's, whose size is known. Raises UserError without an approved model.
    """
    project.find_ours("ModelPackageGroup", project.name)
    order = {"SortBy": "CreationTime", "SortOrder": "Descending"}
    request = Request(
        "sagemaker",
        "ListModelPackages",
        ModelPackageGroupName=project.name,
        ModelApprovalStatus="Approved",
        **order,
    )
    arn = placeholder("ARN of the newest approved model")
    packages = project.aws.items(
        request, "ModelPackageSummaryList", answer=[{"ModelPackageArn": arn}]
    )
    found = next(iter(packages), None)
    if found is None:
        raise UserError(
            f"project {project.name} has no approved model; `python -m infra register --approve` "
            "registers one, or approve one in SageMaker Studio"
        )
    name = {"ModelPackageName": found["ModelPackageArn"]}
    presumed = {"Image": image.uri, "ModelDataUrl": PRESUMED_MODEL}
    described = project.aws.call(
        Request("sagemaker", "DescribeModelPackage", **name),
        answer={"InferenceSpecification": {"Containers": [presumed]}},
    )
    container = described["InferenceSpecification"]["Containers"][0]
    is_same = container["Image"] == image.uri
    return str(container["ModelDataUrl"]), image if is_same else Image(
        container["Image"], container["Image"].rpartition("@")[2], None, 0
    )
