"""How many processors this process may really use. Standard library.

`os.cpu_count()` counts the host's; a container limited by `--cpus` or a task's share has fewer, and
as many threads as the host has processors would then take turns waiting for each other.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """The smaller of the processors allowed by affinity and those paid for by the cgroup quota.

    A part of a processor counts as a whole one. root: where /proc and /sys are found.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [*_version_2(root), *_version_1(root)]
    return max(1, min([allowed or 1, *(math.ceil(quota) for quota in quotas)]))


def _version_2(root: Path) -> list[float]:
    """Quotas of this process's cgroup and of those around it, in processors."""
    top = root / "sys/fs/cgroup"
    group = top / _group(root, "0::").lstrip("/")
    quotas = []
    for directory in [group, *group.parents]:
        words = _read(directory / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
        if directory == top:
            break
    return quotas


def _version_1(root: Path) -> list[float]:
    quotas = []
    for name in ("cpu,cpuacct", "cpu"):
        directory = root / "sys/fs/cgroup" / name
        quota = _read(directory / "cpu.cfs_quota_us")
        period = _read(directory / "cpu.cfs_period_us")
        if quota and period and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return quotas


def _group(root: Path, prefix: str) -> str:
    """The path of this process's cgroup; empty where a container shows only its own."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith(prefix) and "/.." not in line:
            return line.removeprefix(prefix)
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
