"""Scenes: one to three shapes at named places of a 64x64 image, captions in free word order.

    python -m training.scenes --out data/scenes
    python -m training.scenes --data data/scenes --artefact out/ml/model

A harder set than `training.rainbow`: captions use synonyms, and their clauses stand in any order
and bind several colours to several shapes. --out writes an image-text folder with `train/` and
`validation/`, and `scenes.json` with the scene of each caption. Half of the held-out scenes hold
pairs of colour and shape that no training image has; the others are new scenes of known pairs.

--artefact scores a trained one exactly: each quarter of an image is recognised as the nearest of
all things that can stand there, nothing included. An image is right when all four quarters are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from dalle import artefact as artefacts
from dalle.artefact import Artefact
from dalle.decoding.sampling import SamplingOptions
from dalle.errors import DalleError, DataError
from training.data.tools.pair_folder import write_pairs
from training.report.samples import generate_candidates

IMAGE_SIZE = 64
CELL_SIZE = IMAGE_SIZE // 2
NUM_TRAINING, NUM_HELD_OUT = 4_000, 1_000
SCENES = "scenes.json"
GREEDY = "greedy"
KNOWN, RESERVED = "known pairs", "pairs of colour and shape that training lacks"

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 40),
    "orange": (255, 150, 0),
    "yellow": (240, 225, 30),
    "green": (20, 140, 50),
    "blue": (30, 60, 220),
    "purple": (140, 40, 160),
    "brown": (120, 70, 30),
    "black": (0, 0, 0),
}
RADII = {"big": 13.0, "small": 8.0}  # pixels
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLACES = ("top left", "top right", "bottom left", "bottom right")
SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "purple": ("purple", "violet"),
    "black": ("black", "dark"),
    "big": ("big", "large", "huge"),
    "small": ("small", "little", "tiny"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "top left": ("top left", "upper left"),
    "top right": ("top right", "upper right"),
    "bottom left": ("bottom left", "lower left"),
    "bottom right": ("bottom right", "lower right"),
}


@dataclass(frozen=True)
class Thing:
    """A shape in one quarter."""

    size: str
    colour: str
    shape: str


Scene = Mapping[str, Thing]  # place -> thing; a place without one is empty


@dataclass(frozen=True)
class SceneScore:
    """Shares, 0 to 1, over `num_captions` captions with one image each.

    memorised: wrong, and the scene of a training image. empty_places: of the places that the
    caption leaves empty, those with nothing there. size, colour, shape: of the things, those with
    the right one at the place that the caption names.
    """

    num_captions: int
    right: float
    memorised: float
    empty_places: float
    size: float
    colour: float
    shape: float


def things() -> list[Thing]:
    """Return all 96 things in a fixed order."""
    return [Thing(*words) for words in itertools.product(RADII, COLOURS, SHAPES)]


def is_reserved(thing: Thing) -> bool:
    """Return whether training lacks its pair of colour and shape: 8 of 48, each colour once."""
    return list(COLOURS).index(thing.colour) % len(SHAPES) == SHAPES.index(thing.shape)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Render a scene: [64, 64, 3] RGB in [0, 255] on white."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 255, dtype=np.uint8)
    for place, thing in scene.items():
        row, column = divmod(PLACES.index(place), 2)
        cell = canvas[row * CELL_SIZE :, column * CELL_SIZE :][:CELL_SIZE, :CELL_SIZE]
        cell[_mask(thing.shape, RADII[thing.size])] = COLOURS[thing.colour]
    return canvas


@cache
def _mask(shape: str, radius: float) -> NDArray[np.bool_]:
    """Return the pixels [32, 32] of a shape in the middle of its cell."""
    y, x = (np.mgrid[:CELL_SIZE, :CELL_SIZE] + 0.5 - CELL_SIZE / 2) / radius
    distance = np.hypot(x, y)
    masks: dict[str, NDArray[np.bool_]] = {
        "circle": distance <= 1,
        "square": np.maximum(np.abs(x), np.abs(y)) <= 0.85,
        "triangle": (y <= 0.75) & (np.abs(x) <= (y + 1) / 1.75),
        "diamond": np.abs(x) / 0.75 + np.abs(y) <= 1,
        "cross": (np.minimum(np.abs(x), np.abs(y)) <= 0.3) & (distance <= 1.05),
        "ring": (distance <= 1) & (distance >= 0.6),
    }
    return masks[shape]


def caption_of(scene: Scene, generator: np.random.Generator) -> str:
    """Return a random caption: synonyms, order within the clauses, order of the clauses."""

    def word(name: str) -> str:
        choices = SYNONYMS.get(name, (name,))
        return choices[int(generator.integers(len(choices)))]

    clauses = []
    for place, thing in scene.items():
        what = f"a {word(thing.size)} {word(thing.colour)} {word(thing.shape)}"
        where = word(place)
        forms = (f"{what} {where}", f"{where} {what}", f"{what} in the {where}")
        clauses.append(forms[int(generator.integers(len(forms)))])
    order = generator.permutation(len(clauses))
    return " and ".join(clauses[index] for index in order)


def sample_scenes(seed: int) -> tuple[dict[str, Scene], dict[str, Scene]]:
    """Return caption -> scene for training and held out; no scene occurs twice in both."""
    generator = np.random.default_rng(seed)
    everything = things()
    reserved = [each for each in everything if is_reserved(each)]
    known = [each for each in everything if not is_reserved(each)]
    seen: set[frozenset[tuple[str, Thing]]] = set()

    def some(count: int, with_reserved: bool) -> dict[str, Scene]:
        found: dict[str, Scene] = {}
        while len(found) < count:
            number = int(generator.integers(1, 4))
            places = generator.permutation(len(PLACES))[:number]
            chosen = [known[int(i)] for i in generator.integers(len(known), size=number)]
            if with_reserved:
                chosen[0] = reserved[int(generator.integers(len(reserved)))]
            scene = {PLACES[p]: thing for p, thing in zip(places, chosen, strict=True)}
            key = frozenset(scene.items())
            caption = caption_of(scene, generator)
            if key in seen or caption in found:
                continue
            seen.add(key)
            found[caption] = scene
        return found

    training = some(NUM_TRAINING, with_reserved=False)
    held_out = some(NUM_HELD_OUT // 2, False) | some(NUM_HELD_OUT - NUM_HELD_OUT // 2, True)
    return training, held_out


def write_folder(out: Path, seed: int = 0) -> dict[str, int]:
    """Write both folders and `scenes.json`; return the number of pairs in each folder."""
    described: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    counts = {}
    for folder, scenes in zip(("train", "validation"), sample_scenes(seed), strict=True):
        counts[folder] = write_pairs(
            out / folder,
            (
                (f"{number:05}", render(scene), caption)
                for number, (caption, scene) in enumerate(scenes.items())
            ),
        )
        described[folder] = {
            caption: {place: asdict(thing) for place, thing in scene.items()}
            for caption, scene in scenes.items()
        }
    (out / SCENES).write_text(json.dumps(described, indent=0) + "\n", encoding="utf-8")
    return counts


def read_scenes(directory: Path) -> tuple[dict[str, Scene], dict[str, Scene]]:
    """Read `scenes.json`: training and held out. Raises DataError naming the file."""
    path = directory / SCENES
    try:
        folders = TypeAdapter(dict[str, dict[str, Scene]]).validate_json(path.read_bytes())
        return folders["train"], folders["validation"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read; write it by training.scenes: {error}") from error


def recognise(images: Tensor) -> list[dict[str, Thing]]:
    """Recognise the scenes of images uint8 [B, 3, 64, 64]: the nearest in L2 in each quarter."""
    candidates: list[Thing | None] = [None, *things()]
    rendered = [render({} if thing is None else {PLACES[0]: thing}) for thing in candidates]
    cells = torch.from_numpy(np.stack(rendered)[:, :CELL_SIZE, :CELL_SIZE]).permute(0, 3, 1, 2)
    known = cells.flatten(1).double()
    half_norms = known.square().sum(dim=1) / 2
    scenes: list[dict[str, Thing]] = [{} for _ in range(len(images))]
    for number, place in enumerate(PLACES):
        top, left = (CELL_SIZE * each for each in divmod(number, 2))
        quarter = images[:, :, top : top + CELL_SIZE, left : left + CELL_SIZE].flatten(1).double()
        nearest = (half_norms - quarter @ known.T).argmin(dim=1).tolist()
        for scene, index in zip(scenes, nearest, strict=True):
            thing = candidates[index]
            if thing is not None:
                scene[place] = thing
    return scenes


def score_scenes(
    wanted: Sequence[Scene], found: Sequence[Scene], training: Sequence[Scene]
) -> SceneScore:
    """Compare the scenes found in images with those of their captions; at least one."""
    in_training = {frozenset(scene.items()) for scene in training}
    right = memorised = empty = num_empty = num_things = 0
    words = dict.fromkeys(("size", "colour", "shape"), 0)
    for asked, scene in zip(wanted, found, strict=True):
        if dict(asked) == dict(scene):
            right += 1
        elif frozenset(scene.items()) in in_training:
            memorised += 1
        for place in PLACES:
            if place not in asked:
                num_empty += 1
                empty += place not in scene
                continue
            num_things += 1
            for name in words:
                words[name] += place in scene and (
                    getattr(scene[place], name) == getattr(asked[place], name)
                )
    return SceneScore(
        num_captions=len(wanted),
        right=right / len(wanted),
        memorised=memorised / len(wanted),
        empty_places=empty / max(num_empty, 1),
        **{name: count / max(num_things, 1) for name, count in words.items()},
    )


def evaluate_scenes(
    artefact: Artefact, directory: Path, *, num_candidates: int, limit: int | None, seed: int = 0
) -> dict[str, dict[str, SceneScore]]:
    """Generate images for the held-out captions of a folder; return scope -> method -> score.

    limit: captions of each half. Best of `num_candidates` is left out when
    that is 1. Raises DataError, ArtefactError.
    """
    training, held_out = read_scenes(directory)
    everything = list(training.values())
    result: dict[str, dict[str, SceneScore]] = {}
    for scope, wants_reserved in ((KNOWN, False), (RESERVED, True)):
        chosen = {
            caption: scene
            for caption, scene in held_out.items()
            if any(is_reserved(thing) for thing in scene.values()) == wants_reserved
        }
        captions = list(chosen)[:limit]
        wanted = [chosen[caption] for caption in captions]
        numbers = {GREEDY: [[0]] * len(captions)}
        if num_candidates > 1:
            numbers[f"best of {num_candidates}"] = [list(range(num_candidates))] * len(captions)
        result[scope] = {}
        for method, candidates in numbers.items():
            options = SamplingOptions(temperature=0.0) if method == GREEDY else None
            generated = generate_candidates(
                artefact, captions, candidates, seed=seed, options=options
            )
            found = [recognise(each.images[each.best(1)])[0] for each in generated]
            result[scope][method] = score_scenes(wanted, found, everything)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 with the cause on stderr."""
    options = _parse_arguments(argv)
    if options.out is not None:
        counts = write_folder(options.out, options.seed)
        print(
            f"{options.out}: {counts['train']} training and {counts['validation']} held-out pairs"
        )
        return 0
    try:
        scores = evaluate_scenes(
            artefacts.load(options.artefact),
            options.data,
            num_candidates=options.candidates,
            limit=options.limit,
        )
    except DalleError as error:
        print(f"scenes: {error}", file=sys.stderr)
        return 1
    for scope, methods in scores.items():
        for method, score in methods.items():
            print(f"{scope}, {method}: {score.right:.3f} of {score.num_captions:,} right")
    print(json.dumps({s: {m: asdict(each) for m, each in ms.items()} for s, ms in scores.items()}))
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="chooses scenes and words")
    parser.add_argument("--artefact", type=Path, help="directory that `train` wrote, to score")
    parser.add_argument("--data", type=Path, help="the folder that it was trained on")
    parser.add_argument("--candidates", type=int, default=32, help="images per caption (32)")
    parser.add_argument("--limit", type=int, help="so many captions of each half only")
    options = parser.parse_args(argv)
    if (options.out is None) == (options.artefact is None or options.data is None):
        parser.error("give --out to write a folder, or --artefact and --data to score a model")
    return options


if __name__ == "__main__":
    sys.exit(main())
