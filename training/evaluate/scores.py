"""Caption accuracy of an artefact: its arithmetic, and the images that are scored.

    held-out captions -> `generate_candidates` -> `GroundTruth.nearest` -> `Score` per scope, method

Scopes: all held-out captions, and the novel ones, whose image never occurs in training. Methods:
greedy sampling, a single sample, and the best of many samples as CLIP ranks them (`Clip.merit`).
Knows nothing of the words of captions or attributes.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor
from tqdm import tqdm

from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingOptions
from dalle.manifest import SamplingSettings
from training.evaluate.ground_truth import GroundTruth
from training.evaluate.pixels import CLOSE, PixelErrors, PixelScore, compare_pixels, join
from training.report.content import CaptionAccuracy
from training.report.samples import generate_candidates, reconstruct

GREEDY, SINGLE = "greedy", "single sample"
ALL, NOVEL = "held-out captions", "held-out captions whose picture is not in training"
NUMBERS_APART = 1 << 20  # between the candidate numbers of two captions, so that no two are equal
_PIXELS = {
    "error": "mean error",
    "close": f"all within {CLOSE}",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
}
BLOCK_BYTES = 256 << 20  # of generated images that are compared in one pass over the real ones


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares, 0 to 1, over `num_captions` captions with one image each.

    memorised: nearest to a training image of another caption.
    pixels: against the caption's own real image; of several the nearest.
    per_attribute: attribute -> share in which it is right, over the captions that have it.
    """

    num_captions: int
    right: float
    memorised: float
    pixels: PixelScore
    per_attribute: dict[str, float]


@dataclass(frozen=True)
class Compared:
    """Images of some captions, one each, and the real ones.

    nearest: [C] int64, the class of the nearest real image.
    pixels: against the caption's own real image.
    """

    nearest: Tensor
    pixels: PixelErrors

    def of(self, rows: NDArray[np.int64]) -> Compared:
        """Return those of some captions."""
        chosen = torch.from_numpy(rows)
        return Compared(self.nearest[chosen], self.pixels.of(chosen))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Caption accuracy and reconstruction of one artefact.

    num_pictures: classes, of which num_training_pictures occur in training.
    num_held_out: all held-out captions; with a limit fewer are scored.
    reconstruction: share of held-out images that are still nearest to themselves after the dVAE.
    reconstruction_pixels: the same images after the dVAE against themselves.
    sampling: settings of all methods but greedy sampling: the model's own.
    scores: scope (all, novel) -> method -> score; a scope without captions is left out.
    seconds: method -> wall time.
    """

    num_pictures: int
    num_training_pictures: int
    num_held_out: int
    num_candidates: int
    seed: int
    reconstruction: float
    reconstruction_pixels: PixelScore
    scores: dict[str, dict[str, Score]]
    seconds: dict[str, float]
    sampling: SamplingSettings = SamplingSettings()

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read what `to_json` wrote."""
        return TypeAdapter(cls).validate_json(text)

    def to_json(self) -> str:
        """Return all numbers on one line."""
        return json.dumps({**asdict(self), "sampling": self.sampling.model_dump()})

    def accuracies(self) -> list[CaptionAccuracy]:
        """Return the scores as a report shows them."""
        num_scored = next(iter(self.scores[ALL].values())).num_captions
        which = "all" if num_scored == self.num_held_out else "a sample of"
        result = []
        for scope, methods in self.scores.items():
            first = next(iter(methods.values()))
            result.append(
                CaptionAccuracy(
                    scope=f"{which} {scope}",
                    num_captions=first.num_captions,
                    overall={method: score.right for method, score in methods.items()},
                    per_attribute={
                        name: {method: each.per_attribute[name] for method, each in methods.items()}
                        for name in first.per_attribute
                    },
                )
            )
        return result


def evaluate(
    artefact: Artefact,
    truth: GroundTruth,
    *,
    num_candidates: int = 32,
    greedy_only: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Generate images for the held-out captions and score them.

    limit: score a random sample of so many captions, chosen by `seed`. Best of `num_candidates` is
    left out when that is 1 or the artefact has no CLIP.
    Raises ArtefactError naming the component that is missing.
    """
    captions = choose_captions(truth, limit, seed)
    numbers = {caption: number for number, caption in enumerate(truth.held_out)}
    own = sorted({number for caption in captions for number in truth.own(caption)})
    reconstruction, reconstruction_pixels = _score_reconstructions(artefact, truth, own)
    compared: dict[str, Compared] = {}
    seconds: dict[str, float] = {}

    began = time.monotonic()
    (compared[GREEDY],) = _compare_generated(
        artefact, truth, captions, [[0]] * len(captions), seed, SamplingOptions(temperature=0.0)
    )
    seconds[GREEDY] = time.monotonic() - began
    if not greedy_only:
        began = time.monotonic()
        count = num_candidates if artefact.clip is not None else 1
        first = [numbers[caption] * NUMBERS_APART for caption in captions]
        candidates = [range(number, number + count) for number in first]
        found = _compare_generated(artefact, truth, captions, candidates, seed)
        methods = [SINGLE, f"best of {num_candidates}"][: len(found)]
        compared |= dict(zip(methods, found, strict=True))
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
        reconstruction_pixels=reconstruction_pixels,
        scores={
            scope: {
                method: score(truth, [captions[row] for row in rows], each.of(rows))
                for method, each in compared.items()
            }
            for scope, rows in scopes.items()
            if len(rows)
        },
        seconds=seconds,
        sampling=artefact.manifest.sampling_settings,
    )


def score(truth: GroundTruth, captions: Sequence[str], compared: Compared) -> Score:
    """Score the image of each caption; at least one."""
    right = memorised = 0
    by_attribute: defaultdict[str, list[bool]] = defaultdict(list)
    for caption, number in zip(captions, compared.nearest.tolist(), strict=True):
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
        pixels=compared.pixels.mean(),
        per_attribute={name: sum(each) / len(each) for name, each in by_attribute.items()},
    )


def choose_captions(truth: GroundTruth, limit: int | None, seed: int) -> list[str]:
    """Return at most `limit` of the held-out captions, chosen by `seed`, in their order."""
    if limit is None or limit >= len(truth.held_out):
        return truth.held_out
    chosen = np.random.default_rng(seed).permutation(len(truth.held_out))[:limit]
    return [truth.held_out[row] for row in sorted(chosen)]


def _compare_generated(
    artefact: Artefact,
    truth: GroundTruth,
    captions: Sequence[str],
    candidates: Sequence[Sequence[int]],
    seed: int,
    options: SamplingOptions | None = None,
) -> list[Compared]:
    """Compare each caption's first candidate, and its best one if CLIP ranks them."""
    generated = generate_candidates(artefact, captions, candidates, seed=seed, options=options)
    both = len(candidates[0]) > 1 and artefact.clip is not None
    block = max(1, BLOCK_BYTES // (2 * 3 * truth.image_size**2))
    waiting: list[Tensor] = []
    compared: list[list[Compared]] = [[] for _ in range(1 + both)]
    what = f"best of {len(candidates[0])}" if both else "generating"
    bar = tqdm(generated, what, len(captions), disable=None, unit="captions")
    for number, each in enumerate(bar, start=1):
        waiting.append(each.images[[0, each.best(1)[0]] if both else [0]])
        if len(waiting) == block or number == len(captions):
            scored = captions[number - len(waiting) : number]
            chosen = torch.stack(waiting, dim=1)  # [1 or 2, captions, 3, S, S]
            for images, parts in zip(chosen, compared, strict=True):
                real = _nearest_own(truth, images, scored)
                parts.append(Compared(truth.nearest(images), compare_pixels(images, real)))
            waiting = []
    return [
        Compared(torch.cat([part.nearest for part in parts]), join([part.pixels for part in parts]))
        for parts in compared
    ]


def _nearest_own(truth: GroundTruth, images: Tensor, captions: Sequence[str]) -> Tensor:
    """Return the real image of each image [B, 3, S, S]: of its caption's own the nearest in L2."""
    chosen = []
    for image, caption in zip(images, captions, strict=True):
        own = sorted(truth.own(caption))
        off = truth.images(own).double() - image.double() if len(own) > 1 else torch.zeros(1, 1)
        chosen.append(own[int(off.square().flatten(1).sum(dim=1).argmin())])
    return truth.images(chosen)


def _score_reconstructions(
    artefact: Artefact, truth: GroundTruth, classes: list[int]
) -> tuple[float, PixelScore]:
    """Score the images of some classes after the dVAE: nearest to themselves, and by pixels."""
    dvae = artefact.require("dvae", "reconstruction")
    block = max(1, BLOCK_BYTES // (3 * truth.image_size**2))
    right = 0
    pixels = []
    for start in range(0, len(classes), block):
        numbers = classes[start : start + block]
        real = truth.images(numbers)
        again = reconstruct(dvae, real)
        right += int((truth.nearest(again) == torch.tensor(numbers)).sum())
        pixels.append(compare_pixels(again, real))
    return right / len(classes), join(pixels).mean()


def render_table(evaluation: Evaluation) -> str:
    """Return the numbers as text for a terminal."""
    blocks = [
        f"{evaluation.num_pictures:,} distinct pictures, {evaluation.num_training_pictures:,} of "
        f"them in training; reconstructed and still nearest to itself: "
        f"{evaluation.reconstruction:.3f}",
        _row("pixels against the real image", _PIXELS.values())
        + "\n"
        + _row("  reconstructed", _pixel_cells(evaluation.reconstruction_pixels)),
    ]
    for accuracy, methods in zip(evaluation.accuracies(), evaluation.scores.values(), strict=True):
        rows: dict[str, Mapping[str, float]] = {"right": accuracy.overall}
        rows |= {f"  {name}": shares for name, shares in accuracy.per_attribute.items()}
        memorised = {method: score.memorised for method, score in methods.items()}
        rows["another caption's training picture"] = memorised
        lines = [f"{accuracy.scope} ({accuracy.num_captions:,})", _row("", methods)]
        lines += [
            _row(label, [f"{share:.3f}" for share in shares.values()])
            for label, shares in rows.items()
        ]
        lines.append(_row("  pixels", _PIXELS.values()))
        lines += [
            _row(f"  {method}", _pixel_cells(each.pixels)) for method, each in methods.items()
        ]
        blocks.append("\n".join(lines))
    times = ", ".join(f"{name} {each:.1f} s" for name, each in evaluation.seconds.items())
    blocks.append(f"all but greedy sampled at {evaluation.sampling}")
    return "\n\n".join([*blocks, f"time: {times}"])


def _pixel_cells(score: PixelScore) -> list[str]:
    return [f"{getattr(score, name):.3f}" for name in _PIXELS]


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:<36}" + "".join(f"{cell:>16}" for cell in cells)
