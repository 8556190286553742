"""`python -m inference.bench`: speed of decoding on this machine, by stage.

    python -m inference.bench --size base          random weights, which have no effect on speed
    python -m inference.bench --model DIR          an artefact's sizes
    python -m inference.bench --model DIR --windows 1,auto   several positions a step, see .windows

For each precision and number of candidates: a decoding step at four depths of the image, in turn
with the others and with a probe of the memory's speed; tokens and images per second; memory. With
one candidate the figure to watch is the share of the memory's speed. Then each later stage of an
image alone, and whole requests that arrive together, by stage from the queue to the files. Times
are medians; the first of each kind warms up and is shown separately. On a GPU up to eight steps are
timed as one, because the host runs ahead of it. The last line is JSON.

On a CPU the fastest number of threads is used, found as `serve` finds it, unless `--threads` gives
one. For the cost of HTTP: `python -m inference.bench.http` and `python -m infra benchmark`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.decoding.engine import DecodeEngine
from dalle.models import sizes
from dalle.models.clip import Clip, ClipConfig
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.sizes import SizeName
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.platform.limits import usable_cpus
from dalle.platform.stopwatch import timed
from dalle.platform.user import name_user
from dalle.preprocess.images import encode_image
from dalle.preprocess.tokenizer import CaptionTokenizer
from inference.bench import steps as bench_steps
from inference.bench.requests import CAPTION, measure_requests
from inference.bench.steps import Memory, Timings
from inference.bench.windows import measure, parse_windows
from inference.engine.scheduler import to_pixels
from inference.engine.thread_tuning import choices, fastest, measure_steps

_TEXT_LENGTH = 64
_TEXT_VOCAB_SIZE = 10_000
_STAGE_IMAGES = 8  # images decoded and scored together
_STAGE_ROUNDS = 5
_CPU_PRECISIONS = ("fp32", "fp16", "int8")
_GPU_PRECISIONS = ("fp32", "bf16")
_PROFILED_DEPTH = bench_steps.DEPTHS[1]
_STEPS_TOGETHER = 8  # on a GPU, because the host runs ahead of it
_TRIED = 16  # candidates decoded together while the number of threads is chosen, as in `serve`


@dataclass(frozen=True)
class StepFigures:
    """Figures of one precision with one number of candidates."""

    precision: str
    candidates: int
    warm_up_ms: float
    step_ms: float
    spread: float
    tokens_per_second: float
    images_per_second: float
    bandwidth_share: float
    """Share of the measured speed of memory, for the least bytes that a step reads."""
    outside_kernels: float | None
    """Share of a step at a third of the image outside kernels: mostly Python. None on a GPU, which
    computes while Python continues."""
    tables_mb: float
    """Memory of the keys and values of all candidates."""


def main(arguments: Sequence[str] | None = None) -> None:
    name_user()
    parser = argparse.ArgumentParser(
        prog="python -m inference.bench",
        description="Measure the speed of decoding on this machine.",
    )
    parser.add_argument("--size", choices=get_args(SizeName), default="base")
    parser.add_argument("--model", type=Path, help="an artefact's directory, instead of --size")
    parser.add_argument("--full", action="store_true", help="full attention in every layer")
    parser.add_argument(
        "--precision",
        help="fp32,fp16,int8 on a CPU, fp32,bf16 on a GPU; default: the first and the last",
    )
    parser.add_argument(
        "--torch-kernels", action="store_true", help="steps by torch's kernels alone, to compare"
    )
    parser.add_argument("--candidates", default="1,8,32", help="decoded together: 1,8,32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch threads; default: the fastest number")
    parser.add_argument(
        "--requests", type=int, default=4, help="whole requests at once; 0 for none"
    )
    parser.add_argument(
        "--request-candidates", type=int, default=1, help="of each of those; default %(default)s"
    )
    parser.add_argument(
        "--rounds",
        type=bench_steps.at_least_one,
        default=8,
        help="steps at each depth, or requests with --windows, after one that warms up; at least 1",
    )
    parser.add_argument(
        "--windows",
        type=parse_windows,
        help="positions of a candidate that a step samples, like 1,auto: measure whole requests "
        "with each, and nothing else",
    )
    parser.add_argument(
        "--probe-mb",
        type=int,
        default=bench_steps.PROBE_BYTES >> 20,
        help="memory read to measure its speed; more than a processor's caches",
    )
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    artefact = artefacts.load(given.model, device) if given.model else _build(given.size, device)
    if artefact.transformer is None:
        parser.error(f"--model {given.model} has no transformer")
    model = _with_full_attention(artefact.transformer) if given.full else artefact.transformer
    fitting = _CPU_PRECISIONS if device.type == "cpu" else _GPU_PRECISIONS
    precisions = given.precision.split(",") if given.precision else [fitting[0], fitting[-1]]
    if unknown := set(precisions) - set(fitting):
        parser.error(f"--precision must be of {fitting} on {device}, got {sorted(unknown)}")
    if given.windows and device.type != "cpu":
        parser.error(f"--windows needs --device cpu, got {device}: a GPU's step has no windows")
    tried = {} if given.threads or device.type != "cpu" else _choose_threads(model)
    batches = [int(each) for each in given.candidates.split(",")]
    if given.windows:
        machine = bench_steps.describe_machine(device)
        print("  ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
        requests = measure(artefact, model, precisions, batches, given.windows, rounds=given.rounds)
        print(json.dumps(machine | {"windows": requests}))
        return
    result = run(
        artefact,
        model,
        precisions,
        batches,
        rounds=given.rounds,
        probe_bytes=given.probe_mb << 20,
        own_kernels=not given.torch_kernels,
    )
    if given.requests:
        whole = replace(artefact, transformer=model)
        result |= measure_requests(whole, given.requests, given.request_candidates)
    result["threads_ms"] = {number: round(1000 * each, 3) for number, each in tried.items()}
    print(json.dumps({"size": None if given.model else given.size, "full": given.full} | result))


@torch.inference_mode()
def run(
    artefact: Artefact,
    model: Dalle,
    precisions: Sequence[str],
    batches: Sequence[int],
    *,
    rounds: int,
    probe_bytes: int = bench_steps.PROBE_BYTES,
    own_kernels: bool = True,
) -> dict[str, Any]:
    """Measure everything, print it as it comes, and return it all."""
    device = model.text_position.device
    described = bench_steps.describe_machine(device)
    print("  ".join(f"{name} {value}" for name, value in described.items()), flush=True)
    memory = Memory(device, probe_bytes)
    prefill = _prefill_milliseconds(model, device)
    print(
        f"prefill of one caption: {prefill[0]:.1f} ms, warming up {prefill[1]:.1f} ms", flush=True
    )
    steps = []
    for batch in batches:
        for figures in _steps(model, batch, precisions, rounds, memory, own_kernels):
            steps.append(figures)
            outside = figures.outside_kernels
            print(
                f"{figures.precision}, {figures.candidates} candidates: {figures.step_ms:.2f} ms "
                f"a step (warming up {figures.warm_up_ms:.2f}, quartiles "
                f"{figures.spread:.0%} apart), {figures.tokens_per_second:.1f} tokens/s, "
                f"{figures.images_per_second:.3f} images/s, {figures.bandwidth_share:.0%} of "
                f"{memory.bytes_per_second / 1e9:.1f} GB/s"
                + ("" if outside is None else f", {outside:.0%} outside kernels"),
                flush=True,
            )
    stages = _stages(artefact, model, device)
    for name, (milliseconds, warm_up) in stages.items():
        print(f"{name}: {milliseconds:.2f} ms an image, warming up {warm_up:.2f} ms", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        described["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) // 10**6
    return described | {
        "own_kernels": own_kernels,
        "weights": sum(each.numel() for each in model.parameters()),
        "positions": model.config.num_positions,
        "memory_gb_per_second": round(memory.bytes_per_second / 1e9, 2),
        "prefill_ms": round(prefill[0], 2),
        "steps": [asdict(each) for each in steps],
        "stages_ms": {name: round(each[0], 3) for name, each in stages.items()},
        "peak_rss_mb": round(peak),
    }


def _steps(
    model: Dalle,
    batch: int,
    precisions: Sequence[str],
    rounds: int,
    memory: Memory,
    own_kernels: bool,
) -> list[StepFigures]:
    config, device = model.config, model.text_position.device
    ranges = bench_steps.wide_ranges(model)
    models = {precision: bench_steps.in_precision(model, precision) for precision in precisions}
    timings = {precision: Timings() for precision in precisions}
    tables: dict[str, float] = {}
    outside: dict[str, float] = {}
    on_cpu = device.type == "cpu"
    for depth in bench_steps.DEPTHS:
        engines = {
            precision: bench_steps.engine_at(
                models[precision], batch, depth, precision, ranges, own_kernels=own_kernels
            )
            for precision in precisions
        }
        steps = {precision: engine.step for precision, engine in engines.items()}
        left = config.num_positions - int(config.num_positions * depth)
        profiled = depth == _PROFILED_DEPTH
        left -= 1 + (bench_steps.PROFILED_STEPS if profiled else 0)
        here = min(rounds + 1, left)
        together = 1 if on_cpu else min(_STEPS_TOGETHER, left // max(1, here))
        bench_steps.take_turns(
            steps, timings, depth, here, device, memory, together=max(1, together)
        )
        if profiled:
            for precision in precisions:
                tables[precision] = engines[precision].num_bytes / 1e6
                if on_cpu:
                    outside[precision] = bench_steps.share_outside_kernels(steps[precision])
        del engines, steps
        bench_steps.forget()
    figures = []
    for precision, timing in timings.items():
        seconds = timing.step_seconds
        needed = bench_steps.step_bytes(model, batch, precision)
        figures.append(
            StepFigures(
                precision=precision,
                candidates=batch,
                warm_up_ms=1000 * max(timing.first.values()),
                step_ms=1000 * seconds,
                spread=timing.spread,
                tokens_per_second=batch * config.num_codebooks / seconds,
                images_per_second=batch / (seconds * config.num_positions),
                bandwidth_share=needed / seconds / memory.bytes_per_second,
                outside_kernels=outside.get(precision),
                tables_mb=tables[precision],
            )
        )
    return figures


def _choose_threads(model: Dalle) -> dict[int, float]:
    """Time a step by number of threads, in seconds, and use the fastest number from now on."""
    tried = measure_steps(DecodeEngine(model, _TRIED), choices(usable_cpus()), candidates=_TRIED)
    torch.set_num_threads(fastest(tried))
    return tried


def _prefill_milliseconds(model: Dalle, device: torch.device) -> tuple[float, float]:
    text_tokens = torch.ones(1, model.config.text_length, dtype=torch.int64, device=device)
    return _milliseconds(lambda: model.prefill(text_tokens, None, model.new_cache(1)), device)


def _stages(
    artefact: Artefact, model: Dalle, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Milliseconds per image, later and at first, of each stage after the sampling."""
    if artefact.dvae is None:
        return {}
    dvae, clip = artefact.dvae, artefact.clip
    config = model.config
    shape = (_STAGE_IMAGES, config.num_positions, config.num_codebooks)
    image_tokens = torch.randint(config.codebook_size, shape, device=device)
    images = dvae.decode(image_tokens)
    pixels = to_pixels(images)
    works: dict[str, Callable[[], object]] = {
        "decode": lambda: to_pixels(dvae.decode(image_tokens)),
        "encode": lambda: [encode_image(each, "png") for each in pixels],
    }
    if clip is not None:
        works["rank"] = lambda: clip.encode_image(images)
    found = {}
    for name, work in works.items():
        later, first = _milliseconds(work, device)
        found[name] = later / _STAGE_IMAGES, first / _STAGE_IMAGES
    return found


def _milliseconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median of some calls, and the time of the first call before them."""
    first = timed(work, device)
    later = [timed(work, device) for _ in range(_STAGE_ROUNDS)]
    return 1000 * statistics.median(later), 1000 * first


def _build(size: SizeName, device: torch.device) -> Artefact:
    """Build models of a size with random weights."""
    dvae = DiscreteVAE(DVAEConfig(**sizes.DVAE_SIZES[size]))
    tokenizer = CaptionTokenizer.train([CAPTION], kind="word", text_length=_TEXT_LENGTH)
    transformer = Dalle(
        TransformerConfig(
            text_vocab_size=_TEXT_VOCAB_SIZE,
            text_length=_TEXT_LENGTH,
            grid_size=dvae.config.grid_size,
            codebook_size=dvae.config.codebook_size,
            num_codebooks=dvae.config.num_codebooks,
            **sizes.TRANSFORMER_SIZES[size],
        )
    )
    clip = Clip(
        ClipConfig(
            image_size=dvae.config.image_size,
            text_vocab_size=_TEXT_VOCAB_SIZE,
            text_length=_TEXT_LENGTH + 1,
            **sizes.CLIP_SIZES[size],
        )
    )
    for model in (dvae, transformer, clip):
        model.to(device).eval().requires_grad_(False)
    return Artefact(dvae, transformer, clip, tokenizer)


def _with_full_attention(model: Dalle) -> Dalle:
    """Build a model of the same sizes with full attention in every layer and random weights."""
    config = replace(model.config, attention_kinds=("full",))
    return Dalle(config).to(model.text_position.device).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
