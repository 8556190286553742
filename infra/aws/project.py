"""A project: the name and tag of its resources, and the outputs of its stack.

Every resource that these commands create is named after the project and carries its tag. Bucket,
repository and role are outputs of the project's stack. So there is no local state file, and any
machine with credentials can continue.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dalle.errors import PlanError, UserError
from infra.aws import client as aws_module
from infra.aws.client import Aws
from infra.aws.output import Output
from infra.aws.request import Request, describe, placeholder
from infra.aws.stack import OUTPUTS, StackOutputs, outputs_of, stack_outputs

DEFAULT_NAME = "dalle"
NAME_PATTERN = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
MAX_NAME = 20
"""A bucket's name has 63 characters: project, account, region and two dashes."""
PROJECT_TAG = "dalle:project"
IMAGE_TAG = "latest"
KIND_WORDS = {
    "Endpoint": "endpoint",
    "EndpointConfig": "configuration",
    "HyperParameterTuningJob": "tuning job",
    "InferenceComponent": "component",
    "Model": "model",
    "ModelPackageGroup": "model group",
    "Pipeline": "pipeline",
    "TrainingJob": "training job",
    "TransformJob": "transform job",
}
"""SageMaker's kinds of resources, for the output."""


@dataclass(frozen=True)
class Image:
    """The image in the repository. uri: by digest, so that its content never changes.

    num_bytes: unpacked, as `push` noted it; None when the image was pushed by other means.
    compressed_bytes: as the repository stores it.
    """

    uri: str
    digest: str
    num_bytes: int | None
    compressed_bytes: int


PRESUMED_IMAGE = Image(placeholder("address of the image"), placeholder("digest"), None, 0)
"""Stand-ins for what AWS would answer: with them a plan is checked before the first request."""


@dataclass(frozen=True)
class Project:
    """A project's name, and the AWS account that holds its resources."""

    name: str
    aws: Aws

    @property
    def output(self) -> Output:
        return self.aws.output

    @property
    def tags(self) -> list[dict[str, str]]:
        return [{"Key": PROJECT_TAG, "Value": self.name}]

    def stack(self) -> dict[str, Any] | None:
        """Return the stack as CloudFormation describes it; None before `bootstrap`.

        Raises UserError for a stack of that name which is not the project's.
        """
        outputs = [
            {"OutputKey": key, "OutputValue": placeholder(f"{key} of stack {self.name}")}
            for key in OUTPUTS
        ]
        presumed = {"StackStatus": "CREATE_COMPLETE", "Outputs": outputs, "Tags": self.tags}
        found = self.aws.find(
            Request("cloudformation", "DescribeStacks", StackName=self.name),
            answer={"Stacks": [presumed]},
        )
        if not found or not found["Stacks"]:
            return None
        stack: dict[str, Any] = found["Stacks"][0]
        self.check_owner(f"stack {self.name}", stack.get("Tags", []))
        return stack

    def stack_outputs(self) -> StackOutputs:
        """Return bucket, repository and role. Raises UserError before `bootstrap`."""
        stack = self.stack()
        found = outputs_of(stack)
        if not all(key in found for key in OUTPUTS):
            state = f"is {stack['StackStatus']}" if stack else "does not exist"
            raise UserError(
                f"the stack {self.name} {state}, and so project {self.name} has no bucket, "
                f"repository and role yet; run `python -m infra bootstrap` first"
            )
        return stack_outputs(stack or {}, self.tags)

    def image(self, repository: str, tag: str = IMAGE_TAG) -> Image:
        """Return the pushed image. Raises UserError when the repository has no such tag."""
        request = Request(
            "ecr", "DescribeImages", repositoryName=repository, imageIds=[{"imageTag": tag}]
        )
        size = {"imageDigest": placeholder("digest of the image"), "imageSizeInBytes": 0}
        found = self.aws.find(request, answer={"imageDetails": [size]})
        if not found or not found["imageDetails"]:
            raise UserError(
                f"the repository {repository} has no image {tag!r}; "
                "run `python -m infra push` first"
            )
        details = found["imageDetails"][0]
        about = self.repository(repository)
        noted = re.fullmatch(r"(\S+) (\d+)", about["tags"].get(image_size_tag(tag), ""))
        is_same = noted is not None and noted[1] == details["imageDigest"]
        return Image(
            uri=f"{about['uri']}@{details['imageDigest']}",
            digest=details["imageDigest"],
            num_bytes=int(noted[2]) if noted and is_same else None,
            compressed_bytes=details.get("imageSizeInBytes", 0),
        )

    def repository(self, name: str) -> dict[str, Any]:
        """Return a repository's `uri` (without a tag), `arn`, `tags` and `fixed`. Raises AwsError.

        fixed: a function of an image's tag: whether it stays on its image for ever.
        """
        uri, arn = placeholder("address of the repository"), placeholder("ARN of the repository")
        answer = self.aws.call(
            Request("ecr", "DescribeRepositories", repositoryNames=[name]),
            answer={"repositories": [{"repositoryUri": uri, "repositoryArn": arn}]},
        )
        found = answer["repositories"][0]
        uri, arn = found["repositoryUri"], found["repositoryArn"]
        request = Request("ecr", "ListTagsForResource", resourceArn=arn)
        tags = self.aws.call(request, answer={"tags": []})["tags"]
        return {
            "uri": uri,
            "arn": arn,
            "tags": {tag["Key"]: tag["Value"] for tag in tags},
            "fixed": partial(_is_fixed, found),
        }

    def owns(self, arn: str) -> bool:
        """Return whether a SageMaker resource carries this project's tag."""
        return tag_value(self._tags_of(arn), PROJECT_TAG) == self.name

    def check_owner(self, what: str, tags: list[Mapping[str, str]]) -> None:
        """Raise UserError, which names the owner, unless these are the tags of a resource of ours.

        Called before a resource that exists already is used, changed or deleted.
        """
        owner = tag_value(tags, PROJECT_TAG)
        if owner == self.name:
            return
        if owner:
            whose = f"it is project {owner}'s"
        elif tags:
            whose = "its tags are " + ", ".join(f"{tag['Key']}={tag['Value']}" for tag in tags)
        else:
            whose = "it has no tag"
        raise UserError(
            f"{what} is not project {self.name}'s and is left alone: {whose}; give another "
            "--project or --name"
        )

    def find_ours(
        self, kind: str, name: str, wanted: Sequence[dict[str, str]] = ()
    ) -> dict[str, Any] | None:
        """Return a SageMaker resource as it is described; None where there is none of that name.

        kind: one of KIND_WORDS. wanted: tags that it is given if it lacks them; others stay, which
        somebody else may have given. Raises UserError when it is not the project's.
        """
        found = self.aws.find(describe(kind, name))
        if found is None:
            return None
        arn = found[f"{kind}Arn"]
        tags = self._tags_of(arn)
        self.check_owner(f"{KIND_WORDS[kind]} {name}", tags)
        new = [tag for tag in wanted if tag_value(tags, tag["Key"]) != tag["Value"]]
        if new:
            self.aws.call(Request("sagemaker", "AddTags", ResourceArn=arn, Tags=new))
        return found

    def ensure(self, kind: str, name: str, *make: Request) -> None:
        """Create a SageMaker resource unless the project has it, and print which.

        One that exists is given the tags of the last request that it lacks.

        kind: one of KIND_WORDS. Raises UserError when there is one that is not the project's.
        """
        found = self.find_ours(kind, name, make[-1].parameters.get("Tags", []))
        for request in make if found is None else ():
            self.aws.call(request)
        state = "made" if found is None else "already there"
        self.output.item(f"{KIND_WORDS[kind]} {name}", state)

    def _tags_of(self, arn: str) -> list[Mapping[str, str]]:
        return list(self.aws.items(Request("sagemaker", "ListTags", ResourceArn=arn), "Tags"))


def _is_fixed(repository: Mapping[str, Any], tag: str) -> bool:
    """Return whether a tag stays on its image. repository: as ECR describes it."""
    kind = repository.get("imageTagMutability", "MUTABLE")
    filters = repository.get("imageTagMutabilityExclusionFilters", [])
    is_excluded = any(fnmatch.fnmatchcase(tag, each["filter"]) for each in filters)
    return bool(kind.startswith("IMMUTABLE")) != is_excluded


def image_size_tag(tag: str) -> str:
    """Return the repository's tag in which `push` notes the unpacked size of an image."""
    return f"dalle:image-bytes:{tag}"


def add_project_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --project, and the options of every command that sends requests to AWS."""
    parser.add_argument(
        "--project",
        type=project_name,
        default=os.environ.get("DALLE_PROJECT") or DEFAULT_NAME,
        help=f"the project's name; default: DALLE_PROJECT or {DEFAULT_NAME}",
    )
    aws_module.add_arguments(parser)


def open_project(options: argparse.Namespace) -> Project:
    return Project(options.project, aws_module.connect(options))


def project_name(text: str) -> str:
    """Return `text` if it can be part of every resource's name. For argparse."""
    if len(text) <= MAX_NAME and re.fullmatch(NAME_PATTERN, text):
        return text
    raise argparse.ArgumentTypeError(
        f"a project's name is 1 to {MAX_NAME} small letters, digits and single dashes, "
        f"beginning with a letter, got {text!r}"
    )


def name_value(text: str) -> tuple[str, str]:
    """Return NAME=VALUE as two texts. For argparse."""
    name, equals, value = text.partition("=")
    if name and equals:
        return name, value
    raise argparse.ArgumentTypeError(f"NAME=VALUE was expected, got {text!r}")


def add_pairs(
    parser: argparse._ActionsContainer, option: str, help: str, metavar: str = "NAME=VALUE"
) -> None:
    """Add a repeatable option of pairs, which is a list of (name, value)."""
    parser.add_argument(
        option, action="append", type=name_value, default=[], metavar=metavar, help=help
    )


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key of s3://bucket/key. Raises PlanError."""
    parts = re.fullmatch(r"s3://([^/]+)/?(.*)", uri)
    if parts is None:
        raise PlanError(f"an S3 address such as s3://bucket/folder/ was expected, got {uri!r}")
    return parts[1], parts[2]


def tag_value(tags: list[Mapping[str, str]], key: str) -> str | None:
    return next((tag["Value"] for tag in tags if tag["Key"] == key), None)
