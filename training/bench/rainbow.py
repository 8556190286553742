"""Train the rainbow recipe from nothing, once for each seed, and score it.

    python -m training.bench.rainbow --seeds 0 1 2 --out out/bench

A seed chooses the training captions and all random numbers of training. Each is evaluated on all
its held-out captions: reconstruction, greedy, and the best of 32 candidates, the last on a fixed
random subset of `--limit` captions. The next run reuses finished steps, and an interrupted training
is resumed. The last line of stdout is one JSON object.
"""

from __future__ import annotations

if __name__ == "__main__":
    from dalle.platform.threads import spin_briefly

    spin_briefly()  # before torch is imported

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from dalle.errors import DalleError, UserError
from dalle.platform.user import name_user
from training import rainbow
from training.demo.run import RainbowRun, read_recipe_file
from training.demo.steps import Step, announcer, digest_of_code, reporting_code, run_steps
from training.evaluate.pixels import CLOSE
from training.evaluate.scores import ALL, GREEDY, NOVEL, SINGLE, evaluate

RECIPE = "rainbow_bench.json"
NUM_CANDIDATES = 32
LIMIT = 1_000
BEST = f"best of {NUM_CANDIDATES}"
SECONDS = {"data": 10.0, "train": 2_400.0, "greedy": 60.0, "best": 300.0}  # of one core


@dataclass(frozen=True)
class SeedRun(RainbowRun):
    """The run of one seed. limit: captions for the best of many."""

    limit: int = LIMIT

    def scores(self, name: str) -> Path:
        """Return the file of an evaluation; name: greedy or best."""
        return self.out / f"{name}.json"

    def steps(self) -> list[Step]:
        """Return all steps in order."""
        seed, code = f"seed {self.seed}", digest_of_code(reporting_code())
        steps = [
            self.data_step(f"{seed}: writing the images", SECONDS["data"]),
            self.train_step(f"{seed}: training dVAE, transformer and CLIP", SECONDS["train"]),
        ]
        for name, title, limit in (
            ("greedy", "all held-out captions, greedily", None),
            ("best", f"{self.limit:,} of them, {BEST}", self.limit),
        ):
            steps.append(
                Step(
                    name=name,
                    title=f"{seed}: {title}",
                    seconds=SECONDS[name],
                    key=[limit, code],
                    inputs=[self.manifest, Path(rainbow.__file__)],
                    outputs=[self.scores(name)],
                    action=partial(self.evaluate, name, limit),
                )
            )
        return steps

    def evaluate(self, name: str, limit: int | None, _is_continued: bool) -> None:
        artefact, truth = self.read()
        evaluation = evaluate(
            artefact,
            truth,
            num_candidates=NUM_CANDIDATES,
            greedy_only=name == "greedy",
            limit=limit,
            seed=0,  # chooses the captions too: the same places of each seed's list
        )
        self.scores(name).write_text(evaluation.to_json() + "\n", encoding="utf-8")

    def figures(self) -> dict[str, float]:
        """Return the numbers of the finished seed: shares, then steps and seconds."""
        greedy, best = (
            json.loads(self.scores(name).read_text("utf-8")) for name in ("greedy", "best")
        )
        stages = json.loads(self.manifest.read_text("utf-8"))["stages"]
        numbers = {"reconstruction": greedy["reconstruction"]}
        numbers |= of_pixels("reconstruction", greedy["reconstruction_pixels"])
        subset = f"of {best['scores'][ALL][BEST]['num_captions']}"
        for label, scores, method in (
            (GREEDY, greedy, GREEDY),
            (f"{GREEDY}, {subset}", best, GREEDY),
            (f"{SINGLE}, {subset}", best, SINGLE),
            (f"{BEST}, {subset}", best, BEST),
        ):
            score = scores["scores"][ALL][method]
            numbers[label] = score["right"]
            numbers[f"{label}, novel"] = scores["scores"][NOVEL][method]["right"]
            numbers[f"{label}, memorised"] = score["memorised"]
            numbers[f"{label}, right colour"] = score["per_attribute"]["colour"]
            numbers |= of_pixels(label, score["pixels"])
        for stage in stages:
            numbers[f"{stage['stage']} steps"] = stage["steps"]
            numbers[f"{stage['stage']} seconds"] = stage["wall_seconds"]
            numbers[f"{stage['stage']} core-seconds"] = stage["cpu_seconds"]
        numbers["seconds"] = sum(stage["wall_seconds"] for stage in stages)
        numbers["core-seconds"] = sum(stage["cpu_seconds"] for stage in stages)
        return numbers


def of_pixels(label: str, score: Mapping[str, float]) -> dict[str, float]:
    """Return what a table says of a `PixelScore`."""
    return {
        f"{label}, mean error of 255": score["error"],
        f"{label}, all within {CLOSE}": score["close"],
    }


def render_table(by_seed: Mapping[int, Mapping[str, float]]) -> str:
    """Return a line per number: the mean, then each seed."""
    lines = [f"{'':<40}{'mean':>10}" + "".join(f"{f'seed {seed}':>10}" for seed in by_seed)]
    for name, mean in means(by_seed).items():
        cells = [mean, *(numbers[name] for numbers in by_seed.values())]
        form = "10.0f" if "seconds" in name or "steps" in name else "10.4f"
        lines.append(f"{name:<40}" + "".join(f"{cell:{form}}" for cell in cells))
    return "\n".join(lines)


def means(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over the seeds of each number."""
    names = next(iter(by_seed.values()))
    return {name: fmean(numbers[name] for numbers in by_seed.values()) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 with the cause on stderr."""
    name_user()
    options = _parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    by_seed: dict[int, dict[str, float]] = {}
    try:
        recipe = read_recipe_file(options.recipe, RECIPE)
        if "seed" in recipe:
            raise UserError("the recipe sets seed, which --seeds chooses; leave it out")
        say = announcer()
        for seed in options.seeds:
            run = SeedRun(options.out / f"seed-{seed}", recipe, seed, options.limit)
            run.out.mkdir(parents=True, exist_ok=True)
            run_steps(run.steps(), run.out / "state.json", say)
            by_seed[seed] = run.figures()
    except DalleError as error:
        print(f"bench_rainbow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench_rainbow: interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    print(render_table(by_seed), end="\n\n")
    summary: dict[str, Any] = {
        "seeds": options.seeds,
        "limit": options.limit,
        "recipe": recipe,
        "mean": means(by_seed),
        "each": list(by_seed.values()),
    }
    print(json.dumps(summary))
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.bench.rainbow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to work in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--recipe", type=Path, help=f"JSON of hyperparameters ({RECIPE})")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help=f"captions for {BEST} (default: {LIMIT:,})"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
