"""What `train --plan` is told on the command line, and what it finds out otherwise."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from dalle.platform.environment import Job
from training.config.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from training.memory.plan import Devices

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_NAMES = ("hosts", "devices_per_host", "device_memory", "json")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The options of `train --plan`."""
    group = parser.add_argument_group("plan", "what the job would run on, in place of this machine")
    group.add_argument(
        "--plan", action="store_true", help="print the memory that each device needs, then end"
    )
    group.add_argument(
        "--hosts", type=_count, metavar="N", help="hosts (default: those of resourceconfig.json)"
    )
    group.add_argument(
        "--devices-per-host", type=_count, metavar="N", help="devices of each (default: this one's)"
    )
    group.add_argument(
        "--device-memory",
        type=parse_bytes,
        metavar="SIZE",
        help="memory of a GPU, such as 24g (default: this machine's GPU or free memory)",
    )
    group.add_argument("--json", action="store_true", help="one line of JSON, sizes in bytes")


def check_plan_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with a usage error when an option of the plan stands without `--plan`."""
    given = [name for name in _NAMES if getattr(options, name)]
    if given and not options.plan:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        parser.error(f"{flags}: only with --plan")


def parse_bytes(text: str) -> int:
    """Bytes of `24g` (GiB), `512m` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 24g, got {text!r}")
    return round(float(match[1]) * _UNITS[match[2]])


def run_plan(job: Job, hyperparameters: Hyperparameters, options: argparse.Namespace) -> int:
    """Print the plan. Returns 0 when all stages fit or nothing is known of the memory, else 1."""
    # Imported here: torch takes seconds, which a wrong command need not wait for.
    from training.memory.plan import as_json, plan, render

    devices = _devices(job, options)
    plans = plan(job, hyperparameters, devices)
    print(as_json(plans, devices) if options.json else render(plans, devices))
    return 1 if any(each.job.fits is False for each in plans) else 0


def _devices(job: Job, options: argparse.Namespace) -> Devices:
    """Those named by the options; what they leave open is as on this machine."""
    import torch

    from dalle.platform.limits import free_host_memory
    from training.memory.plan import Devices

    num_hosts, per_host = options.hosts or len(job.hosts), options.devices_per_host or 1
    if options.device_memory is not None:
        return Devices(num_hosts, per_host, "cuda", options.device_memory)
    if job.device == "cpu" or not torch.cuda.is_available():
        if job.device == "cuda":
            return Devices(num_hosts, per_host, "cuda", None)
        return Devices(num_hosts, per_host, "cpu", free_host_memory() // per_host)
    memory = torch.cuda.get_device_properties(0).total_memory
    per_host = options.devices_per_host or torch.cuda.device_count()
    return Devices(num_hosts, per_host, "cuda", memory)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 100,000, got {text!r}")
    return int(text)
