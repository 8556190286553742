"""The whole way on one machine, without GPU or AWS: data, `train`, `serve`, and what came of it.

    python -m training.demo --out out/demo

writes the rainbow pictures, trains dVAE, transformer and CLIP on a part of their captions by the
real `train`, starts the real `serve`, asks it over HTTP for captions that were held out, and leaves

  OUT/report.html         losses, reconstructions, generated beside real pictures, caption accuracy
  OUT/contact_sheet.png   real pictures above the best generated ones
  OUT/ml/model            the artefact; `serve --root OUT/ml` serves it
  OUT/generated           the pictures that `serve` returned

What is done is reused by the next run, unless the data, the recipe or the code that it depends on
has changed; an interrupted training goes on where it was.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dalle.errors import DalleError, UserError
from dalle.platform.environment import Paths
from dalle.platform.threads import spin_briefly
from training import rainbow
from training.demo.code import digest_of_code, serving_code, showing_code, training_code
from training.demo.commands import ask, run_train, serving
from training.demo.recipe import (
    DATA_SECONDS,
    EVALUATE_SECONDS,
    RECIPE_MINUTES,
    REPORT_SECONDS,
    SERVE_SECONDS,
    START_SECONDS,
    read_recipe,
    training_seconds,
)
from training.demo.steps import Ledger, Step, announcer, digest_of_file, run_steps

NUM_CAPTIONS, NUM_CANDIDATES, NUM_IMAGES, SEED = 8, 16, 4, 7

STATE = "state.json"
MADE_DIRECTORIES = ("data", "data.unfinished", "ml", "generated")
MADE_FILES = ("accuracy.json", "report.html", "contact_sheet.png", "serve.log", STATE)


@dataclass(frozen=True)
class Demo:
    """One demo's directory and settings. limit: captions to evaluate; None: as time allows."""

    out: Path
    recipe: dict[str, str]
    limit: int | None = None

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def root(self) -> Path:
        """Of the training job, laid out as SageMaker lays out /opt/ml."""
        return self.out / "ml"

    @property
    def manifest(self) -> Path:
        return Paths(self.root).model / "manifest.json"

    @property
    def generated(self) -> Path:
        return self.out / "generated"

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    @property
    def sheet(self) -> Path:
        return self.out / "contact_sheet.png"

    @property
    def accuracy(self) -> Path:
        return self.out / "accuracy.json"

    @cached_property
    def captions(self) -> list[str]:
        """Captions to ask for: drawn from those that are not trained on."""
        everything = rainbow.samples()
        in_training = rainbow.split(len(everything), seed=0)
        held_out = [
            each.caption for each, known in zip(everything, in_training, strict=True) if not known
        ]
        chosen = np.random.default_rng(SEED).choice(len(held_out), NUM_CAPTIONS, replace=False)
        return [held_out[row] for row in chosen]

    def steps(self) -> list[Step]:
        """Everything there is to do, in order."""
        data_key = {"rainbow": digest_of_file(Path(rainbow.__file__)), "seed": 0}
        train_key = {
            "data": data_key,
            "hyperparameters": self.recipe,
            "code": digest_of_code(training_code()),
        }
        served_by, shown_by = digest_of_code(serving_code()), digest_of_code(showing_code())
        return [
            Step(
                name="data",
                title="writing the pictures: 9,216 captions, 30 % of them to train on",
                seconds=DATA_SECONDS,
                key=lambda: data_key,
                outputs=[self.data / "train", self.data / "validation"],
                action=self.write_data,
            ),
            Step(
                name="train",
                title="train: dVAE, transformer and CLIP, one after the other",
                seconds=START_SECONDS + training_seconds(self.recipe),
                key=lambda: train_key,
                outputs=[self.manifest],
                action=self.train,
            ),
            Step(
                name="serve",
                title=f"serve: {NUM_CAPTIONS} held-out captions over HTTP, the best {NUM_IMAGES} "
                f"of {NUM_CANDIDATES} pictures for each",
                seconds=SERVE_SECONDS,
                key=lambda: [digest_of_file(self.manifest), self.requests(), served_by],
                outputs=[self.generated / "replies.json"],
                action=self.ask,
            ),
            Step(
                name="evaluate",
                title="evaluate: how many of the held-out captions get the right picture",
                seconds=EVALUATE_SECONDS,
                key=lambda: [digest_of_file(self.manifest), data_key, self.limit, shown_by],
                outputs=[self.accuracy],
                action=self.evaluate,
            ),
            Step(
                name="report",
                title="report",
                seconds=REPORT_SECONDS,
                key=lambda: [
                    train_key,
                    digest_of_file(self.manifest),
                    digest_of_file(self.generated / "replies.json"),
                    digest_of_file(self.accuracy),
                    shown_by,
                ],
                outputs=[self.report, self.sheet],
                action=self.write_report,
            ),
        ]

    def requests(self) -> list[dict[str, object]]:
        """What `serve` is asked."""
        settings = {"num_candidates": NUM_CANDIDATES, "num_images": NUM_IMAGES, "seed": SEED}
        return [{"caption": caption, **settings} for caption in self.captions]

    def write_data(self, _is_continued: bool) -> None:
        unfinished = self.out / "data.unfinished"
        for directory in (unfinished, self.data):
            shutil.rmtree(directory, ignore_errors=True)
        rainbow.write_folder(unfinished)
        os.replace(unfinished, self.data)

    def train(self, is_continued: bool) -> None:
        """Train anew, or go on from the checkpoints of a run of the same recipe."""
        if not is_continued:
            shutil.rmtree(self.root, ignore_errors=True)
        file = Paths(self.root).hyperparameters
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.recipe, indent=1) + "\n", encoding="utf-8")
        channels = {name: self.data / name for name in ("train", "validation")}
        run_train(self.root, channels)

    def ask(self, _is_continued: bool) -> None:
        """Send the requests to a `serve` of our own and keep the pictures."""
        shutil.rmtree(self.generated, ignore_errors=True)
        self.generated.mkdir()
        replies = []
        with serving(self.root, self.out / "serve.log") as url:
            for request in self.requests():
                reply = {"caption": request["caption"], **ask(url, request)}
                for image in reply["images"]:
                    stem = str(request["caption"]).replace(" ", "_")
                    image["file"] = f"{stem}.{image['rank']}.png"
                    pixels = base64.b64decode(image.pop("image"))
                    (self.generated / image["file"]).write_bytes(pixels)
                replies.append(reply)
        (self.generated / "replies.json").write_text(json.dumps(replies, indent=1) + "\n", "utf-8")

    # The two below import torch, for which a run that reuses everything need not wait.

    def evaluate(self, _is_continued: bool) -> None:
        from training.demo.report import measure_accuracy

        measure_accuracy(self.root, self.data, self.accuracy, self.limit)

    def write_report(self, _is_continued: bool) -> None:
        from training.demo.report import write_demo_report

        write_demo_report(
            self.root,
            self.data,
            self.generated,
            self.accuracy,
            self.recipe,
            self.report,
            self.sheet,
        )


def prepare_directory(out: Path, again: bool) -> None:
    """Make the directory, or empty it of what a demo made. Raises UserError for somebody else's."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / STATE).exists():
        raise UserError(f"{out} holds files that no demo made; give an empty directory as --out")
    if again:
        for name in MADE_DIRECTORIES:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in MADE_FILES:
            (out / name).unlink(missing_ok=True)
    (out / STATE).touch()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = _parse_arguments(argv)
    spin_briefly()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    say = announcer()
    try:
        demo = Demo(options.out, read_recipe(options.recipe, options.minutes), options.limit)
        prepare_directory(demo.out, options.again)
        run_steps(demo.steps(), Ledger(demo.out / STATE), say)
        say("done\n")
        print(_ending(demo))
    except DalleError as error:
        print(f"demo: {error}\n(--again reuses nothing of earlier runs)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _ending(demo: Demo) -> str:
    """Where everything is, and how to go on."""
    content = json.loads(demo.accuracy.read_text("utf-8"))
    scope, methods = next(iter(content["scores"].items()))
    method, score = next(iter(methods.items()))
    script = Path(sys.executable).with_name("serve")
    serve = str(script) if script.exists() else f"{sys.executable} -m inference"
    artefact = shlex.quote(str(Paths(demo.root).model))
    lines = [
        f"caption accuracy ({method}): {score['right']:.3f} over {score['num_captions']:,} {scope}",
        f"report:         {demo.report}",
        f"contact sheet:  {demo.sheet}",
        f"artefact:       {Paths(demo.root).model}",
        f"serve it:       {serve} --root {shlex.quote(str(demo.root))}",
        f"best of 32:     {sys.executable} -m training.evaluate --artefact {artefact} "
        f"--data {shlex.quote(str(demo.data))} --limit 500",
    ]
    return "\n".join(lines)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="(default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=RECIPE_MINUTES,
        help="what it may all take on two quiet cores, at least 2.5 (default: %(default)g)",
    )
    parser.add_argument("--again", action="store_true", help="reuse nothing")
    parser.add_argument("--recipe", type=Path, help="hyperparameters to train with, a JSON file")
    parser.add_argument("--limit", type=int, help="evaluate so many captions only")
    options = parser.parse_args(argv)
    if options.minutes < 2.5:
        parser.error(f"--minutes must be at least 2.5, got {options.minutes:g}")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    return options


if __name__ == "__main__":
    sys.exit(main())
