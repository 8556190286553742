"""Timing of an engine's steps at several depths of the image, and of the memory's speed.

Compared steps are timed in turn, so that other load on the machine affects all of them alike.
Results are medians; the first step at each depth warms up and does not count.
Letters: B candidates decoded together, N positions, M codes per position.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dalle.decoding.cpu.step import CpuStep
from dalle.decoding.cpu.torch_step import KeyRange
from dalle.decoding.engine import DecodeEngine
from dalle.decoding.sampling import SamplingOptions
from dalle.decoding.select import new_step
from dalle.models.transformer import Dalle
from dalle.platform.stopwatch import timed
from dalle.types import Precision

DEPTHS = (0.05, 0.35, 0.65, 0.95)  # shares of an image at which steps are timed
PROFILED_STEPS = 5  # the first of them warms up
PROBE_BYTES = 512 * 1024**2  # larger than a processor's caches


@dataclass
class Timings:
    """Seconds of the steps of one contender, by depth."""

    first: dict[float, float] = field(default_factory=dict)
    """The step that warms up."""
    later: dict[float, list[float]] = field(default_factory=dict)

    def note(self, depth: float, seconds: float) -> None:
        """Record a step; the first one at a depth is the warm-up."""
        if depth in self.first:
            self.later.setdefault(depth, []).append(seconds)
        else:
            self.first[depth] = seconds

    @property
    def step_seconds(self) -> float:
        """Mean over the depths of the median step: an image's time divided by its positions."""
        return statistics.mean(statistics.median(each) for each in self.later.values())

    @property
    def spread(self) -> float:
        """Quartile distance over the median at the worst depth; 0 where each has one step."""
        spreads = [0.0]
        for seconds in self.later.values():
            if len(seconds) > 1:
                low, median, high = statistics.quantiles(seconds, n=4)
                spreads.append((high - low) / median)
        return max(spreads)


class Memory:
    """Speed at which this process reads memory."""

    def __init__(self, device: torch.device, probe_bytes: int = PROBE_BYTES) -> None:
        self._device = device
        self._probe = torch.ones(probe_bytes // 4, device=device).view(4096, -1)
        self._vector = torch.ones(self._probe.shape[1], device=device)
        self._speeds: list[float] = []

    def probe(self) -> None:
        """Read the probe by a sum and by a product, and record the faster one."""
        fastest = min(
            timed(lambda: self._probe.sum(), self._device),
            timed(lambda: torch.mv(self._probe, self._vector), self._device),
        )
        self._speeds.append(4 * self._probe.numel() / fastest)

    @property
    def bytes_per_second(self) -> float:
        """Median over the probes."""
        return statistics.median(self._speeds)


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    timings: Mapping[str, Timings],
    depth: float,
    rounds: int,
    device: torch.device,
    memory: Memory | None = None,
    *,
    together: int = 1,
) -> None:
    """Time each of the steps once a round, in turn, and probe the memory beside them.

    rounds: the first one warms up where the depth is new. together: steps timed as one, which a GPU
    receives while it computes the first; the warm-up is one step.
    """

    def turn(step: Callable[[], object], number: int) -> None:
        for _ in range(number):
            step()

    for _ in range(rounds):
        for name, step in steps.items():
            number = together if depth in timings[name].first else 1
            timings[name].note(depth, timed(partial(turn, step, number), device) / number)
        if memory is not None:
            memory.probe()


def engine_at(
    model: Dalle,
    batch: int,
    depth: float,
    precision: str,
    key_ranges: list[KeyRange] | None,
    *,
    own_kernels: bool = True,
) -> DecodeEngine:
    """Build an engine with a candidate at the given depth in every slot, after random tokens.

    Its steps sample one position of each.
    own_kernels: as of `new_step`.
    """
    config = model.config
    device = model.text_position.device
    generator = torch.Generator().manual_seed(0)
    text_tokens = torch.randint(
        1, config.text_vocab_size, (1, config.text_length), generator=generator
    )
    prime = torch.randint(
        config.codebook_size,
        (int(config.num_positions * depth), config.num_codebooks),
        generator=generator,
    )
    # For bf16 the model is in bf16 already, see `in_precision`.
    weights: Precision = precision  # type: ignore[assignment]
    step = new_step(model, batch, weights, key_ranges, own_kernels=own_kernels)
    engine = DecodeEngine(model, batch, step=step, window=1)
    engine.submit(
        text_tokens.to(device),
        candidates=range(batch),
        seed=0,
        options=SamplingOptions(),
        prime_tokens=prime.to(device),
    )
    return engine


def in_precision(model: Dalle, precision: str) -> Dalle:
    """Return the model that computes the captions for a step in a precision."""
    return copy.deepcopy(model).to(torch.bfloat16) if precision == "bf16" else model


def share_outside_kernels(step: Callable[[], object]) -> float:
    """Share of a step's time outside torch's operators and the compiled step, 0 to 1.

    An upper bound: it includes the profiler's time.
    """
    whole = "engine step"
    step()  # warms up
    profiler = torch.autograd.profiler.profile(use_kineto=True)  # type: ignore[no-untyped-call]
    with _compiled_calls_recorded(), profiler as profile:
        for _ in range(PROFILED_STEPS - 1):
            with torch.autograd.profiler.record_function(whole):
                step()
    (found,) = [each for each in profile.key_averages() if each.key == whole]
    return float(found.self_cpu_time_total / found.cpu_time_total)


@contextmanager
def _compiled_calls_recorded() -> Iterator[None]:
    """Record calls of the compiled step as operators, which the profiler would miss."""
    call = CpuStep._call

    def recorded(self: CpuStep, *arguments: Any, **options: Any) -> None:
        with torch.autograd.profiler.record_function("compiled step"):
            call(self, *arguments, **options)

    CpuStep._call = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        CpuStep._call = call  # type: ignore[method-assign]


def wide_ranges(model: Dalle) -> list[KeyRange]:
    """Key ranges for random weights, where only the time matters."""
    shape = (model.config.num_heads, model.config.head_width)
    return [KeyRange(torch.full(shape, -8.0), torch.full(shape, 8.0))] * model.config.num_layers


def step_bytes(model: Dalle, batch: int, precision: str) -> float:
    """Least number of bytes that a step reads at mid-image: each weight once, and the keys and
    values that each candidate's query sees."""
    config = model.config
    weight_bytes = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[precision]
    each_key = 1 if precision == "int8" else 2 if precision == "bf16" else 4
    weights = sum(each.numel() for each in model.blocks.parameters() if each.ndim == 2)
    weights += sum(head.get_parameter("to_logits.weight").numel() for head in model.code_heads)
    seen = 0.0
    for layer in range(config.num_layers):
        kind = config.kind_of_layer(layer)
        text, grid = config.text_length + 1, config.grid_size
        seen += (
            text
            + {
                "full": config.num_positions / 2,
                "axial_row": grid / 2,
                "axial_col": grid / 2,
                "conv_like": config.conv_kernel_size**2 / 2,
            }[kind]
        )
    return weights * weight_bytes + batch * seen * 2 * config.width * each_key


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Describe the device, the processor and the versions that a figure depends on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = named[0].partition(":")[2].strip() if named else name
    described: dict[str, str | int] = {
        "device": str(device),
        "processor": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def forget() -> None:
    """Free the memory of the last measurement."""
    gc.collect()


def at_least_one(text: str) -> int:
    """Parse a count of an option. Raises argparse's error for less than 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
