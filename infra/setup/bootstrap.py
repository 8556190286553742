"""`bootstrap`: the project's stack, made once and brought up to date ever after.

The template is infra/setup/template.yaml. A digest of it and of its parameters is the stack's tag,
so that a second run sees, without comparing documents, that there is nothing to do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dalle.errors import AwsError
from infra.aws import project
from infra.aws.project import Project
from infra.aws.request import Call, digest

TEMPLATE = Path(__file__).parent / "template.yaml"
TEMPLATE_TAG = "dalle:template"
POLL_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--read-bucket",
        metavar="NAME",
        help="another bucket that jobs may read, for pictures that stay where they are; "
        "remembered by the stack until another is given, '' for none",
    )
    project.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    opened = project.open_project(options)
    console = opened.console
    before = None if console.dry_run else opened.stack()
    read_bucket = options.read_bucket
    if read_bucket is None:
        read_bucket = _parameter(before, "ReadBucket")
    call = stack_call(opened.name, TEMPLATE.read_text("utf-8"), read_bucket, is_new=before is None)
    wanted = project.tag_value(call.parameters["Tags"], TEMPLATE_TAG)
    if before is not None and project.tag_value(before.get("Tags", []), TEMPLATE_TAG) == wanted:
        state = "already there"
    else:
        opened.aws.call(call)
        state = "made" if before is None else "brought up to date"
    wait(opened)
    outputs = opened.outputs()
    console.item(f"stack {opened.name}", state)
    console.item(f"bucket {outputs.bucket}", state)
    console.item(f"repository {outputs.repository}", state)
    console.item("role of jobs and endpoints", state)
    return console.finish(
        project=opened.name,
        state=state,
        bucket=outputs.bucket,
        repository=outputs.repository,
        role_arn=outputs.role_arn,
    )


def stack_call(name: str, template: str, read_bucket: str, *, is_new: bool) -> Call:
    """The request that makes the stack, or changes it."""
    parameters = [
        {"ParameterKey": "Project", "ParameterValue": name},
        {"ParameterKey": "ReadBucket", "ParameterValue": read_bucket},
    ]
    request: dict[str, Any] = {
        "StackName": name,
        "TemplateBody": template,
        "Parameters": parameters,
        "Capabilities": ["CAPABILITY_IAM"],
        "Tags": [
            {"Key": project.TAG, "Value": name},
            {"Key": TEMPLATE_TAG, "Value": digest([template, parameters])},
        ],
    }
    if is_new:
        # Otherwise a stack that could not be made stays, and has to be deleted by hand.
        request["OnFailure"] = "DELETE"
    operation = "CreateStack" if is_new else "UpdateStack"
    return Call("cloudformation", operation, request)


def wait(opened: Project) -> None:
    """Until the stack rests. Raises AwsError with CloudFormation's reason when it did not work."""
    stack = opened.stack()
    if opened.aws.dry_run or stack is None:
        return
    name = stack["StackId"]  # a stack that was deleted answers to this alone
    described = opened.aws.wait(
        Call("cloudformation", "DescribeStacks", {"StackName": name}),
        lambda answer: not answer["Stacks"][0]["StackStatus"].endswith("_IN_PROGRESS"),
        every_seconds=POLL_SECONDS,
    )
    status = described["Stacks"][0]["StackStatus"]
    if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        raise AwsError(f"the stack {opened.name} is {status}: {_reason(opened, name)}")


def _reason(opened: Project, stack: str) -> str:
    """The first thing that CloudFormation could not do."""
    call = Call("cloudformation", "DescribeStackEvents", {"StackName": stack})
    failures = [
        f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason', 'no reason given')}"
        for event in opened.aws.items(call, "StackEvents")
        if event.get("ResourceStatus", "").endswith("_FAILED")
    ]
    return failures[-1] if failures else "the stack's events in the console say why"


def _parameter(stack: dict[str, Any] | None, key: str) -> str:
    """A parameter of the stack as it is; the empty text when there is none."""
    parameters = (stack or {}).get("Parameters", [])
    return next((p["ParameterValue"] for p in parameters if p["ParameterKey"] == key), "")
