"""The network of jobs and endpoints: subnets and security groups of the account, or none.

Without them the platform's hosts run in a network of its own. Knows nothing of any command.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dalle.errors import PlanError

MAX_SUBNETS = 16
MAX_GROUPS = 5


@dataclass(frozen=True)
class Network:
    """subnets, security_groups: ids; both empty for the platform's own network."""

    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()

    @property
    def vpc_config(self) -> dict[str, list[str]] | None:
        """The API's VpcConfig; None for the platform's own network."""
        if not self.subnets:
            return None
        return {
            "SecurityGroupIds": list(self.security_groups),
            "Subnets": list(self.subnets),
        }

    def check(self) -> None:
        """Raise PlanError when only one of the two is there, or there are too many."""
        if bool(self.subnets) != bool(self.security_groups):
            missing = "--security-groups" if self.subnets else "--subnets"
            raise PlanError(
                f"a network needs both --subnets and --security-groups; {missing} is missing"
            )
        for option, ids, most in (
            ("--subnets", self.subnets, MAX_SUBNETS),
            ("--security-groups", self.security_groups, MAX_GROUPS),
        ):
            if len(ids) > most:
                raise PlanError(f"{option} are at most {most}, got {len(ids)}")


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--subnets", type=subnets, metavar="ID,…", help="of the VPC in which the hosts run"
    )
    parser.add_argument(
        "--security-groups", type=security_groups, metavar="ID,…", help="of the hosts"
    )


def subnets(text: str) -> tuple[str, ...]:
    """Return the ids of subnets; none for the empty text. For argparse."""
    return _ids(text, "subnet")


def security_groups(text: str) -> tuple[str, ...]:
    """Return the ids of security groups; none for the empty text. For argparse."""
    return _ids(text, "sg")


def merged(kept: Network, options: argparse.Namespace) -> Network:
    """Return the network with what the options of `add_arguments` give in place of what is kept."""
    return Network(
        kept.subnets if options.subnets is None else options.subnets,
        kept.security_groups if options.security_groups is None else options.security_groups,
    )


def of_parameters(parameters: Mapping[str, str]) -> Network:
    """Return the network of the project's stack from its parameters."""
    ids = (parameters.get(name, "") for name in ("Subnets", "SecurityGroups"))
    return Network(*(tuple(text.split(",")) if text else () for text in ids))


def _ids(text: str, prefix: str) -> tuple[str, ...]:
    ids = tuple(text.split(",")) if text else ()
    for each in ids:
        if not re.fullmatch(rf"{prefix}-[0-9a-f]{{8,17}}", each):
            raise argparse.ArgumentTypeError(
                f"ids such as {prefix}-0123456789abcdef0 with commas between were expected, "
                f"got {each!r}"
            )
    if len(set(ids)) != len(ids):
        raise argparse.ArgumentTypeError(f"every id once was expected, got {text!r}")
    return ids
