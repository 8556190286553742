"""Names and ARNs on the command line, checked before any request. For argparse."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable


def named(what: str, pattern: str) -> Callable[[str], str]:
    """Return a type of argparse: a text of this pattern, or the empty text, which is none.

    what: with an example, for the message.
    """

    def read(text: str) -> str:
        if not text or re.fullmatch(pattern, text):
            return text
        raise argparse.ArgumentTypeError(f"{what} was expected, got {text!r}")

    return read


bucket_name = named("a bucket's name such as our-pictures", r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
repository_name = named("a repository's name such as team/images", r"[a-z0-9]+([._/-]+[a-z0-9]+)*")
role_arn = named(
    "a role's ARN such as arn:aws:iam::123456789012:role/sagemaker",
    r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+",
)
training_plan_arn = named(
    "a training plan's ARN such as arn:aws:sagemaker:us-east-1:123456789012:training-plan/ours",
    r"arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:training-plan/.+",
)
topic_arn = named(
    "an SNS topic's ARN such as arn:aws:sns:us-east-1:123456789012:team",
    r"arn:aws[a-z-]*:sns:[a-z0-9-]+:\d{12}:[\w.-]+",
)
mail_address = named("a mail address such as team@example.com", r"[^@\s]+@[^@\s]+\.[^@\s]+")
reservation_arn = named(
    "the ARN of reserved capacity such as arn:aws:sagemaker:us-east-1:123456789012:training-plan/x",
    r"arn:aws[a-z-]*:sagemaker:[a-z0-9-]+:\d{12}:[a-z0-9-]{1,14}/.+",
)
