"""The rainbow shapes: 9,216 captioned 32x32 images, the data set of the article's author.

    python -m training.rainbow --out data/rainbow

writes an image-text folder with `train/` (30 % of the captions) and `validation/` (the rest), and
`attributes.json` with the attributes of each caption (see `training.evaluate`).

The images follow the notebook `rainbow_dalle.ipynb` of lucidrains/DALLE-pytorch: every
combination of scale, fill, ditherer, colour, shape and rotation. Two things differ on purpose:
the ditherers cover every colour (the notebook finds the pixels of a shape by the sum of their
channels, which misses yellow and cyan), and shapes are rasterised by numpy at the
pixel centres instead of by cairo.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.tools.pair_folder import write_attributes, write_pairs

IMAGE_SIZE = 32
TRAIN_SHARE = 0.3

SCALES = {"big": 1.0, "bigger": 0.8, "smaller": 0.6, "small": 0.4}
FILLS = {"filled": True, "": False}
DITHERERS = {"": 0.0, "shaded": 0.3, "halftone": 0.5}  # share of the shape's pixels turned white
COLOURS: dict[str, tuple[int, int, int] | None] = {
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "indigo": (75, 0, 130),
    "violet": (238, 130, 238),
    "cyan": (0, 255, 255),
    "saddlebrown": (139, 69, 19),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "rainbow": None,  # each pixel row has the next of the first seven
}
ROTATIONS = {"": 0, "rotated clockwise": 1, "rotated twice": 2, "rotated counterclockwise": 3}

Points = NDArray[np.float64]  # [P, 2] x and y, y downwards, the shape within the unit circle


def _arc(x: float, y: float, radius: float, start: float, end: float) -> Points:
    angles = np.linspace(start, end, 129)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)


def _polygon(*points: tuple[float, float]) -> Points:
    return np.array([*points, points[0]])


_H = np.sqrt(3) / 2
# Each shape is one or more closed outlines; overlaps are hollow (even-odd rule).
SHAPES: dict[str, Callable[[], list[Points]]] = {
    "circle": lambda: [_arc(0, 0, 1, 0, 2 * np.pi)],
    "triangle": lambda: [_polygon((0, -1), (_H, 0.5), (-_H, 0.5))],
    "square": lambda: [_polygon((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))],
    "rhombus": lambda: [_polygon((0, -1), (0.5, 0), (0, 1), (-0.5, 0))],
    "rectangle": lambda: [_polygon((-0.9, -0.5), (0.9, -0.5), (0.9, 0.5), (-0.9, 0.5))],
    "star": lambda: [
        _polygon((0, -1), (_H, 0.5), (-_H, 0.5)),
        _polygon((0, 1), (_H, -0.5), (-_H, -0.5)),
    ],
    "hexagon": lambda: [_polygon((0, -1), (_H, -0.5), (_H, 0.5), (0, 1), (-_H, 0.5), (-_H, -0.5))],
    "crescent": lambda: [
        _arc(0, 0, 1, -np.pi / 2, np.pi / 2),
        _arc(-np.sqrt(3), 0, 2, -np.pi / 6, np.pi / 6),
    ],
}

ATTRIBUTES: dict[str, list[str]] = {
    "scale": list(SCALES),
    "fill": list(FILLS),
    "ditherer": list(DITHERERS),
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "rotation": list(ROTATIONS),
}


@dataclass(frozen=True)
class Sample:
    """One caption with its attributes (name -> word, "" where the caption is silent)."""

    caption: str
    attributes: dict[str, str]

    def picture(self) -> NDArray[np.uint8]:
        """Render it: [32, 32, 3] RGB in [0, 255] on white."""
        values = self.attributes
        mask = _mask(values["shape"], values["scale"], values["fill"], values["rotation"])
        mask = mask & ~_whitened(mask.tobytes(), DITHERERS[values["ditherer"]])
        canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 255, dtype=np.uint8)
        canvas[mask] = _palette(values["colour"])[mask]
        return canvas


def samples() -> list[Sample]:
    """Return all 9,216 samples in a fixed order."""
    names = list(ATTRIBUTES)
    return [
        Sample(" ".join(word for word in words if word), dict(zip(names, words, strict=True)))
        for words in itertools.product(*ATTRIBUTES.values())
    ]


def split(count: int, seed: int) -> NDArray[np.bool_]:
    """Return which samples are for training: a [count] mask, `TRAIN_SHARE` of it true."""
    chosen = np.random.default_rng(seed).permutation(count)[: round(TRAIN_SHARE * count)]
    mask = np.zeros(count, dtype=bool)
    mask[chosen] = True
    return mask


@cache
def _mask(shape: str, scale: str, fill: str, rotation: str) -> NDArray[np.bool_]:
    """Return the pixels [32, 32] of fill and outline."""
    centre = IMAGE_SIZE // 2
    # Slightly off the centre, so that no pixel centre lies exactly half a line width from a line
    # (a horizontal or vertical line at a whole coordinate would be two pixels wide).
    outlines = [o * (SCALES[scale] * IMAGE_SIZE / 2) + centre + 1e-3 for o in SHAPES[shape]()]
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    if FILLS[fill]:
        for outline in outlines:
            mask ^= _inside(outline)
    for outline in outlines:
        # The two arcs of the crescent are open; only closed outlines end where they began.
        mask |= _near(outline, 0.5)
    return np.rot90(mask, -ROTATIONS[rotation])


def _pixel_centres() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    return x, y


def _segments(outline: Points) -> Iterator[tuple[Points, Points]]:
    return zip(outline[:-1], outline[1:], strict=True)


def _inside(outline: Points) -> NDArray[np.bool_]:
    """Even-odd: a pixel is inside when a ray to the right crosses the outline an odd number."""
    x, y = _pixel_centres()
    inside = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    closed = np.concatenate([outline, outline[:1]])
    for (x0, y0), (x1, y1) in _segments(closed):
        if y0 == y1:
            continue
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _near(outline: Points, distance: float) -> NDArray[np.bool_]:
    """Return the pixels whose centre is at most `distance` pixels from the outline."""
    x, y = _pixel_centres()
    near = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    for start, end in _segments(outline):
        dx, dy = end - start
        along = ((x - start[0]) * dx + (y - start[1]) * dy) / max(dx * dx + dy * dy, 1e-12)
        along = np.clip(along, 0, 1)
        near |= np.hypot(x - start[0] - along * dx, y - start[1] - along * dy) <= distance
    return near


@cache
def _whitened(mask_bytes: bytes, share: float) -> NDArray[np.bool_]:
    """Return the pixels that the ditherer turns white, by Floyd-Steinberg error diffusion."""
    tone = np.frombuffer(mask_bytes, dtype=bool).reshape(IMAGE_SIZE, IMAGE_SIZE) * share
    for y in range(IMAGE_SIZE - 1):
        for x in range(1, IMAGE_SIZE - 1):
            error = tone[y, x] - round(tone[y, x])
            tone[y, x] -= error
            tone[y, x + 1] += error * 7 / 16
            tone[y + 1, x - 1] += error * 3 / 16
            tone[y + 1, x] += error * 5 / 16
            tone[y + 1, x + 1] += error * 1 / 16
    return tone > 0.5


@cache
def _palette(colour: str) -> NDArray[np.uint8]:
    """Return the colour of each pixel of a shape: [32, 32, 3]."""
    rgb = COLOURS[colour]
    plain = [value for value in list(COLOURS.values())[:7] if value is not None]
    rows = [rgb if rgb is not None else plain[y % len(plain)] for y in range(IMAGE_SIZE)]
    return np.repeat(np.array(rows, dtype=np.uint8)[:, None], IMAGE_SIZE, axis=1)


def write_folder(out: Path, seed: int = 0) -> dict[str, int]:
    """Write both folders and `attributes.json`; return the number of pairs in each folder."""
    everything = samples()
    in_training = split(len(everything), seed)
    counts = {}
    for folder in ("train", "validation"):
        chosen = [
            each
            for each, train in zip(everything, in_training, strict=True)
            if train == (folder == "train")
        ]
        counts[folder] = write_pairs(
            out / folder,
            ((each.caption.replace(" ", "_"), each.picture(), each.caption) for each in chosen),
        )
    write_attributes(
        out / "attributes.json", {each.caption: each.attributes for each in everything}
    )
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.rainbow", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="chooses the training captions")
    arguments = parser.parse_args(argv)
    counts = write_folder(arguments.out, arguments.seed)
    print(f"{arguments.out}: {counts['train']} training and {counts['validation']} held-out pairs")


if __name__ == "__main__":
    main()
