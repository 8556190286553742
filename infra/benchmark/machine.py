"""A server's hardware and its use: of this machine, or of a container from inside.

Nothing is guessed: a value that cannot be read is None.
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
# Pages of files that another container read first count there, so that this group's peak may be too
# low; the peaks of the processes include them.
marks = 0
for status in Path("/proc").glob("[0-9]*/status"):
    mark = re.search(r"VmHWM:\\s*(\\d+) kB", read(status))
    if mark and status.parent.name != str(os.getpid()):
        marks += int(mark[1]) * 1024
usage = re.search(r"usage_usec (\\d+)", read(group + "cpu.stat"))
nanoseconds = read(group + "cpuacct/cpuacct.usage").strip()
print(json.dumps({
    "cpuinfo": read("/proc/cpuinfo")[:2000],
    "num_cpus": len(os.sched_getaffinity(0)),
    "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    "peak_bytes": max(marks, int(peak) if peak.isdigit() else 0) or None,
    "cpu_seconds": int(usage[1]) / 1e6 if usage
        else int(nanoseconds) / 1e9 if nanoseconds.isdigit() else None,
}))
"""


@dataclass(frozen=True, slots=True)
class ContainerUsage:
    """A container's hardware and its use since the start, in bytes and seconds, from inside."""

    processor: str | None
    num_cpus: int
    memory_bytes: int
    peak_bytes: int | None
    cpu_seconds: float | None


def container_usage(container: Container) -> ContainerUsage:
    """Return the hardware and its use as a second Python inside the container reads them."""
    seen: dict[str, Any] = json.loads(container.python(_INSIDE))
    return ContainerUsage(processor=processor_name(seen.pop("cpuinfo")), **seen)


def container_hardware(
    container: Container, *, cpu_limit: float | None, memory_limit: str | None
) -> tuple[Device, Hardware]:
    """Return device and hardware of a container's `serve` by its log, once it is ready."""
    loaded = container.wait_for(r"loaded .* on (\S+) with (\d+) threads")
    device: Device = "cuda" if loaded[1].startswith("cuda") else "cpu"
    gpu = re.search(r"GPU: driver (.+)", container.log)
    inside = container_usage(container)
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
    """Return the versions in the first line of a container's log, by name."""
    first = container.wait_for(r"serve (.*python=.*)")[1]
    return dict(re.findall(r"(\S+)=(\S+)", first))


def this_machine(device: Device = "cpu", root: Path = Path("/")) -> Hardware:
    """Return this machine's hardware; for cuda with the GPU's name by its driver.

    root: stands for /, below which /proc is read.
    """
    gpu = None
    if device == "cuda":
        text = "".join(map(_read, root.glob("proc/driver/nvidia/gpus/*/information")))
        model = re.search(r"Model:\s*(.+)", text)
        gpu = model[1] if model else None
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"))
    return Hardware(
        processor=processor_name(_read(root / "proc/cpuinfo")),
        num_cpus=os.cpu_count(),
        memory_bytes=int(memory[1]) * 1024 if memory else None,
        gpu=gpu,
    )


def processor_name(cpuinfo: str) -> str | None:
    """Return the processor's name in /proc/cpuinfo, with family and model where the name hides it.

    Cloud machines have names without a number, such as "Intel Xeon Processor".
    """
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    if found is None:
        return None
    name = re.sub(r"\((R|TM)\)", "", found[1]).strip()
    family = re.search(r"cpu family\s*:\s*(\d+)\nmodel\s*:\s*(\d+)", cpuinfo)
    if family and not re.search(r"\d", name):
        name += f" (family {family[1]}, model {family[2]})"
    return " ".join(name.split())


class CpuClock:
    """Processor time on this machine that neither the server nor this program uses.

    Only for a server on this machine whose processor time is known.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._began = self._now()

    def others_share(self, server_cpu_seconds: float | None) -> float | None:
        """Return the others' share of all processors' time since the start, 0 to 1."""
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
    """Return the load average of the last minute; None where the system has none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
