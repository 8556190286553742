"""Train, serve and evaluate on one machine, without GPU or AWS: data, `train`, `serve`, a report.

    python -m training.demo --out out/demo

writes the rainbow shapes, trains dVAE, transformer and CLIP on a part of their captions by the
real `train`, starts the real `serve`, requests images for held-out captions over HTTP, and leaves

  OUT/report.html         losses, reconstructions, generated beside real images, caption accuracy
  OUT/contact_sheet.png   real images above the best generated ones
  OUT/ml/model            the artefact; `serve --root OUT/ml` serves it
  OUT/generated           the images that `serve` returned

The next run reuses each step, unless the data, the recipe or the code that it depends on has
changed; an interrupted training is resumed.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
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
from dalle.platform.user import name_user
from training import rainbow
from training.demo.commands import invoke, serving
from training.demo.run import RECIPE_MINUTES, SECONDS, RainbowRun, read_recipe, training_seconds
from training.demo.steps import (
    Step,
    announcer,
    digest_of_code,
    reporting_code,
    run_steps,
    serving_code,
)

NUM_CAPTIONS, NUM_CANDIDATES, NUM_IMAGES, SEED = 8, 16, 4, 7

STATE = "state.json"
MADE_DIRECTORIES = ("data", "data.unfinished", "ml", "generated")
MADE_FILES = ("accuracy.json", "report.html", "contact_sheet.png", "serve.log", STATE)


@dataclass(frozen=True)
class Demo(RainbowRun):
    """A run that is served and reported. limit: captions to evaluate; None: as time allows."""

    limit: int | None = None

    @cached_property
    def captions(self) -> list[str]:
        """Return the captions to request: a sample of those that are not trained on."""
        everything = rainbow.samples()
        in_training = rainbow.split(len(everything), seed=0)
        held_out = [
            each.caption for each, known in zip(everything, in_training, strict=True) if not known
        ]
        chosen = np.random.default_rng(SEED).choice(len(held_out), NUM_CAPTIONS, replace=False)
        return [held_out[row] for row in chosen]

    def steps(self) -> list[Step]:
        """Return all steps in order."""
        replies, accuracy = self.out / "generated/replies.json", self.out / "accuracy.json"
        reported_by = digest_of_code(reporting_code())
        return [
            self.data_step(
                "writing the images: 9,216 captions, 30 % of them to train on", SECONDS["data"]
            ),
            self.train_step(
                "train: dVAE, transformer and CLIP, one after the other",
                SECONDS["start"] + training_seconds(self.recipe),
            ),
            Step(
                name="serve",
                title=f"serve: {NUM_CAPTIONS} held-out captions over HTTP, the best {NUM_IMAGES} "
                f"of {NUM_CANDIDATES} images for each",
                seconds=SECONDS["serve"],
                key=[self.requests(), digest_of_code(serving_code())],
                inputs=[self.manifest],
                outputs=[replies],
                action=self.request_images,
            ),
            Step(
                name="evaluate",
                title="evaluate: how many of the held-out captions get the right image",
                seconds=SECONDS["evaluate"],
                key=[self.limit, reported_by],
                inputs=[self.manifest, Path(rainbow.__file__)],
                outputs=[accuracy],
                action=self.evaluate,
            ),
            Step(
                name="report",
                title="report",
                seconds=SECONDS["report"],
                key=[dict(self.recipe), reported_by],
                inputs=[self.manifest, replies, accuracy],
                outputs=[self.out / "report.html", self.out / "contact_sheet.png"],
                action=self.write_report,
            ),
        ]

    def requests(self) -> list[dict[str, object]]:
        """Return the requests for `serve`."""
        settings = {
            "num_candidates": NUM_CANDIDATES,
            "num_images": NUM_IMAGES,
            "distinct": False,  # as many for each caption, so that the contact sheet is full
            "seed": SEED,
        }
        return [{"caption": caption, **settings} for caption in self.captions]

    def request_images(self, _is_continued: bool) -> None:
        """Start `serve`, send the requests and keep the images."""
        generated = self.out / "generated"
        shutil.rmtree(generated, ignore_errors=True)
        generated.mkdir()
        replies = []
        with serving(self.root, self.out / "serve.log") as url:
            for request in self.requests():
                reply = {"caption": request["caption"], **invoke(url, request)}
                for image in reply["images"]:
                    stem = str(request["caption"]).replace(" ", "_")
                    image["file"] = f"{stem}.{image['rank']}.png"
                    (generated / image["file"]).write_bytes(base64.b64decode(image.pop("image")))
                replies.append(reply)
        (generated / "replies.json").write_text(json.dumps(replies, indent=1) + "\n", "utf-8")

    # The two below import torch.

    def evaluate(self, _is_continued: bool) -> None:
        from training.demo.report import measure_accuracy

        measure_accuracy(self, self.limit)

    def write_report(self, _is_continued: bool) -> None:
        from training.demo.report import write_demo_report

        write_demo_report(self)


def prepare_directory(out: Path, again: bool) -> None:
    """Make the directory, or empty it of a demo's files. Raises UserError for any other content."""
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
    """Run the command; return 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    name_user()
    options = _parse_arguments(argv)
    spin_briefly()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    say = announcer()
    try:
        recipe = read_recipe(options.recipe, options.minutes)
        demo = Demo(options.out, recipe, limit=options.limit)
        prepare_directory(demo.out, options.again)
        run_steps(demo.steps(), demo.out / STATE, say)
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
    """Return the lines that say where the files are, and how to go on."""
    content = json.loads((demo.out / "accuracy.json").read_text("utf-8"))
    scope, methods = next(iter(content["scores"].items()))
    method, score = next(iter(methods.items()))
    script = Path(sys.executable).with_name("serve")
    serve = str(script) if script.exists() else f"{sys.executable} -m inference"
    model = Paths(demo.root).model
    lines = [
        f"caption accuracy ({method}): {score['right']:.3f} over {score['num_captions']:,} {scope}",
        f"report:         {demo.out / 'report.html'}",
        f"contact sheet:  {demo.out / 'contact_sheet.png'}",
        f"artefact:       {model}",
        f"play with it:   DALLE_PLAYGROUND=1 {serve} --root {shlex.quote(str(demo.root))}",
        "                and open http://localhost:8080/ in a browser",
        f"best of 32:     {sys.executable} -m training.evaluate --artefact "
        f"{shlex.quote(str(model))} --data {shlex.quote(str(demo.data))} --limit 500",
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
        help="time for all steps on two quiet cores, at least 2.5 (default: %(default)g)",
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
