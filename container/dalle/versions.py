"""What is installed here, for the first line of a log. Standard library; imports nothing it names.

Both commands and the image's entry point say it, before anything heavy is imported.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

OURS = "dalle-sagemaker"


def installed(name: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions_line(names: Iterable[str]) -> str:
    """`python=… dalle-sagemaker=…`, then each of the distributions, in one line."""
    found = [f"{name}={installed(name) or 'not-installed'}" for name in (OURS, *names)]
    return " ".join([f"python={platform.python_version()}", *found])
