"""The project's stack as CloudFormation describes it: what it has, and what it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.aws.request import placeholder
from infra.aws.team import encryption, network
from infra.aws.team.encryption import Encryption
from infra.aws.team.network import Network
from infra.aws.team.tags import own_tags, tag_list

OUTPUTS = ("Bucket", "Repository", "RoleArn")
READ_BUCKET = "ReadBucket"
"""The stack's parameter that names another bucket."""
EXISTING_ROLE = "ExistingRole"
"""The stack's parameter that names a role in place of its own."""


@dataclass(frozen=True)
class StackOutputs:
    """Outputs of the project's stack.

    bucket, repository: names. role_arn: of the role that jobs and endpoints run as.
    read_bucket: another one that this role may read; empty for none. owns_role: whether the role is
    the stack's, so that its rights are known.
    network, encryption: of jobs and endpoints. tags: on everything that is created.
    topic: the ARN of the SNS topic of `bootstrap --mail`; empty for none.
    """

    bucket: str
    repository: str
    role_arn: str
    read_bucket: str = ""
    owns_role: bool = True
    network: Network = Network()
    encryption: Encryption = Encryption()
    tags: list[dict[str, str]] = field(default_factory=list)
    topic: str = ""


_BUCKET, _REPOSITORY, _ROLE = (placeholder(f"{key} of the stack") for key in OUTPUTS)
PRESUMED_OUTPUTS = StackOutputs(
    _BUCKET, _REPOSITORY, _ROLE, topic=placeholder("TopicArn of the stack")
)
"""Stand-ins for what AWS would answer: with them a plan is checked before the first request."""


def stack_outputs(stack: Mapping[str, Any], tags: list[dict[str, str]]) -> StackOutputs:
    """Return what a whole stack holds. tags: the project's, which come before the team's."""
    found, parameters = outputs_of(stack), parameters_of(stack)
    return StackOutputs(
        bucket=found["Bucket"],
        repository=found["Repository"],
        role_arn=found["RoleArn"],
        read_bucket=parameters.get(READ_BUCKET, ""),
        owns_role=not parameters.get(EXISTING_ROLE),
        network=network.of_parameters(parameters),
        encryption=encryption.of_parameters(parameters),
        tags=all_tags(stack, tags),
        topic=found.get("TopicArn", ""),
    )


def all_tags(stack: Mapping[str, Any] | None, tags: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the project's tags, which are given, and those of the team, which the stack has."""
    return [*tags, *tag_list(own_tags((stack or {}).get("Tags", [])))]


def outputs_of(stack: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the outputs of a stack as CloudFormation describes it; none before `bootstrap`."""
    return {each["OutputKey"]: each["OutputValue"] for each in (stack or {}).get("Outputs", [])}


def parameters_of(stack: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the parameters of a stack as CloudFormation describes it; none before `bootstrap`."""
    found = (stack or {}).get("Parameters", [])
    return {each["ParameterKey"]: each["ParameterValue"] for each in found}


def given_storage(stack: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the names of what `bootstrap` was given and the stack does not own.

    By the output's key: Bucket and Repository. It stays when the stack is deleted.
    """
    parameters = parameters_of(stack)
    given = {key: parameters.get(f"Existing{key}", "") for key in ("Bucket", "Repository")}
    return {key: name for key, name in given.items() if name}
