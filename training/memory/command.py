"""`train --plan`: its options, table and JSON. See `training.memory.plan`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle.models.configs import ClipConfig, ImageTokenizerConfig
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.platform.environment import Job
from dalle.types import STAGES
from training.config.fields import Hyperparameters
from training.memory.instances import PRICES, hourly_prices

if TYPE_CHECKING:
    from training.memory.plan import Devices, Row, StagePlan
    from training.memory.sizing.choose import Given
    from training.memory.sizing.plan import SizingPlan

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_NAMES = ("hosts", "devices_per_host", "device_memory", "prices", "json")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train --plan`."""
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
    group.add_argument(
        "--prices",
        type=Path,
        metavar="FILE",
        help="infra's price table, for dollars beside times (default: a checkout's own)",
    )
    group.add_argument("--json", action="store_true", help="one line of JSON, sizes in bytes")


def check_plan_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error when an option of the plan is given without `--plan`."""
    given = [name for name in _NAMES if getattr(options, name)]
    if given and not options.plan:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        parser.error(f"{flags}: only with --plan")


def parse_bytes(text: str) -> int:
    """Return the bytes of `24g` (GiB), `512m` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 24g, got {text!r}")
    return round(float(match[1]) * _UNITS[match[2]])


def run_plan(
    job: Job,
    hyperparameters: Hyperparameters,
    options: argparse.Namespace,
    tokenizer_model: ImageTokenizerConfig | None = None,
    clip: ClipConfig | None = None,
    legacy: LegacyTransformerConfig | None = None,
) -> int:
    """Print the plan. Returns 0 when all stages fit or the device memory is unknown, else 1.

    tokenizer_model, clip, legacy: as of `plan`.
    """
    # Imported here: torch takes seconds, which a wrong command need not wait for.
    from training.memory.plan import plan
    from training.memory.sizing.choose import Given

    devices = _devices(job, options)
    if hyperparameters.job_minutes is not None:
        given = Given(dvae=tokenizer_model, transformer=legacy, clip=clip)
        sizing = _sizing(job, hyperparameters, given, options)
        hyperparameters = sizing.settled
        if not options.json:
            print("\n".join([*sizing.lines, ""]))
    plans = plan(job, hyperparameters, devices, tokenizer_model, clip, legacy)
    print(_json(plans, devices) if options.json else _table(plans, devices))
    return 1 if any(each.job.fits is False for each in plans) else 0


def _sizing(
    job: Job, hyperparameters: Hyperparameters, given: Given, options: argparse.Namespace
) -> SizingPlan:
    """Return what size=auto would choose on this machine, whatever the options say of others."""
    from training.engine.devices import choose_device
    from training.memory.sizing.plan import plan_sizes
    from training.memory.sizing.speed import MeasuredSpeed
    from training.stopping import NEVER

    stage = hyperparameters.stage
    names = [stage] if stage != "all" else [*STAGES]
    kept = {"dvae": given.dvae, "clip": given.clip, "transformer": given.transformer}
    names = [name for name in names if kept[name] is None or hyperparameters.trains_on(name)]
    prices = options.prices or (PRICES if PRICES.is_file() else None)
    device = choose_device(job.device, 0)
    return plan_sizes(
        job,
        hyperparameters,
        names,
        given,
        MeasuredSpeed(device, NEVER),
        device_type=device.type,
        prices={} if prices is None else hourly_prices(prices),
    )


def _devices(job: Job, options: argparse.Namespace) -> Devices:
    """Return the devices of the options; what they leave open is that of this machine."""
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


def _table(plans: Sequence[StagePlan], devices: Devices) -> str:
    """Return a table for each stage, in GiB."""
    from training.memory.plan import HEADROOM

    memory = "unknown memory" if devices.memory is None else f"{_gib(devices.memory)} GiB each"
    lines = [
        f"{devices.num_hosts} host(s) with {devices.per_host} {devices.kind} device(s), {memory}; "
        f"{HEADROOM:.0%} of it are left free. All figures in GiB on one device."
    ]
    headings = ("weights", "grads", "optim.", "act.", "other", "total", "host")
    for each in plans:
        lines += [
            "",
            f"{each.stage}, size {each.size}: {each.num_parameters / 1e6:,.1f} million weights, "
            f"batch_size {each.batch_size}, {each.job.part_size} pairs at once on a device, "
            f"{each.job.setting.precision}",
            _line("", headings, "largest part"),
        ]
        for row in [each.job, *each.others]:
            m = row.memory
            other = m.exchange + m.runtime
            sizes = (m.weights, m.gradients, m.optimiser, m.activations, other, m.device, m.host)
            verdict = {None: "", True: f"{row.largest}", False: f"{row.largest}, too large"}
            label = ("this job: " if row is each.job else "") + row.setting.label
            lines.append(_line(label, map(_gib, sizes), verdict[row.fits]))
        if each.job.fits is False:
            advice = each.advice()
            lines.append(
                f"-> it fits with {advice}"
                if advice
                else "-> nothing here fits: take larger or more devices, or a smaller size"
            )
        elif each.job.fits:
            lines.append("-> it fits as it is")
    return "\n".join(lines)


def _line(label: str, cells: Iterable[str], end: str) -> str:
    return f"{label:46} " + "".join(f"{cell:>8}" for cell in cells) + f"  {end}"


def _json(plans: Sequence[StagePlan], devices: Devices) -> str:
    """Return one line; sizes in bytes."""

    def row(each: Row) -> dict[str, Any]:
        return {
            **asdict(each.setting),
            "part_size": each.part_size,
            "memory": asdict(each.memory) | {"device": each.memory.device},
            "largest_part_size": each.largest,
            "fits": each.fits,
        }

    return json.dumps(
        {
            "devices": asdict(devices) | {"usable": devices.usable},
            "stages": [
                {
                    "stage": each.stage,
                    "size": each.size,
                    "num_parameters": each.num_parameters,
                    "batch_size": each.batch_size,
                    "step_flops": each.step_flops,
                    "budget": each.budget,
                    "job": row(each.job),
                    "others": [row(other) for other in each.others],
                    "advice": each.advice(),
                }
                for each in plans
            ],
        }
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
