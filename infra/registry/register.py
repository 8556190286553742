"""`register`: a trained model into the Model Registry, with its metrics and a model card.

The group is named after the project. A job that is registered already is found by the description
of its package. `deploy --registered` serves the newest approved one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from dalle.errors import UserError
from infra.aws.project import Project, add_project_arguments, open_project
from infra.aws.request import Request
from infra.aws.stack import StackOutputs
from infra.aws.team import tags
from infra.endpoint.deploy import newest_job, presumed_job
from infra.jobs.progress import metric_history
from infra.registry.card import trained
from infra.registry.package import (
    APPROVED,
    JSON,
    description,
    group_request,
    metrics_body,
    metrics_key,
    package_request,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", help="a training job; default: the newest completed one")
    parser.add_argument(
        "--approve",
        action="store_true",
        help="for `deploy --registered` at once; default: it waits for approval",
    )
    tags.add_argument(parser)
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    project = open_project(options)
    outputs = _outputs(project, options)
    job = named_job(project, options.job) if options.job else newest_job(project)
    group = project.name
    metrics = {name: values[-1] for name, values in metric_history(project, _name(job)).items()}
    model = trained(job, metrics)
    request = package_request(model, group, outputs, approve=options.approve)
    project.aws.check(request)
    project.ensure("ModelPackageGroup", group, group_request(group, outputs.tags))
    found = find_package(project, group, model.job)
    if found is None:
        key = metrics_key(model.job)
        upload = {"Bucket": outputs.bucket, "Key": key, "ContentType": JSON}
        project.aws.call(Request("s3", "PutObject", **upload, Body=metrics_body(model)))
        answer = project.aws.call(request, answer={"ModelPackageArn": "<ModelPackageArn>"})
        arn, state = answer["ModelPackageArn"], "made"
    else:
        arn, state = found["ModelPackageArn"], "already there"
        if options.approve and found.get("ModelApprovalStatus") != APPROVED:
            approval = {"ModelPackageArn": arn, "ModelApprovalStatus": APPROVED}
            project.aws.call(Request("sagemaker", "UpdateModelPackage", **approval))
            state = "approved"
    project.output.item(f"model {arn.rpartition('model-package/')[2]}", state)
    if not options.approve:
        project.output.line("it is served by `deploy --registered` once it is approved")
    return project.output.finish(
        model_package=arn, state=state, job=model.job, metrics=dict(model.metrics)
    )


def named_job(project: Project, name: str) -> dict[str, Any]:
    """Return a completed training job of ours. Raises UserError for any other."""
    found = project.find_ours("TrainingJob", name)
    if project.aws.dry_run:
        return presumed_job(name)
    if found is None:
        raise UserError(f"there is no training job {name}; `python -m infra status` lists them")
    if found["TrainingJobStatus"] != "Completed":
        raise UserError(
            f"training job {name} is {found['TrainingJobStatus']}, and only the model of a "
            "completed one is registered"
        )
    return found


def find_package(project: Project, group: str, job: str) -> dict[str, Any] | None:
    """Return a job's package as the list of its group has it; None when there is none."""
    request = Request("sagemaker", "ListModelPackages", ModelPackageGroupName=group)
    for found in project.aws.items(request, "ModelPackageSummaryList"):
        if found.get("ModelPackageDescription") == description(job):
            return dict(found)
    return None


def _outputs(project: Project, options: argparse.Namespace) -> StackOutputs:
    """Return the stack's outputs, with the tags of the options beside those of the stack."""
    outputs = project.stack_outputs()
    own = tags.merged(tags.own_tags(outputs.tags), options.resource_tag)
    return replace(outputs, tags=[*project.tags, *tags.tag_list(own)])


def _name(job: dict[str, Any]) -> str:
    return str(job["TrainingJobName"])
