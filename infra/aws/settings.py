"""What the commands share that start paid work: network, keys, role and tags.

Those of the project's stack hold (see `infra.setup.stack_parameters`), until an option of one
command names others.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from dalle.errors import UserError
from infra.aws.limits import raise_all
from infra.aws.project import Project
from infra.aws.stack import PRESUMED_OUTPUTS, StackOutputs
from infra.aws.team import encryption, network, tags
from infra.aws.team.names import role_arn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network, keys, role and tags; default: those of the stack")
    network.add_arguments(group)
    encryption.add_arguments(group)
    group.add_argument("--role", type=role_arn, metavar="ARN", help="what the hosts run as")
    tags.add_argument(group)


def presumed_outputs(project: Project, options: argparse.Namespace) -> StackOutputs:
    """Return stand-ins for the stack's outputs, with what the options give in their places.

    With them a plan is checked before the first request. Raises PlanError.
    """
    return _with_options(project, replace(PRESUMED_OUTPUTS, tags=project.tags), options)


def stack_outputs(project: Project, options: argparse.Namespace) -> StackOutputs:
    """Return the stack's outputs, with what the options give in their places.

    Raises PlanError for what does not go together, and UserError before `bootstrap`.
    """
    outputs = project.stack_outputs()
    found = _with_options(project, outputs, options)
    is_known = outputs.owns_role and not options.role and not project.aws.dry_run
    if is_known and found.network.subnets and not outputs.network.subnets:
        raise UserError(
            f"the role of project {project.name} may not connect hosts to subnets "
            f"{', '.join(found.network.subnets)}; `python -m infra bootstrap --subnets … "
            "--security-groups …` allows it, or give a --role that may"
        )
    return found


def _with_options(
    project: Project, outputs: StackOutputs, options: argparse.Namespace
) -> StackOutputs:
    place = network.merged(outputs.network, options)
    place.check()
    keys = encryption.merged(outputs.encryption, options)
    used = [key for key in (keys.volume, keys.output) if key]
    if used:
        raise_all("keys", list(encryption.of_other_regions(used, project.aws.region)))
    own = tags.merged(tags.own_tags(outputs.tags), options.resource_tag)
    return replace(
        outputs,
        role_arn=options.role or outputs.role_arn,
        network=place,
        encryption=keys,
        tags=[*project.tags, *tags.tag_list(own)],
    )
