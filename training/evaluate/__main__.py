"""Caption accuracy: how often a generated image is the one that its caption describes.

    python -m training.evaluate --artefact out/demo/ml/model --data out/demo/data

An image is right when its nearest real image, by pixels and over all distinct images of `train/`
and `validation/`, is the caption's own; captions with equal images share it. Printed for all
held-out captions and for the novel ones, whose image never occurs in training: by greedy sampling,
by a single sample, and by the best of many samples as CLIP ranks them.

`attributes.json` beside the two folders (caption -> attribute -> word) adds the accuracy of each
attribute. The last line of stdout is JSON.
"""

from __future__ import annotations

if __name__ == "__main__":
    from dalle.platform.threads import spin_briefly

    spin_briefly()  # before torch is imported

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.errors import DalleError, UserError
from dalle.platform.user import name_user
from training.engine.devices import choose_device
from training.evaluate.ground_truth import TRAIN, GroundTruth, read_ground_truth
from training.evaluate.scores import evaluate, render_table

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 when the artefact or the data cannot be used."""
    name_user()
    options = _parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        artefact = artefacts.load(options.artefact, choose_device(options.device))
        dvae = artefact.require("dvae", "caption accuracy")
        artefact.require("transformer", "caption accuracy")
        artefact.require("tokenizer", "caption accuracy")
        if artefact.clip is None and not options.greedy and options.candidates > 1:
            raise UserError(
                f"the artefact has no clip, which the best of {options.candidates} needs; "
                "train the stage clip, or give --greedy or --candidates 1"
            )
        truth = read_ground_truth(options.data, dvae.config.image_size)
        _warn_of_other_data(artefact, truth, options.data)
        evaluation = evaluate(
            artefact,
            truth,
            num_candidates=options.candidates,
            greedy_only=options.greedy,
            limit=options.limit,
            seed=options.seed,
        )
    except DalleError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    print(render_table(evaluation), end="\n\n")
    if options.json is not None:
        options.json.write_text(evaluation.to_json() + "\n", encoding="utf-8")
    print(evaluation.to_json())
    return 0


def _warn_of_other_data(artefact: Artefact, truth: GroundTruth, directory: Path) -> None:
    """Warn of models that were trained on other pairs than those of `train/`."""
    for name, record in artefact.manifest.newest_records().items():
        if record.dataset_fingerprint != truth.fingerprint:
            logger.warning(
                "%s was not trained on %s: it may have seen captions that count as held out here",
                name,
                directory / TRAIN,
            )


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artefact", type=Path, required=True, help="directory that `train` wrote")
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with train/ and validation/"
    )
    parser.add_argument(
        "--candidates", type=_positive, default=32, help="images per caption for CLIP (32)"
    )
    parser.add_argument("--greedy", action="store_true", help="greedy sampling only, the quickest")
    parser.add_argument("--limit", type=_positive, help="so many captions, chosen by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of samples and of --limit (0)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last line there too")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
