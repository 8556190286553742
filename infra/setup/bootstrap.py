"""`bootstrap`: create the project's stack, or bring it up to date.

The template is infra/setup/template.yaml. A digest of it and of its parameters is a tag of the
stack, so that a second run finds nothing to do without comparing documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle.errors import AwsError
from infra.aws.project import PROJECT_TAG, Project, add_project_arguments, open_project, tag_value
from infra.aws.request import Request, digest
from infra.aws.stack import parameters_of
from infra.aws.team import tags
from infra.setup import stack_parameters

TEMPLATE = Path(__file__).parent / "template.yaml"
TEMPLATE_TAG = "dalle:template"
POLL_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stack_parameters.add_arguments(parser)
    tags.add_argument(parser)
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    given = stack_parameters.given(options)
    project = open_project(options)
    output = project.output
    stack_parameters.check_region(given, project.aws)
    before = None if output.dry_run else project.stack()
    is_new = before is None
    parameters = stack_parameters.merged(parameters_of(before), given, is_new=is_new)
    kept = tags.own_tags((before or {}).get("Tags", []))
    own = tags.merged(kept, options.resource_tag)
    request = stack_request(
        project.name, TEMPLATE.read_text("utf-8"), parameters, own, is_new=is_new
    )
    wanted = tag_value(request.parameters["Tags"], TEMPLATE_TAG)
    if before is not None and tag_value(before.get("Tags", []), TEMPLATE_TAG) == wanted:
        state = "already there"
    else:
        project.aws.call(request)
        state = "made" if is_new else "brought up to date"
    wait(project)
    outputs = project.stack_outputs()
    output.item(f"stack {project.name}", state)
    for name, what in (
        ("ExistingBucket", f"bucket {outputs.bucket}"),
        ("ExistingRepository", f"repository {outputs.repository}"),
        ("ExistingRole", "role of jobs and endpoints"),
    ):
        output.item(what, "given" if parameters[name] else state)
    output.item("role of the endpoint's callers", state)
    return output.finish(
        project=project.name,
        state=state,
        bucket=outputs.bucket,
        repository=outputs.repository,
        role_arn=outputs.role_arn,
    )


def stack_request(
    name: str,
    template: str,
    chosen: Mapping[str, str],
    own_tags: Mapping[str, str],
    *,
    is_new: bool,
) -> Request:
    """Return the request that creates the stack, or changes it. chosen: its other parameters."""
    parameters = [
        {"ParameterKey": key, "ParameterValue": value}
        for key, value in {"Project": name, **chosen}.items()
    ]
    request: dict[str, Any] = {
        "StackName": name,
        "TemplateBody": template,
        "Parameters": parameters,
        "Capabilities": ["CAPABILITY_IAM"],
        "Tags": [
            {"Key": PROJECT_TAG, "Value": name},
            {"Key": TEMPLATE_TAG, "Value": digest([template, parameters, dict(own_tags)])},
            *tags.tag_list(own_tags),
        ],
    }
    if is_new:
        # Otherwise a stack whose creation failed stays and must be deleted by hand.
        request["OnFailure"] = "DELETE"
    operation = "CreateStack" if is_new else "UpdateStack"
    return Request("cloudformation", operation, **request)


def wait(project: Project) -> None:
    """Wait until no change is in progress. Raises AwsError with CloudFormation's reason."""
    stack = project.stack()
    if project.aws.dry_run or stack is None:
        return
    name = stack["StackId"]  # the only name by which a deleted stack is described
    described = project.aws.wait(
        Request("cloudformation", "DescribeStacks", StackName=name),
        lambda answer: not answer["Stacks"][0]["StackStatus"].endswith("_IN_PROGRESS"),
        every_seconds=POLL_SECONDS,
    )
    status = described["Stacks"][0]["StackStatus"]
    if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        raise AwsError(f"the stack {project.name} is {status}: {_reason(project, name)}")


def _reason(project: Project, stack: str) -> str:
    """Return the first failure that CloudFormation reports."""
    request = Request("cloudformation", "DescribeStackEvents", StackName=stack)
    failures = [
        f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', 'no reason given')}"
        for event in project.aws.items(request, "StackEvents")
        if event.get("ResourceStatus", "").endswith("_FAILED")
    ]
    return failures[-1] if failures else "see the stack's events in the AWS console"
