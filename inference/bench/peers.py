"""`python -m inference.bench.peers`: this engine beside DALLE-pytorch 1.6.6, in one process.

Makes an environment for DALLE-pytorch under out/peers, which shares torch with the current one, and
runs itself there. Both models have the same sizes (256 pixels: width 512, 12 layers, 8 heads, 64
text tokens, 1,024 image tokens, 50 million weights in the blocks), random weights and full
attention. Their two contenders and ours take turns, step by step:

    shipped   use_cache=True as released: without guidance the cache is never passed on
    patched   the same with the cache passed on, one line
    ours      by precision

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dalle import peers
from dalle.models.transformer import Dalle, TransformerConfig
from dalle.platform.user import name_user
from inference.bench import steps as bench_steps

TARGETS = {"shipped": {1: 60.0}, "patched": {1: 3.0, 8: 4.0, 32: 5.0}}


def main(arguments: Sequence[str] | None = None) -> None:
    name_user()
    parser = argparse.ArgumentParser(
        prog="python -m inference.bench.peers", description="Compare with DALLE-pytorch 1.6.6."
    )
    parser.add_argument("--batch", default="1,8,32", help="candidates together: 1,8,32")
    parser.add_argument("--precision", default="fp32,int8", help="ours: fp32,fp16,int8")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument(
        "--rounds",
        type=bench_steps.at_least_one,
        default=6,
        help="steps of each at each depth, after one that warms up; at least 1",
    )
    parser.add_argument("--out", type=Path, default=Path("out/peers"), help="its environment")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.inside:
        _compare(
            batches=[int(each) for each in given.batch.split(",")],
            precisions=given.precision.split(","),
            threads=given.threads,
            rounds=given.rounds,
        )
        return
    names = ("batch", "precision", "threads", "rounds")
    passed_on = [word for name in names for word in (f"--{name}", str(getattr(given, name)))]
    python = peers.make_environment(given.out)
    sys.exit(peers.run_inside(python, "inference.bench.peers", ["--inside", *passed_on]))


def _compare(batches: list[int], precisions: list[str], threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    theirs = peers.dalle_pytorch().eval()
    config = TransformerConfig(
        text_vocab_size=10_000,
        text_length=64,
        grid_size=32,
        codebook_size=8192,
        feed_forward="geglu",  # as theirs: 50 million weights in the blocks
    )
    ours = Dalle(config).eval().requires_grad_(False)
    device = torch.device("cpu")
    described = bench_steps.describe_machine(device)
    weights = {
        name: sum(each.numel() for each in part.parameters())
        for name, part in (("theirs", theirs.transformer), ("ours", ours.blocks))
    }
    print(described, weights, flush=True)
    ranges = bench_steps.wide_ranges(ours)
    lines = []
    for batch in batches:
        contenders = [*(["shipped"] if batch in TARGETS["shipped"] else []), "patched", *precisions]
        timings = {name: bench_steps.Timings() for name in contenders}
        for depth in bench_steps.DEPTHS:
            steps: dict[str, Callable[[], object]] = {
                precision: bench_steps.engine_at(ours, batch, depth, precision, ranges).step
                for precision in precisions
            }
            primed = int(1024 * depth)
            steps["patched"] = _Patched(theirs, batch, primed)
            if "shipped" in contenders:
                shipped = {"shipped": _Shipped(theirs, batch, primed)}
                bench_steps.take_turns(shipped | steps, timings, depth, 2, device)
            bench_steps.take_turns(steps, timings, depth, rounds + 1, device)
            del steps
            bench_steps.forget()
        for name, timing in timings.items():
            line: dict[str, Any] = {
                "contender": name,
                "batch": batch,
                "step_ms": round(1000 * timing.step_seconds, 2),
                "tokens_per_second": round(batch / timing.step_seconds, 2),
            }
            for peer in ("shipped", "patched"):
                if peer in timings and name in precisions:
                    ratio = timings[peer].step_seconds / timing.step_seconds
                    line[f"times_{peer}"] = round(ratio, 2)
                    if batch in TARGETS[peer]:
                        line[f"target_{peer}"] = TARGETS[peer][batch]
            lines.append(line)
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    print(json.dumps(described | {"weights": weights, "results": lines}))


class _Shipped:
    """One pass of the loop in their `generate_images`, use_cache=True."""

    def __init__(self, model: Any, batch: int, primed: int) -> None:
        self.model = model
        self.text = torch.randint(1, 10_000, (1, 64)).expand(batch, -1)
        self.image = torch.randint(8192, (1, primed)).expand(batch, -1)
        self.cache: dict[Any, Any] = {}

    def __call__(self) -> None:
        from dalle_pytorch.dalle_pytorch import (  # type: ignore[import-not-found]
            gumbel_sample,
            top_k,
        )

        logits = self.logits()[:, -1, :]
        sample = gumbel_sample(top_k(logits, thres=0.5), temperature=1.0, dim=-1)
        sample -= self.model.num_text_tokens
        self.image = torch.cat((self.image, sample[:, None].clamp(0, 8191)), dim=-1)

    def logits(self) -> Any:
        return self.model.forward_with_cond_scale(
            self.text, self.image, cond_scale=1, cache=self.cache
        )


class _Patched(_Shipped):
    """The same with the cache passed on, and filled for all rows from one row."""

    def __init__(self, model: Any, batch: int, primed: int) -> None:
        super().__init__(model, batch, primed)
        model(self.text[:1], self.image[:1], cache=self.cache)
        self.cache = {key: _widen(value, batch) for key, value in self.cache.items()}
        # The cache lacks the token that comes next.
        self()

    def logits(self) -> Any:
        return self.model(self.text, self.image, cache=self.cache)


def _widen(value: Any, batch: int) -> Any:
    if isinstance(value, (tuple, deque)):
        return type(value)(_widen(each, batch) for each in value)
    return value.expand(batch, *value.shape[1:]).contiguous() if hasattr(value, "expand") else value


if __name__ == "__main__":
    main()
