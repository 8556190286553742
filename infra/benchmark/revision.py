"""Whether the code that a run measured is the present one, by the git history of this checkout."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from infra.benchmark.run_file import Run

MEASURED = ("container/dalle", "inference")
"""Folders whose code decides how long a request takes."""
REPOSITORY = Path(__file__).parents[2]
SHOWN = 12  # characters of a revision


def checkout_revision(repository: Path = REPOSITORY) -> str | None:
    """Return the revision of a checkout, with + after it where files differ; None without git."""
    revision = _git(repository, "rev-parse", "HEAD")
    if not revision:
        return None
    differs = _git(repository, "status", "--porcelain", "--", *MEASURED)
    return f"{revision}+" if differs else revision


def measured_revisions(runs: Mapping[str, Run]) -> list[str]:
    """Return a sentence for each run: the revision that it measured."""
    return [f"{name}: {_measured(run)}." for name, run in runs.items()]


def outdated(runs: Mapping[str, Run], repository: Path = REPOSITORY) -> list[str]:
    """Return warnings of runs whose code has changed since; none where git cannot tell."""
    found: dict[str, list[str]] = {}
    for name, run in runs.items():
        number = _changes_since(run, repository)
        if number:
            times = "once" if number == 1 else f"{number:,} times"
            since = f"{_measured(run)}; {' and '.join(MEASURED)} have changed {times} since"
            found.setdefault(since, []).append(name)
    return [
        f"Not the present code: {' and '.join(names)}, {since}. Measure again."
        for since, names in found.items()
    ]


def _measured(run: Run) -> str:
    revision = _revision(run)
    at = f"revision {revision[:SHOWN]}" if revision else "an unnamed revision"
    return f"measured at {at} on {run.date[:10]}"


def _revision(run: Run) -> str:
    found = run.versions.get("revision", "")
    return "" if found == "unknown" else found


def _changes_since(run: Run, repository: Path) -> int:
    """Return how many commits have changed what was measured; 0 where it is not known."""
    revision = re.match(r"[0-9a-f]+", _revision(run))
    if revision and _git(repository, "cat-file", "-t", revision[0]):
        since = [f"{revision[0]}..HEAD"]
    else:
        since = [f"--since={run.date}", "HEAD"]
    number = _git(repository, "rev-list", "--count", *since, "--", *MEASURED)
    return int(number) if number else 0


def _git(repository: Path, *words: str) -> str:
    """Return what git prints; the empty text where there is no git or no history."""
    try:
        return subprocess.run(  # noqa: S603
            ["git", "-C", str(repository), *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
