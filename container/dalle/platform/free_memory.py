"""How much memory this process may still take on a CPU. Standard library.

`MemAvailable` is the host's; a container limited by `--memory` has less, and is killed at its own
limit. What the kernel would give back, the cache of files, counts as free in both.
"""

from __future__ import annotations

from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup version 1 writes a number near 2**63 for no limit


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken: the least of the host's and of each cgroup's around this process.

    root: where /proc and /sys are found. Raises OSError without a readable /proc/meminfo.
    """
    return max(0, min([_available(root), *_version_2(root), *_version_1(root)]))


def _available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{root / 'proc/meminfo'} has no line MemAvailable")


def _version_2(root: Path) -> list[int]:
    top = root / "sys/fs/cgroup"
    group = top / _group(root, "").lstrip("/")
    free = []
    for directory in [group, *group.parents]:
        limit, used = _read(directory / "memory.max"), _read(directory / "memory.current")
        if limit.isdigit() and used.isdigit():
            free.append(int(limit) - int(used) + _stat(directory, "inactive_file"))
        if directory == top:
            break
    return free


def _version_1(root: Path) -> list[int]:
    top = root / "sys/fs/cgroup/memory"
    free = []
    for directory in {top, top / _group(root, "memory").lstrip("/")}:
        limit = _read(directory / "memory.limit_in_bytes")
        used = _read(directory / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
            free.append(int(limit) - int(used) + _stat(directory, "total_inactive_file"))
    return free


def _stat(directory: Path, name: str) -> int:
    for line in _read(directory / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _group(root: Path, controller: str) -> str:
    """The path of this process's cgroup; empty where a container shows only its own."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and "/.." not in path:
            return path
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
