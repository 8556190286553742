"""What a server runs on, and what it uses of it: this machine's, or a container's from inside.

Nothing here is guessed: what cannot be seen is None.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.benchmark.run_file import Device, Hardware
from infra.docker import Container

_INSIDE = """
import json, os, re
from pathlib import Path

def read(*names):
    for name in names:
        try:
            return Path(name).read_text()
        except OSError:
            pass
    return ""

group = "/sys/fs/cgroup/"
# memory.peak and cpu.stat are of cgroup version 2, the others of version 1.
peak = read(group + "memory.peak", group + "memory/memory.max_usage_in_bytes").strip()
# Pages of files that another container read first are on that one's account, so that the group's
# peak may be too low; the processes' own peaks count them.
marks = 0
for status in Path("/proc").glob("[0-9]*/status"):
    mark = re.search(r"VmHWM:\\s*(\\d+) kB", read(status))
    if mark and status.parent.name != str(os.getpid()):
        marks += int(mark[1]) * 1024
usage = re.search(r"usage_usec (\\d+)", read(group + "cpu.stat"))
nanoseconds = read(group + "cpuacct/cpuacct.usage").strip()
name = re.search(r"model name\\s*:\\s*(.+)", read("/proc/cpuinfo"))
family = re.search(r"cpu family\\s*:\\s*(\\d+)\\nmodel\\s*:\\s*(\\d+)", read("/proc/cpuinfo"))
print(json.dumps({
    "processor": name[1] if name else None,
    "family": family.groups() if family else None,
    "num_cpus": len(os.sched_getaffinity(0)),
    "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    "peak_bytes": max(marks, int(peak) if peak.isdigit() else 0) or None,
    "cpu_seconds": int(usage[1]) / 1e6 if usage
        else int(nanoseconds) / 1e9 if nanoseconds.isdigit() else None,
}))
"""


@dataclass(frozen=True, slots=True)
class Inside:
    """What a Python inside a container sees of it, in bytes and seconds since it was started."""

    processor: str | None
    num_cpus: int
    memory_bytes: int
    peak_bytes: int | None
    cpu_seconds: float | None


def look_inside(container: Container) -> Inside:
    """Ask a second Python inside a running container."""
    seen: dict[str, Any] = json.loads(container.python(_INSIDE))
    family = seen.pop("family")
    seen["processor"] = processor_name(seen["processor"], family)
    return Inside(**seen)


def container_hardware(
    container: Container, *, cpu_limit: float | None, memory_limit: str | None
) -> tuple[Device, Hardware]:
    """What a container's `serve` computes on, by its own log, once it is ready."""
    loaded = container.wait_for(r"loaded .* on (\S+) with (\d+) threads")
    device: Device = "cuda" if loaded[1].startswith("cuda") else "cpu"
    gpu = re.search(r"GPU: driver (.+)", container.log)
    inside = look_inside(container)
    return device, Hardware(
        processor=inside.processor,
        num_cpus=inside.num_cpus,
        memory_bytes=inside.memory_bytes,
        cpu_limit=cpu_limit,
        memory_limit=memory_limit,
        threads=int(loaded[2]),
        gpu=gpu[1] if gpu and device == "cuda" else None,
    )


def container_versions(container: Container) -> dict[str, str]:
    """Names and versions in the first line of a container's log."""
    first = container.wait_for(r"serve (.*python=.*)")[1]
    return dict(re.findall(r"(\S+)=(\S+)", first))


def this_machine(device: Device = "cpu", root: Path = Path("/")) -> Hardware:
    """This machine's processor, and how much of it there is; for cuda also the GPU by its driver.

    root: where /proc is found.
    """
    gpu = None
    if device == "cuda":
        told = "".join(map(_read, root.glob("proc/driver/nvidia/gpus/*/information")))
        model = re.search(r"Model:\s*(.+)", told)
        gpu = model[1] if model else None
    text = _read(root / "proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", text)
    family = re.search(r"cpu family\s*:\s*(\d+)\nmodel\s*:\s*(\d+)", text)
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"))
    return Hardware(
        processor=processor_name(name[1] if name else None, family.groups() if family else None),
        num_cpus=os.cpu_count(),
        memory_bytes=int(memory[1]) * 1024 if memory else None,
        gpu=gpu,
    )


def processor_name(name: str | None, family: tuple[str, ...] | list[str] | None) -> str | None:
    """The processor as it calls itself; cloud machines hide the model, so its numbers go along."""
    if name is None:
        return None
    name = re.sub(r"\((R|TM)\)", "", name).strip()
    if family and not re.search(r"\d", name):
        name += f" (family {family[0]}, model {family[1]})"
    return " ".join(name.split())


class Clock:
    """How busy this machine's processors are with what is neither the server nor this program.

    Only for a server on this machine whose own processor time is known.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._began = self._now()

    def others_share(self, server_cpu_seconds: float | None) -> float | None:
        """Their share of all processors' time since the clock was made, 0 to 1."""
        before, after = self._began, self._now()
        if before is None or after is None or server_cpu_seconds is None:
            return None
        elapsed, busy, own = (b - a for a, b in zip(before, after, strict=True))
        if elapsed <= 0:
            return None
        others = busy - own - server_cpu_seconds
        return min(1.0, max(0.0, others / (elapsed * (os.cpu_count() or 1))))

    def _now(self) -> tuple[float, float, float] | None:
        words = _read(self._root / "proc/stat").split("\n", 1)[0].split()
        if len(words) < 9 or words[0] != "cpu":
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
        ticks = os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system + irq + softirq + steal) / ticks
        return time.monotonic(), busy, time.process_time()


def load_average() -> float | None:
    """Of the last minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
