"""CUB-200-2011 (birds) with ten captions an image, as the image-text folders that `train` reads.

The images are `images/<class>/<name>.jpg` with `images.txt` and `train_test_split.txt`. The
captions (Reed et al. 2016, as AttnGAN packs them) are `text/<class>/<name>.txt`, one a line.
Pickled lists are not read: give a plain text file instead.
"""

from __future__ import annotations

import shutil
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from dalle.errors import DataError, UserError
from training.data.skips import SkipReason, Skips
from training.data.sources.files import File, walk
from training.data.sources.index import EXPECTED_LAYOUT, IMAGE_SUFFIXES

TEXT_FOLDERS = ("text", "text_c10")
SPLIT = "train_test_split.txt"
NAMES = "images.txt"


@dataclass(frozen=True)
class Converted:
    """What was written. num_mended: caption files that were not UTF-8."""

    num_train: int
    num_validation: int
    num_captions: int
    num_mended: int
    skips: Skips


def convert(
    directory: Path, out: Path, *, text: Path | None = None, held_out: Path | None = None
) -> Converted:
    """Write `out/train` and, when anything is held out, `out/validation`.

    text: the folder of captions; `text` or `text_c10` in the directory when None.
    held_out: a text file with a class (or class/image) on each line; CUB's split when None.
        Without either, everything is trained on.
    Raises UserError or DataError, which name what is missing.
    """
    images_root, text_root = directory / "images", _text_root(directory, text)
    if not images_root.is_dir():
        raise DataError(f"{directory} has no folder images; give the folder CUB_200_2011")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new directory")
    held_out_names = _held_out(directory, held_out)
    skips = Skips("CUB")
    texts = {file.stem: file for file in walk(text_root, skips) if file.suffix == ".txt"}
    counts = {"train": 0, "validation": 0}
    num_captions = num_mended = 0
    for image in walk(images_root, skips):
        if image.suffix not in IMAGE_SUFFIXES:
            skips.add(SkipReason.IGNORED, image.name)
            continue
        caption_file = texts.pop(image.stem, None)
        if caption_file is None:
            skips.add(SkipReason.IMAGE_WITHOUT_CAPTION, image.name)
            continue
        captions, is_mended = _captions(text_root / caption_file.name)
        if not captions:
            skips.add(SkipReason.EMPTY_CAPTION, caption_file.name)
            continue
        channel = "validation" if _is_held_out(image, held_out_names) else "train"
        target = out / channel / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(images_root / image.name, target)
        target.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        counts[channel] += 1
        num_captions += len(captions)
        num_mended += is_mended
    for caption_file in texts.values():
        skips.add(SkipReason.CAPTION_WITHOUT_IMAGE, caption_file.name)
    if not any(counts.values()):
        raise DataError(f"no image of {images_root} has captions in {text_root}; {EXPECTED_LAYOUT}")
    return Converted(counts["train"], counts["validation"], num_captions, num_mended, skips)


def _text_root(directory: Path, text: Path | None) -> Path:
    candidates = [directory / name for name in TEXT_FOLDERS] if text is None else [text]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise DataError(
        f"no folder of captions at {' or '.join(map(str, candidates))}; it must hold "
        "<class>/<image>.txt, as in the archive that goes with AttnGAN"
    )


def _held_out(directory: Path, held_out: Path | None) -> AbstractSet[str]:
    """Return the held-out classes, and images as `class/name` without suffix."""
    if held_out is not None:
        try:
            lines = held_out.read_text("utf-8").split()
        except UnicodeDecodeError as error:
            raise UserError(f"{held_out} is not a text file; give one class a line") from error
        known = {line.removesuffix(".jpg") for line in lines}
        missing = [
            name for name in sorted(known) if not any((directory / "images").glob(f"{name}*"))
        ]
        if missing:
            raise UserError(f"{held_out} names {missing[0]}, which is not in {directory}/images")
        return known
    if not (directory / SPLIT).is_file() or not (directory / NAMES).is_file():
        return frozenset()
    names = dict(line.split() for line in (directory / NAMES).read_text("utf-8").splitlines())
    split = dict(line.split() for line in (directory / SPLIT).read_text("utf-8").splitlines())
    return {name.removesuffix(".jpg") for number, name in names.items() if split.get(number) == "0"}


def _is_held_out(image: File, held_out: AbstractSet[str]) -> bool:
    return image.stem in held_out or image.name.split("/")[0] in held_out


def _captions(path: Path) -> tuple[list[str], bool]:
    """Return the lines that hold text, and whether they are Latin-1 because they are not UTF-8."""
    data = path.read_bytes()
    try:
        content, is_mended = data.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        content, is_mended = data.decode("latin-1"), True
    return [" ".join(line.split()) for line in content.split("\n") if line.strip()], is_mended
