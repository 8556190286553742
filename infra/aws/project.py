"""What belongs together, by name and tag, and where it stands: there is no local state file.

Everything that these commands make is named after the project and carries its tag. Bucket,
repository and role are outputs of the project's stack, so that any machine with credentials finds
them.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dalle.errors import PlanError, UserError
from infra.aws import client as aws_module
from infra.aws.client import Aws
from infra.aws.output import Console
from infra.aws.request import Call, placeholder

DEFAULT_NAME = "dalle"
NAME_PATTERN = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
MAX_NAME = 20
"""A bucket's name has 63 characters: the project's, the account's, the region's, and two dashes."""
TAG = "dalle:project"
OUTPUTS = ("Bucket", "Repository", "RoleArn")
IMAGE_TAG = "latest"


@dataclass(frozen=True)
class Outputs:
    """What the project's stack made.

    bucket, repository: names. role_arn: of the role that jobs and endpoints run as.
    """

    bucket: str
    repository: str
    role_arn: str


@dataclass(frozen=True)
class Image:
    """The image in the repository. uri: by digest, so that it never changes under a name.

    num_bytes: unpacked, as `push` noted it; None when another image was pushed without it.
    compressed_bytes: as the repository stores it.
    """

    uri: str
    digest: str
    num_bytes: int | None
    compressed_bytes: int


@dataclass(frozen=True)
class Project:
    """A name, and the AWS account it lives in."""

    name: str
    aws: Aws

    @property
    def console(self) -> Console:
        return self.aws.console

    @property
    def tags(self) -> list[dict[str, str]]:
        return [{"Key": TAG, "Value": self.name}]

    def stack(self) -> dict[str, Any] | None:
        """The project's stack as CloudFormation describes it; None before `bootstrap`."""
        outputs = [
            {"OutputKey": key, "OutputValue": placeholder(f"{key} of stack {self.name}")}
            for key in OUTPUTS
        ]
        found = self.aws.find(
            Call("cloudformation", "DescribeStacks", {"StackName": self.name}),
            answer={"Stacks": [{"StackStatus": "CREATE_COMPLETE", "Outputs": outputs}]},
        )
        return found["Stacks"][0] if found and found["Stacks"] else None

    def outputs(self) -> Outputs:
        """Raises UserError when `bootstrap` has not made them."""
        stack = self.stack() or {}
        found = {o["OutputKey"]: o["OutputValue"] for o in stack.get("Outputs", [])}
        if not all(key in found for key in OUTPUTS):
            state = f"is {stack['StackStatus']}" if stack else "does not exist"
            raise UserError(
                f"the stack {self.name} {state}, and so project {self.name} has no bucket, "
                f"repository and role yet; run `python -m infra bootstrap` first"
            )
        return Outputs(found["Bucket"], found["Repository"], found["RoleArn"])

    def image(self, repository: str, tag: str = IMAGE_TAG) -> Image:
        """The pushed image. Raises UserError when nothing was pushed by that tag."""
        asked = Call(
            "ecr",
            "DescribeImages",
            {"repositoryName": repository, "imageIds": [{"imageTag": tag}]},
        )
        size = {"imageDigest": placeholder("digest of the image"), "imageSizeInBytes": 0}
        found = self.aws.find(asked, answer={"imageDetails": [size]})
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
        """Its `uri` (without a tag), `arn` and `tags`. Raises AwsError when it is gone."""
        there = {
            "repositoryUri": placeholder("address of the repository"),
            "repositoryArn": placeholder("ARN of the repository"),
        }
        answer = self.aws.call(
            Call("ecr", "DescribeRepositories", {"repositoryNames": [name]}),
            answer={"repositories": [there]},
        )
        found = answer["repositories"][0]
        tags = self.aws.call(
            Call("ecr", "ListTagsForResource", {"resourceArn": found["repositoryArn"]}),
            answer={"tags": []},
        )
        return {
            "uri": found["repositoryUri"],
            "arn": found["repositoryArn"],
            "tags": {tag["Key"]: tag["Value"] for tag in tags["tags"]},
        }

    def owns(self, arn: str) -> bool:
        """Whether a SageMaker resource carries this project's tag."""
        tags = self.aws.items(Call("sagemaker", "ListTags", {"ResourceArn": arn}), "Tags")
        return any(tag == {"Key": TAG, "Value": self.name} for tag in tags)

    def ensure(self, what: str, look: Call, make: Call) -> bool:
        """Make a thing unless it is there, and say which. True when it was made."""
        if self.aws.find(look) is not None:
            self.console.item(what, "already there")
            return False
        self.aws.call(make)
        self.console.item(what, "made")
        return True


def image_size_tag(tag: str) -> str:
    """The repository's tag under which `push` notes how large an image is when unpacked."""
    return f"dalle:image-bytes:{tag}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--project, and the options of everything that speaks to AWS."""
    parser.add_argument(
        "--project",
        type=project_name,
        default=os.environ.get("DALLE_PROJECT") or DEFAULT_NAME,
        help=f"whose things these are; default: DALLE_PROJECT or {DEFAULT_NAME}",
    )
    aws_module.add_arguments(parser)


def open_project(options: argparse.Namespace) -> Project:
    return Project(options.project, aws_module.connect(options))


def project_name(text: str) -> str:
    """`text`, if names of every kind can be made from it. For argparse."""
    if len(text) <= MAX_NAME and re.fullmatch(NAME_PATTERN, text):
        return text
    raise argparse.ArgumentTypeError(
        f"a project's name is 1 to {MAX_NAME} small letters, digits and single dashes, "
        f"beginning with a letter, got {text!r}"
    )


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE as two texts. For argparse."""
    name, equals, value = text.partition("=")
    if name and equals:
        return name, value
    raise argparse.ArgumentTypeError(f"NAME=VALUE was expected, got {text!r}")


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key. Raises PlanError."""
    parts = re.fullmatch(r"s3://([^/]+)/?(.*)", uri)
    if parts is None:
        raise PlanError(f"an S3 address such as s3://bucket/folder/ was expected, got {uri!r}")
    return parts[1], parts[2]


def tag_value(tags: list[Mapping[str, str]], key: str) -> str | None:
    return next((tag["Value"] for tag in tags if tag["Key"] == key), None)
