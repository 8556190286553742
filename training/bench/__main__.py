"""Training steps beside DALLE-pytorch 1.6.6, the speed of the loader, and the start of `train`.

    python -m training.bench

Makes an environment for DALLE-pytorch under out/peers, which borrows torch from the running one,
and measures there. Same sizes on both sides, random weights and tokens, full attention. The
contenders take turns step by step, so that other load falls on all alike; the results are medians
without each one's first step:

    dalle_pytorch   the loss, backward pass, clipping and Adam of its train_dalle.py, in fp32; on a
                    GPU also under autocast to bf16, which it leaves to DeepSpeed
    ours            the loss, backward pass, clipping, Muon and AdamW of `train`, by precision
    ours_adamw      the same without Muon, which is another recipe than theirs

Also: the peak memory of a step by torch's allocator, images a second that one core loads from
shards of 256 x 256, and the seconds from `train` to its first step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves

from dalle import peers
from dalle.models.transformer import TransformerConfig
from dalle.platform.stopwatch import timed
from dalle.platform.user import name_user
from training.bench.random_tokens import RandomTokens
from training.config.hyperparameters import parse
from training.data.tools.bench import measure
from training.engine.devices import peak_bytes
from training.engine.torch_engine import TorchEngine
from training.job.process import keep_memory

TARGETS = {"fp32": 1.5, "bf16": 4.0}
"""Samples a second in multiples of DALLE-pytorch's; bf16 on processors that multiply in it."""

TEXT_LENGTH, TEXT_VOCAB_SIZE, CODEBOOK_SIZE = 64, 10_000, 8192
BF16_FLAGS = ("avx512f", "avx512_bf16", "amx_bf16")
"""Flags of /proc/cpuinfo; with the last two a processor multiplies in bf16."""

_SIZES = {"width": 512, "layers": 12, "heads": 8, "grid": 32}
_START_JOB = {"stage": "dvae", "size": "tiny", "batch_size": "8", "max_steps": "1"}
_PASSED_ON = ("batch", "precision", "device", "threads", "rounds", *_SIZES)


def main(arguments: Sequence[str] | None = None) -> None:
    name_user()
    parser = argparse.ArgumentParser(
        prog="python -m training.bench",
        description="Measure training beside DALLE-pytorch 1.6.6, the loader and the start.",
    )
    parser.add_argument("--batch", type=int, default=2, help="pairs in a step")
    parser.add_argument("--precision", default="fp32,bf16", help="ours: fp32,bf16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument("--rounds", type=int, default=4, help="steps of each that count")
    for name, size in _SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size, help="of the transformer")
    parser.add_argument("--out", type=Path, default=Path("out/peers"), help="their environment")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.inside:
        passed_on = [word for name in _PASSED_ON for word in (f"--{name}", str(vars(given)[name]))]
        python = peers.make_environment(given.out)
        sys.exit(peers.run_inside(python, "training.bench", ["--inside", *passed_on]))
    seconds = _seconds_to_first_step()
    print(f"train: {seconds:.1f} s to the first step", flush=True)
    steps = _compare(given)
    loaded = measure(256, 1.0)[0]
    ours = max(each["samples_per_second"] for each in steps["results"])
    print(
        f"loader: {loaded.images_per_cpu_second:,.0f} images/s by one core, "
        f"{loaded.images_per_cpu_second / ours:,.0f} times the steps' rate"
    )
    more = {
        "start_seconds": round(seconds, 2),
        "loader_images_per_second": round(loaded.images_per_cpu_second, 1),
        "loader_times_training": round(loaded.images_per_cpu_second / ours, 1),
    }
    print(json.dumps(_machine(torch.device(given.device)) | steps | more))


def _compare(given: argparse.Namespace) -> dict[str, Any]:
    keep_memory()  # as `train` does; for both sides
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    precisions = given.precision.split(",")
    contenders: dict[str, Any] = {"dalle_pytorch fp32": _Theirs(given, "fp32")}
    if device.type == "cuda":
        contenders["dalle_pytorch bf16"] = _Theirs(given, "bf16")
    for precision in precisions:
        contenders[f"ours {precision}"] = _Ours(given, precision, has_muon=True)
        contenders[f"ours_adamw {precision}"] = _Ours(given, precision, has_muon=False)
    weights = {name: each.num_weights for name, each in contenders.items()}
    print(_machine(device), weights, flush=True)
    held = {name: peak_bytes(each, device) for name, each in contenders.items()}  # and a warm-up
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name, contender in contenders.items():
            seconds[name].append(timed(contender, device))
    reference = median(seconds["dalle_pytorch fp32"])
    results = []
    for name, each in seconds.items():
        line: dict[str, Any] = {
            "contender": name,
            "step_seconds": round(median(each), 3),
            "samples_per_second": round(given.batch / median(each), 4),
            "times_dalle_pytorch": round(reference / median(each), 2),
            "peak_megabytes": round((held[name] + _state_bytes(contenders[name])) / 1e6),
        }
        precision = name.split()[1]
        if name.startswith("ours") and device.type == "cpu":
            line["target"] = TARGETS[precision]
        results.append(line)
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    sizes = {name: vars(given)[name] for name in ("batch", "threads", "rounds", *_SIZES)}
    return {"sizes": sizes, "weights": weights, "results": results}


def _seconds_to_first_step() -> float:
    """Seconds from the start of the command `train` to its first step. Raises CalledProcessError.

    The job is a tiny dVAE on a handful of random images.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, data = Path(folder, "input/config"), Path(folder, "input/data/train")
        config.mkdir(parents=True)
        data.mkdir(parents=True)
        (config / "hyperparameters.json").write_text(json.dumps(_START_JOB | {"log_every": "1"}))
        generator = np.random.default_rng(0)
        for number in range(64):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / f"{number:03}.png")
            (data / f"{number:03}.txt").write_text(f"noise number {number}")
        began = time.perf_counter()
        command = [sys.executable, "-m", "training", "--root", folder]
        with subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            first = next((line for line in process.stdout if "dvae_step=" in line), None)
            seconds = time.perf_counter() - began
            process.terminate()
        if first is None:
            raise subprocess.CalledProcessError(process.returncode, command)
        return seconds


class _Theirs:
    """A training step of DALLE-pytorch's train_dalle.py: Adam, gradients clipped to 0.5."""

    def __init__(self, given: argparse.Namespace, precision: str) -> None:
        torch.manual_seed(0)
        device = torch.device(given.device)
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
        )
        self.model = peers.dalle_pytorch(
            width=given.width,
            num_layers=given.layers,
            num_heads=given.heads,
            text_length=TEXT_LENGTH,
            grid_size=given.grid,
            text_vocab_size=TEXT_VOCAB_SIZE,
            codebook_size=CODEBOOK_SIZE,
        ).to(device)
        parameters = [each for each in self.model.parameters() if each.requires_grad]
        self.optimiser = torch.optim.Adam(parameters, lr=3e-4)
        self.optimisers = [self.optimiser]
        self.text = torch.randint(1, TEXT_VOCAB_SIZE, (given.batch, TEXT_LENGTH), device=device)
        self.image = torch.randint(CODEBOOK_SIZE, (given.batch, given.grid**2), device=device)
        self.num_weights = sum(each.numel() for each in self.model.transformer.parameters())

    def __call__(self) -> None:
        with self.autocast:
            loss = self.model(self.text, self.image, return_loss=True)
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimiser.step()
        self.optimiser.zero_grad()


class _Ours:
    """A training step of `train`."""

    def __init__(self, given: argparse.Namespace, precision: str, *, has_muon: bool) -> None:
        config = TransformerConfig(
            text_vocab_size=TEXT_VOCAB_SIZE,
            text_length=TEXT_LENGTH,
            grid_size=given.grid,
            codebook_size=CODEBOOK_SIZE,
            width=given.width,
            num_layers=given.layers,
            num_heads=given.heads,
            feed_forward="geglu",  # as theirs, for the same number of weights
        )
        device = torch.device(given.device)
        stage = RandomTokens(config, given.batch, device)
        self.model = stage.model.to(device).train()
        raw = {"precision": precision} | ({} if has_muon else {"muon_learning_rate": "0"})
        self.engine = TorchEngine(stage, parse(raw).transformer, device)
        self.optimisers = self.engine.optimizers
        self.num_weights = sum(each.numel() for each in self.model.blocks.parameters())

    def __call__(self) -> None:
        loss, _ = self.engine.loss(None, 0.0)
        self.engine.backward(loss)
        self.engine.step(1_000, 0.5)


def _state_bytes(contender: _Theirs | _Ours) -> int:
    """Bytes of weights and moments."""
    states = [each.state_dict()["state"] for each in contender.optimisers]
    tensors = [*contender.model.parameters(), *contender.model.buffers(), *tree_leaves(states)]
    return sum(each.nbytes for each in tensors if isinstance(each, torch.Tensor))


def _machine(device: torch.device) -> dict[str, Any]:
    """The machine that the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    values = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return gpu | {
        "processor": values.get("model name", platform.machine()).strip(),
        "flags": [flag for flag in BF16_FLAGS if flag in flags],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
