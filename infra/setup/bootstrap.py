"""`bootstrap`: create the project's stack, or bring it up to date.

The template is infra/setup/template.yaml. A digest of it and of its parameters is a tag of the
stack, so that a second run finds nothing to do without comparing documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dalle.errors import AwsError
from infra.aws.project import (
    PROJECT_TAG,
    READ_BUCKET,
    Project,
    add_project_arguments,
    open_project,
    parameter_of,
    tag_value,
)
from infra.aws.request import Request, digest

TEMPLATE = Path(__file__).parent / "template.yaml"
TEMPLATE_TAG = "dalle:template"
POLL_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--read-bucket",
        metavar="NAME",
        help="another bucket that jobs may read, for data that stay where they are; the stack "
        "keeps it until another is given, '' for none",
    )
    add_project_arguments(parser)


def run(options: argparse.Namespace) -> int:
    project = open_project(options)
    output = project.output
    before = None if output.dry_run else project.stack()
    read_bucket = options.read_bucket
    if read_bucket is None:
        read_bucket = parameter_of(before, READ_BUCKET)
    request = stack_request(
        project.name, TEMPLATE.read_text("utf-8"), read_bucket, is_new=before is None
    )
    wanted = tag_value(request.parameters["Tags"], TEMPLATE_TAG)
    if before is not None and tag_value(before.get("Tags", []), TEMPLATE_TAG) == wanted:
        state = "already there"
    else:
        project.aws.call(request)
        state = "made" if before is None else "brought up to date"
    wait(project)
    outputs = project.stack_outputs()
    output.item(f"stack {project.name}", state)
    output.item(f"bucket {outputs.bucket}", state)
    output.item(f"repository {outputs.repository}", state)
    output.item("role of jobs and endpoints", state)
    output.item("role of the endpoint's callers", state)
    return output.finish(
        project=project.name,
        state=state,
        bucket=outputs.bucket,
        repository=outputs.repository,
        role_arn=outputs.role_arn,
    )


def stack_request(name: str, template: str, read_bucket: str, *, is_new: bool) -> Request:
    """Return the request that creates the stack, or changes it."""
    parameters = [
        {"ParameterKey": "Project", "ParameterValue": name},
        {"ParameterKey": READ_BUCKET, "ParameterValue": read_bucket},
    ]
    request: dict[str, Any] = {
        "StackName": name,
        "TemplateBody": template,
        "Parameters": parameters,
        "Capabilities": ["CAPABILITY_IAM"],
        "Tags": [
            {"Key": PROJECT_TAG, "Value": name},
            {"Key": TEMPLATE_TAG, "Value": digest([template, parameters])},
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
