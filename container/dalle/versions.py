"""Versions of installed packages for the first line of a log. Standard library only.

Both commands and the image's entry point log them before anything heavy is imported.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

OURS = "dalle-sagemaker"


def installed(name: str) -> str | None:
    """Return the version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions_line(names: Iterable[str]) -> str:
    """Return `python=… dalle-sagemaker=…` and the version of each named distribution."""
    found = [f"{name}={installed(name) or 'not-installed'}" for name in (OURS, *names)]
    return " ".join([f"python={platform.python_version()}", *found])
