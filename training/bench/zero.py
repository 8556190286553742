"""Step time and memory of every ZeRO stage and precision on this machine's devices.

    python -m training.bench.zero --size small --batch-size 32

Trains one transformer on random tokens by each engine in turn, on every CUDA device, or on the CPU
in `--ranks` processes. Prints a Markdown table, and JSON as the last line. Memory is the peak of
torch's allocations on one rank over a job of two steps, from making the model to gathering the
weights. Recording it slows the steps, so another job times them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dalle.models.sizes import DVAE_SIZES, TRANSFORMER_SIZES, SizeName
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.platform.stopwatch import timed
from dalle.platform.user import name_user
from training.bench.random_tokens import RandomTokens
from training.config.hyperparameters import parse
from training.distributed.process_group import TorchProcessGroup
from training.engine.devices import peak_bytes
from training.engine.select import device_of_new, select_engine

TEXT_LENGTH, TEXT_VOCAB_SIZE = 64, 8192


@dataclass(frozen=True)
class Case:
    """One row of the table, as hyperparameters."""

    engine: str
    zero_stage: int | None
    precision: str
    offload: bool = False

    def hyperparameters(self) -> dict[str, str]:
        raw = {"engine": self.engine, "precision": self.precision, "warmup_steps": "0"}
        raw["muon_learning_rate"] = "0"  # DeepSpeed has AdamW alone
        if self.zero_stage is not None:
            raw["zero_stage"] = str(self.zero_stage)
        if self.offload:
            raw["offload_optimizer"] = "true"
            raw["offload_parameters"] = str(self.zero_stage == 3).lower()
        return raw


@dataclass(frozen=True)
class Measured:
    """The largest values of all ranks for a case.

    seconds, cpu_seconds: of a step, the median. peak_bytes: see above.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def cases(has_gpu: bool) -> list[Case]:
    """Return all cases; fp16 and offloading need a GPU."""
    precisions = ["fp32", "bf16", *(["fp16"] if has_gpu else [])]
    return [
        *(Case("torch", None, precision) for precision in precisions),
        Case("deepspeed", 0, "fp32"),
        *(Case("deepspeed", stage, precision) for stage in (1, 2, 3) for precision in precisions),
        *(Case("deepspeed", stage, "bf16", offload=True) for stage in (2, 3) if has_gpu),
    ]


def measure(
    case: Case, config: TransformerConfig, batch_size: int, num_steps: int, device: torch.device
) -> Measured:
    """Measure one case as one of the ranks. batch_size: of all ranks together."""
    gc.collect()
    peak = peak_bytes(lambda: _train(case, config, batch_size, 2, device), device)
    gc.collect()
    seconds, cpu_seconds = _train(case, config, batch_size, 1 + num_steps, device)
    # Without the first step, which allocates for all others.
    own = torch.tensor([median(seconds[1:]), median(cpu_seconds[1:]), peak], dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return Measured(own[0].item(), own[1].item(), int(own[2]))


def _train(
    case: Case, config: TransformerConfig, batch_size: int, num_steps: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Train a new model; return wall and CPU seconds of each step."""
    ranks = TorchProcessGroup()
    hyperparameters = parse(case.hyperparameters() | {"batch_size": str(batch_size)})
    stage = RandomTokens(config, batch_size // ranks.size, device)
    stage.model.to(device_of_new(hyperparameters, "transformer", device))
    engine = select_engine(stage, "transformer", hyperparameters, device, ranks)
    engine.begin(None)

    def step() -> None:
        loss, _ = engine.loss(None, 0.0)
        engine.backward(loss)
        engine.step(0, 0.0)

    seconds, cpu_seconds = [], []
    for _ in range(num_steps):
        cpu_started = time.process_time()
        seconds.append(timed(step, device))
        cpu_seconds.append(time.process_time() - cpu_started)
    engine.finish()
    return seconds, cpu_seconds


def _rank(rank: int, num_ranks: int, meeting: str, options: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
        init_method=meeting,
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(minutes=10),
    )
    config = _config(options.size, options.grid_size)
    results = []
    for case in cases(has_gpu):
        measured = measure(case, config, options.batch_size, options.steps, device)
        results.append({**asdict(case), **asdict(measured)})
        if rank == 0:
            print(_row(case, measured), flush=True)
    if rank == 0:
        print(json.dumps(_about(config, num_ranks, device, options) | {"results": results}))
    dist.destroy_process_group()


def _config(size: SizeName, grid_size: int) -> TransformerConfig:
    dvae = DVAE_SIZES[size]
    return TransformerConfig(
        text_vocab_size=TEXT_VOCAB_SIZE,
        text_length=TEXT_LENGTH,
        grid_size=grid_size,
        codebook_size=dvae["codebook_size"],
        num_codebooks=dvae["num_codebooks"],
        **TRANSFORMER_SIZES[size],
    )


def _row(case: Case, measured: Measured) -> str:
    zero = "—" if case.zero_stage is None else f"{case.zero_stage}{', offload' * case.offload}"
    return (
        f"| {case.engine} | {zero} | {case.precision} | {1000 * measured.seconds:,.0f} "
        f"| {1000 * measured.cpu_seconds:,.0f} | {measured.peak_bytes / 1e6:,.0f} |"
    )


def _about(
    config: TransformerConfig, num_ranks: int, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    model = Dalle(config)
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": asdict(config),
        "batch_size": options.batch_size,
        "num_ranks": num_ranks,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    name_user()
    parser = argparse.ArgumentParser(prog="python -m training.bench.zero")
    parser.add_argument("--size", choices=get_args(SizeName), default="small")
    parser.add_argument("--grid-size", type=int, default=8, help="side of the token grid")
    parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")
    parser.add_argument("--steps", type=int, default=5, help="that are measured")
    parser.add_argument("--ranks", type=int, default=2, help="processes, where there is no GPU")
    options = parser.parse_args(arguments)
    num_ranks = torch.cuda.device_count() or options.ranks
    if options.batch_size % num_ranks:
        parser.error(f"--batch-size must be a multiple of {num_ranks}, got {options.batch_size}")
    print("| engine | ZeRO | precision | ms a step | CPU ms a step | peak MB a rank |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _rank, (num_ranks, f"file://{folder}/ranks", options), nprocs=num_ranks
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
