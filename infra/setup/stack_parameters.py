"""The parameters of the project's stack, from the options of `bootstrap` and from the stack itself.

An option that is not given keeps what the stack has; an empty one takes it away. So a team chooses
its network, its keys and its tags once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from dalle.errors import PlanError
from infra.aws.client import Aws
from infra.aws.limits import raise_all
from infra.aws.stack import READ_BUCKET
from infra.aws.team import encryption, network
from infra.aws.team.names import bucket_name, mail_address, named, repository_name, role_arn

NAMES = (
    READ_BUCKET,
    "ExistingBucket",
    "ExistingRepository",
    "ExistingRole",
    "Subnets",
    "SecurityGroups",
    "VolumeKmsKey",
    "OutputKmsKey",
    "BucketKmsKey",
    "RepositoryKmsKey",
    "LogBucket",
    "Mail",
    "BudgetUsd",
    "Pipelines",
)
AT_FIRST = {
    "ExistingBucket": "--bucket",
    "ExistingRepository": "--repository",
    "RepositoryKmsKey": "--repository-kms-key",
}
"""Parameters that cannot change: what is stored under the earlier value would be lost."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--read-bucket",
        type=bucket_name,
        metavar="NAME",
        help="another bucket that jobs may read, for data that stay where they are; the stack "
        "keeps it until another is given, '' for none",
    )
    theirs = parser.add_argument_group("what exists already, in place of the stack's")
    theirs.add_argument("--bucket", type=bucket_name, metavar="NAME")
    theirs.add_argument("--repository", type=repository_name, metavar="NAME")
    theirs.add_argument(
        "--role",
        type=role_arn,
        metavar="ARN",
        help="that jobs and endpoints run as",
    )
    place = parser.add_argument_group(
        "network and keys; the other commands read them from the stack, and '' takes one away"
    )
    network.add_arguments(place)
    encryption.add_arguments(place)
    encryption.add_key(place, "--bucket-kms-key", "for everything in the bucket")
    encryption.add_key(place, "--repository-kms-key", "for the images; for a new stack alone")
    place.add_argument(
        "--log-bucket",
        type=bucket_name,
        metavar="NAME",
        help="receives the access log of the stack's bucket",
    )
    parser.add_argument(
        "--pipelines", choices=("yes", ""), help="a role for `pipeline`; '' takes it away"
    )
    told = parser.add_argument_group("who is told")
    told.add_argument(
        "--mail",
        type=mail_address,
        metavar="ADDRESS",
        help="of alarms (`monitor`), of asynchronous failures and of the budget; AWS asks the "
        "address first",
    )
    told.add_argument(
        "--budget",
        type=named("an amount of US dollars such as 200", r"(?=.*[1-9])\d+(\.\d\d)?"),
        metavar="USD",
        help="a month; with --mail, told at 80 % and when more than all is expected",
    )


def given(options: argparse.Namespace) -> dict[str, str]:
    """Return the parameters that the options give: name -> value, in which '' is none.

    Raises PlanError for what does not go together, and for keys that a role's policy cannot name.
    """
    every = options.kms_key
    found = {
        READ_BUCKET: options.read_bucket,
        "ExistingBucket": options.bucket,
        "ExistingRepository": options.repository,
        "ExistingRole": options.role,
        "Subnets": None if options.subnets is None else ",".join(options.subnets),
        "SecurityGroups": (
            None if options.security_groups is None else ",".join(options.security_groups)
        ),
        "VolumeKmsKey": every if options.volume_kms_key is None else options.volume_kms_key,
        "OutputKmsKey": every if options.output_kms_key is None else options.output_kms_key,
        "BucketKmsKey": options.bucket_kms_key,
        "RepositoryKmsKey": options.repository_kms_key,
        "LogBucket": options.log_bucket,
        "Mail": options.mail,
        "BudgetUsd": options.budget,
        "Pipelines": options.pipelines,
    }
    for name, value in found.items():
        if name.endswith("KmsKey") and value and not encryption.is_key_arn(value):
            raise PlanError(
                "a key of the stack is named by its ARN, since the policy of the role names it "
                f"(arn:aws:kms:REGION:ACCOUNT:key/…), got {value!r}"
            )
    return {name: value for name, value in found.items() if value is not None}


def check_region(parameters: Mapping[str, str], aws: Aws) -> None:
    """Raise PlanError for a key of another region than the stack's."""
    keys = [value for name, value in parameters.items() if name.endswith("KmsKey") and value]
    if keys:
        raise_all("keys", list(encryption.of_other_regions(keys, aws.region)))


def merged(kept: Mapping[str, str], new: Mapping[str, str], *, is_new: bool) -> dict[str, str]:
    """Return all parameters of the stack but the project's name.

    kept: of the stack as it is. Raises PlanError for a value that cannot be changed any more, and
    for what does not go together.
    """
    for name, option in AT_FIRST.items():
        if not is_new and name in new and new[name] != kept.get(name, ""):
            raise PlanError(
                f"{option} can be chosen only when the stack is made, and it was made with "
                f"{kept.get(name) or 'none'}; `python -m infra teardown` deletes it, or give "
                "another --project"
            )
    # All of them: what an update leaves out would keep a value that '' should take away.
    found = {name: new.get(name, kept.get(name, "")) for name in NAMES}
    network.of_parameters(found).check()
    if found["ExistingBucket"]:
        for name, option in (("BucketKmsKey", "--bucket-kms-key"), ("LogBucket", "--log-bucket")):
            if found[name]:
                raise PlanError(f"{option} is for a bucket of the stack's, not with --bucket")
    if found["BudgetUsd"] and not found["Mail"]:
        raise PlanError("--budget needs --mail, the address that is told")
    if found["ExistingRepository"] and found["RepositoryKmsKey"]:
        raise PlanError("--repository-kms-key is for a repository of the stack's")
    return found
