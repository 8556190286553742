"""Emoji: some 3,650 captioned pictures of 128 pixels, drawn from fonts that Debian packages.

    apt-get install fonts-noto-color-emoji unicode-data
    python -m training.emoji --out data/emoji --size 64

writes an image-text folder with `train/` and `validation/`, and `attributes.json` with the base and
the skin tone of each caption (see `training.evaluate`). A caption is the emoji's Unicode name, and
its picture is on white.

People and hands have six variants: five skin tones and none. Of four bases in five, one or two
variants are held out. No training image shows them: a right image is composed of a base that
training shows in other tones, and of a tone that it shows on other bases.

The artwork of Noto Color Emoji is under the SIL Open Font Licence 1.1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from dalle.errors import DalleError, DataError
from dalle.preprocess.images import Pixels
from training.data.tools.pair_folder import write_attributes, write_pairs

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZES = (32, 64, 128)  # pixels
HELD_OUT_SHARE = 0.8  # of the bases with six variants
NUM_VARIANTS = 6

_ARTWORK = 128  # pixels, the side of a picture in the font
_FONT_SIZE = 109  # the only one of the font's bitmaps
_MARGIN = 4  # pixels of the font's bitmaps at the left and at the right of the artwork
_LINE = re.compile(r"^([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its characters, its Unicode name, and the name in two parts."""

    text: str
    caption: str
    base: str
    """The name without skin tones: "man: red hair"."""
    tone: str
    """The skin tones, as in the name; "" where it names none."""


def read_emoji(path: Path = NAMES) -> list[Emoji]:
    """Read Unicode's emoji-test.txt. Raises DataError naming the file and the package."""
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); install the Debian package unicode-data, or give "
            "Unicode's emoji-test.txt by --names"
        ) from error
    found = []
    for characters, caption in _LINE.findall(content):
        text = "".join(chr(int(each, 16)) for each in characters.split())
        name, _, parts = caption.partition(": ")
        tones = [each for each in parts.split(", ") if each.endswith("skin tone")]
        others = [each for each in parts.split(", ") if each and each not in tones]
        base = ": ".join([name, *([", ".join(others)] if others else [])])
        found.append(Emoji(text, caption, base, ", ".join(tones)))
    if not found:
        raise DataError(f"{path} names no emoji; it must be Unicode's emoji-test.txt")
    return found


def choose_held_out(emoji: Sequence[Emoji], seed: int) -> set[str]:
    """Choose the captions that are held out: one or two of the six variants of most bases."""
    chance = np.random.default_rng(seed)
    variants: defaultdict[str, list[str]] = defaultdict(list)
    for each in emoji:
        variants[each.base].append(each.caption)
    held_out: set[str] = set()
    for captions in variants.values():
        if len(captions) == NUM_VARIANTS and chance.random() < HELD_OUT_SHARE:
            held_out.update(chance.choice(captions, size=chance.integers(1, 3), replace=False))
    return held_out


class Artwork:
    """The pictures of a font.

    Raises DataError where the font is missing or is none with bitmaps in colour.
    """

    def __init__(self, path: Path = FONT) -> None:
        if not features.check("raqm"):
            raise DataError("Pillow lacks raqm, which draws emoji of several characters")
        self.path = path
        try:
            self._font = ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise DataError(
                f"{path} cannot be used ({error}); install the Debian package "
                "fonts-noto-color-emoji, or give the font by --font"
            ) from error
        face = self.draw("\N{GRINNING FACE}")
        if face is None or (face == face[..., :1]).all():
            raise DataError(f"{path} has no pictures in colour; give Noto Color Emoji by --font")

    def draw(self, text: str, size: int = _ARTWORK) -> Pixels | None:
        """Draw an emoji on white: [size, size, 3] uint8, or None where the font has none."""
        if round(self._font.getlength(text)) != _ARTWORK + 2 * _MARGIN:
            return None  # no picture, or one for each of its characters
        canvas = Image.new("RGB", (_ARTWORK, _ARTWORK), "white")
        ImageDraw.Draw(canvas).text((-_MARGIN, 0), text, font=self._font, embedded_color=True)
        drawn = canvas.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(drawn)


def write_folder(
    out: Path, *, size: int = 64, seed: int = 0, font: Path = FONT, names: Path = NAMES
) -> dict[str, int]:
    """Write both folders and `attributes.json`; return the number of pairs in each folder."""
    artwork = Artwork(font)
    pictures = {each: artwork.draw(each.text, size) for each in read_emoji(names)}
    drawn = {each: picture for each, picture in pictures.items() if picture is not None}
    held_out = choose_held_out(list(drawn), seed)
    counts = {}
    for folder in ("train", "validation"):
        chosen = [each for each in drawn if (each.caption in held_out) == (folder == "validation")]
        counts[folder] = write_pairs(
            out / folder,
            ((file_name(each), drawn[each], each.caption) for each in chosen),
        )
    attributes = {each.caption: {"base": each.base, "tone": each.tone} for each in drawn}
    write_attributes(out / "attributes.json", attributes)
    return counts


def file_name(emoji: Emoji) -> str:
    """Return a name for its files: its code points, as Noto's own files are named."""
    return "emoji_u" + "_".join(f"{ord(each):04x}" for each in emoji.text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 with the cause on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m training.emoji",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--size", type=int, choices=SIZES, default=64, help="side of the images in pixels (64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the held-out captions (0)")
    parser.add_argument("--font", type=Path, default=FONT, help="default %(default)s")
    parser.add_argument("--names", type=Path, default=NAMES, help="default %(default)s")
    options = parser.parse_args(argv)
    try:
        counts = write_folder(
            options.out,
            size=options.size,
            seed=options.seed,
            font=options.font,
            names=options.names,
        )
    except DalleError as error:
        print(f"emoji: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {counts['train']} training and {counts['validation']} held-out pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
