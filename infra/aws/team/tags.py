"""A team's own tags on everything that a project creates, beside the project's tag.

They are tags of the project's stack, which CloudFormation copies to bucket, repository and roles,
and the other commands to what they create.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping

from dalle.errors import PlanError

RESERVED = ("aws:", "dalle:")
MAX_TAGS = 48
"""Of 50 on a resource; two are the project's."""
MAX_KEY, MAX_VALUE = 128, 256
_TEXT = re.compile(r"[\w\s.:/=+\-@]*")


def add_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--resource-tag",
        action="append",
        type=tag,
        default=[],
        metavar="KEY=VALUE",
        help="a tag on everything that is created, such as cost-center=42; repeatable; "
        "an empty value removes it",
    )


def tag(text: str) -> tuple[str, str]:
    """Return KEY=VALUE as two texts. For argparse."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"KEY=VALUE was expected, got {text!r}")
    if key.lower().startswith(RESERVED):
        raise argparse.ArgumentTypeError(
            f"tags that begin with {' or '.join(RESERVED)} belong to others, got {key!r}"
        )
    for word, part, most in (("key", key, MAX_KEY), ("value", value, MAX_VALUE)):
        if len(part) > most or not _TEXT.fullmatch(part):
            raise argparse.ArgumentTypeError(
                f"a tag's {word} is at most {most} letters, digits, blanks and _.:/=+-@, "
                f"got {part[:60]!r}"
            )
    return key, value


def own_tags(tags: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return those of a resource's tags that a team chose, by key."""
    return {tag["Key"]: tag["Value"] for tag in tags if not tag["Key"].lower().startswith(RESERVED)}


def merged(kept: Mapping[str, str], given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the tags with the given ones in their places. Raises PlanError for too many."""
    found = {key: value for key, value in {**kept, **dict(given)}.items() if value}
    if len(found) > MAX_TAGS:
        raise PlanError(f"a resource has at most {MAX_TAGS} tags of a team's, got {len(found)}")
    return found


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Return tags in the API's form."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]
