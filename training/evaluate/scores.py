"""Caption accuracy: how often a generated picture is the one that its caption asks for.

    python -m training.evaluate.scores --artefact out/demo/ml/model --data out/demo/data

A picture is right when its nearest real picture, by pixels and over all distinct pictures of
`train/` and `validation/`, is the caption's own; captions whose pictures are equal share it. It is
told for all held-out captions and for the novel ones, whose picture never occurs in training; by
greedy sampling, by a single sample, and by the best of many samples as CLIP ranks them
(`Clip.merit`).

`attributes.json` beside the two folders (caption -> attribute -> word) adds accuracies by
attribute. Nothing here knows what the words are.
"""

from __future__ import annotations

if __name__ == "__main__":
    from dalle.platform.threads import spin_briefly

    spin_briefly()  # before torch is imported

import argparse
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingOptions
from dalle.errors import DalleError, UserError
from training.engine.devices import choose_device
from training.evaluate.ground_truth import TRAIN, GroundTruth, read_ground_truth
from training.report.content import CaptionAccuracy
from training.report.samples import generate_candidates, reconstruct, require

logger = logging.getLogger(__name__)

GREEDY, SINGLE = "greedy", "single sample"
ALL, NOVEL = "held-out captions", "held-out captions whose picture is not in training"
NUMBERS_APART = 1 << 20  # between the candidate numbers of two captions, so that all draws differ
BLOCK_BYTES = 256 << 20  # of generated pictures that wait for their nearest neighbours


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares, 0 to 1, over `num_captions` captions with one picture each.

    memorised: nearest to a training picture that is another caption's.
    per_attribute: attribute -> share in which it is right, over the captions that have it.
    """

    num_captions: int
    right: float
    memorised: float
    per_attribute: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an artefact can do with held-out captions.

    num_pictures: classes, of which num_training_pictures occur in training.
    num_held_out: captions there are; fewer are scored when a limit was given.
    reconstruction: share of held-out pictures that the dVAE leaves nearest to themselves.
    scores: scope (all, novel) -> method -> score; a scope without captions is left out.
    seconds: method -> wall time.
    """

    num_pictures: int
    num_training_pictures: int
    num_held_out: int
    num_candidates: int
    seed: int
    reconstruction: float
    scores: dict[str, dict[str, Score]]
    seconds: dict[str, float]

    def accuracies(self) -> list[CaptionAccuracy]:
        """The same for a report."""
        num_scored = next(iter(self.scores[ALL].values())).num_captions
        which = "all" if num_scored == self.num_held_out else "a sample of"
        return [
            CaptionAccuracy(
                scope=f"{which} {scope}",
                num_captions=next(iter(methods.values())).num_captions,
                overall={method: score.right for method, score in methods.items()},
                per_attribute=_by_attribute(methods),
            )
            for scope, methods in self.scores.items()
        ]


def _by_attribute(methods: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """Method -> score turned into attribute -> method -> share."""
    attributes = next(iter(methods.values())).per_attribute
    return {
        attribute: {method: score.per_attribute[attribute] for method, score in methods.items()}
        for attribute in attributes
    }


def evaluate(
    artefact: Artefact,
    truth: GroundTruth,
    *,
    num_candidates: int = 32,
    greedy_only: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Draw pictures for the held-out captions and score them.

    limit: evaluate so many captions only, drawn at random by `seed`. Best of `num_candidates` is
    left out when that is 1 or the artefact has no CLIP.
    Raises ArtefactError naming the component that is missing.
    """
    captions = choose_captions(truth, limit, seed)
    numbers = {caption: number for number, caption in enumerate(truth.held_out)}
    own = sorted({number for caption in captions for number in truth.own(caption)})
    reconstruction = _reconstruction_accuracy(artefact, truth, own)
    nearest: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}

    began = time.monotonic()
    (nearest[GREEDY],) = _nearest_of_drawn(
        artefact, truth, captions, [[0]] * len(captions), seed, SamplingOptions(temperature=0.0)
    )
    seconds[GREEDY] = time.monotonic() - began
    if not greedy_only:
        began = time.monotonic()
        count = num_candidates if artefact.clip is not None else 1
        first = [numbers[caption] * NUMBERS_APART for caption in captions]
        candidates = [range(number, number + count) for number in first]
        drawn = _nearest_of_drawn(artefact, truth, captions, candidates, seed, SamplingOptions())
        methods = [SINGLE, f"best of {num_candidates}"][: len(drawn)]
        nearest |= dict(zip(methods, drawn, strict=True))
        seconds[methods[-1]] = time.monotonic() - began

    novel = np.array([truth.is_novel(caption) for caption in captions])
    scopes = {ALL: np.arange(len(captions)), NOVEL: np.flatnonzero(novel)}
    return Evaluation(
        num_pictures=len(truth),
        num_training_pictures=sum(truth.in_training),
        num_held_out=len(truth.held_out),
        num_candidates=num_candidates,
        seed=seed,
        reconstruction=reconstruction,
        scores={
            scope: {
                method: score(truth, [captions[row] for row in rows], classes[rows].tolist())
                for method, classes in nearest.items()
            }
            for scope, rows in scopes.items()
            if len(rows)
        },
        seconds=seconds,
    )


def score(truth: GroundTruth, captions: Sequence[str], nearest: Sequence[int]) -> Score:
    """Hold the class nearest to each caption's picture against the caption; at least one."""
    right = memorised = 0
    by_attribute: defaultdict[str, list[bool]] = defaultdict(list)
    for caption, number in zip(captions, nearest, strict=True):
        if number in truth.own(caption):
            right += 1
        elif truth.in_training[number]:
            memorised += 1
        for attribute, word in truth.attributes.get(caption, {}).items():
            by_attribute[attribute].append(truth.has_word(number, attribute, word))
    return Score(
        num_captions=len(captions),
        right=right / len(captions),
        memorised=memorised / len(captions),
        per_attribute={name: sum(each) / len(each) for name, each in by_attribute.items()},
    )


def choose_captions(truth: GroundTruth, limit: int | None, seed: int) -> list[str]:
    """At most `limit` of the held-out captions, drawn by `seed`, in their order."""
    if limit is None or limit >= len(truth.held_out):
        return truth.held_out
    chosen = np.random.default_rng(seed).permutation(len(truth.held_out))[:limit]
    return [truth.held_out[row] for row in sorted(chosen)]


def _nearest_of_drawn(
    artefact: Artefact,
    truth: GroundTruth,
    captions: Sequence[str],
    candidates: Sequence[Sequence[int]],
    seed: int,
    options: SamplingOptions,
) -> list[Tensor]:
    """Classes [C] nearest to each caption's first candidate, and to its best if CLIP ranks it."""
    drawn = generate_candidates(artefact, captions, candidates, seed=seed, options=options)
    both = len(candidates[0]) > 1 and artefact.clip is not None
    block = max(1, BLOCK_BYTES // (2 * 3 * truth.image_size**2))
    waiting: list[Tensor] = []
    nearest: list[list[Tensor]] = [[] for _ in range(1 + both)]
    what = f"best of {len(candidates[0])}" if both else "drawing"
    for number, each in enumerate(tqdm(drawn, what, len(captions), disable=None, unit="captions")):
        waiting.append(each.images[[0, each.best(1)[0]] if both else [0]])
        if len(waiting) == block or number + 1 == len(captions):
            chosen = torch.stack(waiting, dim=1)  # [1 or 2, captions, 3, S, S]
            for images, parts in zip(chosen, nearest, strict=True):
                parts.append(truth.nearest(images))
            waiting = []
    return [torch.cat(parts) for parts in nearest]


def _reconstruction_accuracy(artefact: Artefact, truth: GroundTruth, classes: list[int]) -> float:
    """Share of the classes whose picture is still nearest to itself after the dVAE."""
    require(artefact, "dvae", purpose="reconstruction")
    assert artefact.dvae is not None
    block = max(1, BLOCK_BYTES // (3 * truth.image_size**2))
    right = 0
    for start in range(0, len(classes), block):
        numbers = classes[start : start + block]
        again = reconstruct(artefact.dvae, truth.pictures(numbers))
        right += int((truth.nearest(again) == torch.tensor(numbers)).sum())
    return right / len(classes)


def render_table(evaluation: Evaluation) -> str:
    """The numbers as text for a terminal."""
    blocks = [
        f"{evaluation.num_pictures:,} distinct pictures, {evaluation.num_training_pictures:,} of "
        f"them in training; reconstructed and still nearest to itself: "
        f"{evaluation.reconstruction:.3f}"
    ]
    for accuracy, methods in zip(evaluation.accuracies(), evaluation.scores.values(), strict=True):
        scores = list(methods.values())
        rows = [("right", [each.right for each in scores])]
        rows += [(f"  {n}", list(each.values())) for n, each in accuracy.per_attribute.items()]
        rows.append(("another caption's training picture", [each.memorised for each in scores]))
        lines = [f"{accuracy.scope} ({accuracy.num_captions:,})", _row("", methods)]
        lines += [_row(label, [f"{share:.3f}" for share in shares]) for label, shares in rows]
        blocks.append("\n".join(lines))
    times = ", ".join(f"{name} {each:.1f} s" for name, each in evaluation.seconds.items())
    return "\n\n".join([*blocks, f"time: {times}"])


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:<36}" + "".join(f"{cell:>16}" for cell in cells)


def to_json(evaluation: Evaluation) -> str:
    """One line, all numbers."""
    return json.dumps(asdict(evaluation))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 1 when the artefact or the data cannot be used."""
    options = _parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        device = choose_device(options.device)
        artefact = artefacts.load(options.artefact, device)
        require(artefact, "dvae", "transformer", "tokenizer", purpose="caption accuracy")
        assert artefact.dvae is not None
        if artefact.clip is None and not options.greedy and options.candidates > 1:
            raise UserError(
                f"the artefact has no clip, which the best of {options.candidates} needs; "
                "train the stage clip, or give --greedy or --candidates 1"
            )
        truth = read_ground_truth(options.data, artefact.dvae.config.image_size)
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
        options.json.write_text(to_json(evaluation) + "\n", encoding="utf-8")
    print(to_json(evaluation))
    return 0


def _warn_of_other_data(artefact: Artefact, truth: GroundTruth, directory: Path) -> None:
    """Only of a model that was trained on `train/` can it be said what was held out."""
    for name, record in artefact.manifest.newest_records().items():
        if record.dataset_fingerprint != truth.fingerprint:
            logger.warning(
                "%s was not trained on %s: it may have seen captions that count as held out here",
                name,
                directory / TRAIN,
            )


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate.scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artefact", type=Path, required=True, help="directory that `train` wrote")
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with train/ and validation/"
    )
    parser.add_argument(
        "--candidates", type=_positive, default=32, help="pictures per caption for CLIP (32)"
    )
    parser.add_argument("--greedy", action="store_true", help="greedy sampling only, the quickest")
    parser.add_argument("--limit", type=_positive, help="so many captions only, drawn by the seed")
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
