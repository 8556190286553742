"""Processors and memory that this process may use: the host's, less what its cgroups allow.

`os.cpu_count()` and `MemAvailable` count the host's. A container limited by `--cpus` runs that many
threads and no more, and one limited by `--memory` is killed at its own limit. Both versions of
cgroups are read. Standard library only.

`root` stands for / in every function: /proc and /sys are read below it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_NO_LIMIT = 1 << 60  # cgroup version 1 writes a number near 2**63 for no limit


def usable_cpus(root: Path = ROOT) -> int:
    """Return the smaller of the CPU affinity and the cgroup quota, at least 1.

    A fraction of a processor counts as a whole one.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([allowed or 1, *(math.ceil(quota) for quota in _cpu_quotas(root))]))


def free_host_memory(root: Path = ROOT) -> int:
    """Return the bytes that can still be allocated: the least of the host's and of each cgroup's.

    File caches, which the kernel gives back, count as free. Raises OSError without a readable
    /proc/meminfo.
    """
    free = [_memory_available(root)]
    for directory in _cgroups(root, "memory"):
        limit = _number(directory, "memory.max", "memory.limit_in_bytes")
        used = _number(directory, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            free.append(limit - used + _inactive_file_bytes(directory))
    return max(0, min(free))


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the least memory limit of this process's cgroups in bytes; None without one."""
    limits = (
        _number(directory, "memory.max", "memory.limit_in_bytes")
        for directory in _cgroups(root, "memory")
    )
    return min((limit for limit in limits if limit is not None), default=None)


def _cpu_quotas(root: Path) -> Iterator[float]:
    for directory in _cgroups(root, "cpu"):
        quota, _, period = _read(directory / "cpu.max").partition(" ")
        if not period:  # version 1
            quota = _read(directory / "cpu.cfs_quota_us")
            period = _read(directory / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            yield int(quota) / int(period)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of this process's cgroup and of those around it, version 2 then 1."""
    hierarchy = root / "sys/fs/cgroup"
    yield from _upwards(hierarchy, _group(root, ""))
    for name in {"cpu": ("cpu,cpuacct", "cpu"), "memory": ("memory",)}[controller]:
        yield from _upwards(hierarchy / name, _group(root, controller))


def _upwards(top: Path, group: str) -> Iterator[Path]:
    directory = top / group.lstrip("/")
    yield directory
    while directory != top:
        directory = directory.parent
        yield directory


def _group(root: Path, controller: str) -> str:
    """Return this process's cgroup path; empty where a container sees its cgroup as the root.

    controller: one of version 1; empty for version 2.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and "/.." not in path:
            return path
    return ""


def _memory_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{root / 'proc/meminfo'} has no line MemAvailable")


def _inactive_file_bytes(directory: Path) -> int:
    """Return the file cache that counts as used by a cgroup and can be given back."""
    stat = dict(
        line.split(maxsplit=1) for line in _read(directory / "memory.stat").splitlines() if line
    )
    # Version 1 has both keys: the total includes the cgroups below.
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _number(directory: Path, *names: str) -> int | None:
    """Return the number in the first of the files that has one; None for none and for no limit."""
    for name in names:
        text = _read(directory / name)
        if text.isdigit() and int(text) < _NO_LIMIT:
            return int(text)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
