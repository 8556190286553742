"""Train the rainbow recipe from nothing, once a seed, and tell what it can do.

    python -m training.bench.rainbow --seeds 0 1 2 --out out/bench

A seed draws both the training captions and all random numbers of training. Each is evaluated on
all captions held out from it: reconstruction, greedy, and the best of 32 candidates, the last on a
fixed random subset of `--limit` captions. What is done is reused by the next run, and an
interrupted training goes on where it was. The last line of stdout is one JSON object.
"""

from __future__ import annotations

if __name__ == "__main__":
    from dalle.platform.threads import spin_briefly

    spin_briefly()  # before torch is imported

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dalle import artefact as artefacts
from dalle.errors import DalleError, UserError
from dalle.platform.environment import Paths
from training import rainbow
from training.demo.code import digest_of_code, showing_code, training_code
from training.demo.commands import run_train
from training.demo.recipe import read_recipe_file
from training.demo.steps import Ledger, Step, announcer, digest_of_file, run_steps
from training.engine.devices import choose_device
from training.evaluate.ground_truth import read_ground_truth
from training.evaluate.scores import ALL, GREEDY, NOVEL, evaluate

RECIPE = "rainbow_bench.json"
NUM_CANDIDATES = 32
LIMIT = 1_000
BEST = f"best of {NUM_CANDIDATES}"
SECONDS = {"data": 10.0, "train": 2_400.0, "greedy": 60.0, "best": 300.0}  # of one core


@dataclass(frozen=True)
class SeedRun:
    """One seed's directory below `--out` and what is done in it."""

    out: Path
    seed: int
    recipe: Mapping[str, str]
    limit: int

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def root(self) -> Path:
        """Of the training job."""
        return self.out / "ml"

    @property
    def model(self) -> Path:
        return Paths(self.root).model

    @property
    def manifest(self) -> Path:
        return self.model / "manifest.json"

    def evaluation(self, name: str) -> Path:
        """The file with an evaluation's numbers; name: greedy or best."""
        return self.out / f"{name}.json"

    def steps(self) -> list[Step]:
        """Everything there is to do, in order."""
        data_key = {"rainbow": digest_of_file(Path(rainbow.__file__)), "seed": self.seed}
        train_key = {
            "data": data_key,
            "code": digest_of_code(training_code()),
            "hyperparameters": dict(self.recipe),
        }
        scored_by = digest_of_code(showing_code())
        return [
            Step(
                name="data",
                title=f"seed {self.seed}: writing the pictures",
                seconds=SECONDS["data"],
                key=lambda: data_key,
                outputs=[self.data / "train", self.data / "validation"],
                action=self.write_data,
            ),
            Step(
                name="train",
                title=f"seed {self.seed}: training dVAE, transformer and CLIP",
                seconds=SECONDS["train"],
                key=lambda: train_key,
                outputs=[self.manifest],
                action=self.train,
            ),
            Step(
                name="greedy",
                title=f"seed {self.seed}: all held-out captions, greedily",
                seconds=SECONDS["greedy"],
                key=lambda: [digest_of_file(self.manifest), data_key, scored_by],
                outputs=[self.evaluation("greedy")],
                action=lambda _: self.evaluate("greedy"),
            ),
            Step(
                name="best",
                title=f"seed {self.seed}: {self.limit:,} of them, {BEST}",
                seconds=SECONDS["best"],
                key=lambda: [digest_of_file(self.manifest), data_key, scored_by, self.limit],
                outputs=[self.evaluation("best")],
                action=lambda _: self.evaluate("best"),
            ),
        ]

    def write_data(self, _is_continued: bool) -> None:
        unfinished = self.out / "data.unfinished"
        for directory in (unfinished, self.data):
            shutil.rmtree(directory, ignore_errors=True)
        rainbow.write_folder(unfinished, self.seed)
        os.replace(unfinished, self.data)

    def train(self, is_continued: bool) -> None:
        """Train anew, or go on from the checkpoints of an interrupted run of the same recipe."""
        if not is_continued:
            shutil.rmtree(self.root, ignore_errors=True)
        file = Paths(self.root).hyperparameters
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = {**self.recipe, "seed": str(self.seed)}
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        run_train(self.root, {name: self.data / name for name in ("train", "validation")})

    def evaluate(self, name: str) -> None:
        # On what `train` trained on.
        device = choose_device(os.environ.get("DALLE_DEVICE", "auto"))
        artefact = artefacts.load(self.model, device)
        assert artefact.dvae is not None, "run_train leaves no artefact without one"
        evaluation = evaluate(
            artefact,
            read_ground_truth(self.data, artefact.dvae.config.image_size),
            num_candidates=NUM_CANDIDATES,
            greedy_only=name == "greedy",
            limit=None if name == "greedy" else self.limit,
            # The subset is drawn by it: the same places of each seed's list.
            seed=0,
        )
        self.evaluation(name).write_text(evaluation.to_json() + "\n", encoding="utf-8")

    def figures(self) -> dict[str, float]:
        """The numbers of the finished seed, all shares but the last ones."""
        greedy, best = (
            json.loads(self.evaluation(name).read_text("utf-8")) for name in ("greedy", "best")
        )
        stages = json.loads(self.manifest.read_text("utf-8"))["stages"]
        numbers = {"reconstruction": greedy["reconstruction"]}
        subset = f"of {best['scores'][ALL][BEST]['num_captions']}"
        for label, scores, method in (
            (GREEDY, greedy, GREEDY),
            (f"{GREEDY}, {subset}", best, GREEDY),
            (f"single sample, {subset}", best, "single sample"),
            (f"{BEST}, {subset}", best, BEST),
        ):
            score = scores["scores"][ALL][method]
            numbers[label] = score["right"]
            numbers[f"{label}, novel"] = scores["scores"][NOVEL][method]["right"]
            numbers[f"{label}, memorised"] = score["memorised"]
            numbers[f"{label}, right colour"] = score["per_attribute"]["colour"]
        for stage in stages:
            numbers[f"{stage['stage']} steps"] = stage["steps"]
            numbers[f"{stage['stage']} seconds"] = stage["wall_seconds"]
            numbers[f"{stage['stage']} core-seconds"] = stage["cpu_seconds"]
        numbers["seconds"] = sum(stage["wall_seconds"] for stage in stages)
        numbers["core-seconds"] = sum(stage["cpu_seconds"] for stage in stages)
        return numbers


def render_table(by_seed: Mapping[int, Mapping[str, float]]) -> str:
    """A line per number: the mean, then each seed."""
    lines = [f"{'':<40}{'mean':>10}" + "".join(f"{f'seed {seed}':>10}" for seed in by_seed)]
    for name, mean in means(by_seed).items():
        cells = [mean, *(numbers[name] for numbers in by_seed.values())]
        form = "10.0f" if "seconds" in name or "steps" in name else "10.4f"
        lines.append(f"{name:<40}" + "".join(f"{cell:{form}}" for cell in cells))
    return "\n".join(lines)


def means(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Over the seeds, number by number."""
    names = next(iter(by_seed.values()))
    return {name: fmean(numbers[name] for numbers in by_seed.values()) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 1 with the cause on stderr."""
    options = _parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    by_seed: dict[int, dict[str, float]] = {}
    try:
        recipe = read_recipe_file(options.recipe, RECIPE)
        if "seed" in recipe:
            raise UserError("the recipe sets seed, which --seeds chooses; leave it out")
        say = announcer()
        for seed in options.seeds:
            run = SeedRun(options.out / f"seed-{seed}", seed, recipe, options.limit)
            run.out.mkdir(parents=True, exist_ok=True)
            run_steps(run.steps(), Ledger(run.out / "state.json"), say)
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
