"""The image-text folder: `name.png` beside `name.txt`, in any sub-folder.

Images are png, jpg, jpeg or webp; a text file is UTF-8 with one caption a line. Channels are
mounted read-only, sometimes as a stream of S3, and were filled by strangers: nothing is written
here, every file is opened at most once a pass, and each one is distrusted on its own. What cannot
be used is skipped, counted and named. Images are not opened before they are needed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dalle.errors import DataError
from dalle.images import ImageError, ImageFault, Pixels, decode_image, to_square
from training.data.pairs import DEFAULT_MAX_BAD_SHARE, SkipReason, Skips, fingerprint, printable

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION_SUFFIX = ".txt"
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 256 << 20

WANTED = (
    "a channel holds images (png, jpg, jpeg or webp), each beside a text file of the same name "
    "(0017.png, 0017.txt) in UTF-8 with one caption a line; sub-folders are fine"
)


@dataclass(frozen=True, slots=True)
class _File:
    """One regular file. name: its path within the channel, with `/`."""

    name: str
    num_bytes: int

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def stem(self) -> str:
        """The name without its suffix: what a caption and its image have in common."""
        return self.name[: -len(self.suffix)]


class ImageTextFolder:
    """The pairs of one folder, sorted by name; a `Dataset`. Made by `open_folder`."""

    def __init__(
        self,
        root: Path,
        *,
        images: list[_File],
        captions: list[tuple[str, ...]],
        skips: Skips,
        image_size: int,
        max_bad_share: float,
    ) -> None:
        self._root = root
        self._images = images
        self._captions = captions
        self.skips = skips
        self.channel = skips.channel
        self.image_size = image_size
        self.max_bad_share = max_bad_share
        self.fingerprint = fingerprint(
            (image.name, image.num_bytes, captions[number]) for number, image in enumerate(images)
        )

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images[index].name

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def image(self, index: int) -> Pixels:
        """Read, decode and square one image: uint8 [image_size, image_size, 3].

        Raises `ImageError` when the file cannot be used.
        """
        file = self._images[index]
        what = f"{self.channel}/{printable(file.name)}"
        if file.num_bytes > MAX_IMAGE_BYTES:
            raise ImageError(
                f"{what} has {file.num_bytes:,} bytes; the limit is {MAX_IMAGE_BYTES:,}",
                ImageFault.GIANT,
            )
        try:
            data = (self._root / file.name).read_bytes()
        except OSError as error:
            raise ImageError(
                f"{what} cannot be read ({error.strerror})", ImageFault.UNREADABLE
            ) from error
        # Twice the size wanted, so that the last halving is done by the better filter of the two.
        image = decode_image(data, what=what, min_side=2 * self.image_size)
        return to_square(image, self.image_size)


def open_folder(
    root: Path,
    *,
    image_size: int,
    channel: str | None = None,
    max_bad_share: float = DEFAULT_MAX_BAD_SHARE,
) -> ImageTextFolder:
    """Find the pairs of an image-text folder and read their captions.

    channel: the name used in messages; the folder's own when not given.
    max_bad_share: 0 to 1, how many of the would-be pairs may be unusable.
    Raises `DataError` when there is no pair, or when too many are unusable.
    """
    skips = Skips(channel or root.name)
    if not root.is_dir():
        raise DataError(f"{skips.channel}: {root} is not a directory; {WANTED}")
    images, texts = _sort_out(_walk(root, skips), skips)
    kept: list[_File] = []
    captions: list[tuple[str, ...]] = []
    for stem in sorted(images.keys() | texts.keys()):
        image, text = images.get(stem), texts.get(stem)
        if image is None:
            assert text is not None
            skips.add(SkipReason.CAPTION_WITHOUT_IMAGE, text.name)
        elif text is None:
            skips.add(SkipReason.IMAGE_WITHOUT_CAPTION, image.name)
        elif image.num_bytes == 0:
            skips.add(SkipReason.EMPTY_IMAGE, image.name)
        elif lines := _read_captions(root, text, skips):
            kept.append(image)
            captions.append(lines)
    if not kept:
        found = skips.describe()
        raise DataError(
            f"{skips.channel}: no image-caption pair in {root}"
            f"{f' (skipped: {found})' if found else ''}; {WANTED}"
        )
    skips.num_pairs = len(kept)
    skips.check_share(skips.num_good, max_bad_share)
    log.info(
        "%s: %d pairs with %d captions; skipped: %s; ignored files: %d",
        skips.channel,
        len(kept),
        sum(len(lines) for lines in captions),
        skips.describe() or "none",
        skips.counts[SkipReason.IGNORED],
    )
    return ImageTextFolder(
        root,
        images=kept,
        captions=captions,
        skips=skips,
        image_size=image_size,
        max_bad_share=max_bad_share,
    )


def _walk(root: Path, skips: Skips) -> Iterator[_File]:
    """All regular files below root that are not hidden, in the order of their names."""
    real_root = root.resolve()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            skips.add(SkipReason.UNREADABLE, folder, f"{folder}: {error.strerror}")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                skips.add(SkipReason.IGNORED, name)
                continue
            try:
                if entry.is_symlink():
                    target = Path(entry.path).resolve(strict=True)
                    if not target.is_relative_to(real_root):
                        skips.add(SkipReason.OUTSIDE, name)
                        continue
                    if target.is_dir():  # its files are found where they are
                        skips.add(SkipReason.IGNORED, name)
                        continue
                if entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    yield _File(name, entry.stat().st_size)
                else:
                    skips.add(SkipReason.IGNORED, name)  # sockets, FIFOs, devices
            except (OSError, RuntimeError) as error:  # broken links; RuntimeError: links in a ring
                skips.add(SkipReason.UNREADABLE, name, f"{name}: {error}")


def _sort_out(files: Iterator[_File], skips: Skips) -> tuple[dict[str, _File], dict[str, _File]]:
    """Images and caption files by their common stem."""
    images: dict[str, _File] = {}
    texts: dict[str, _File] = {}
    for file in files:
        if file.suffix == CAPTION_SUFFIX:
            texts[file.stem] = file
        elif file.suffix not in IMAGE_SUFFIXES:
            skips.add(SkipReason.IGNORED, file.name)
        elif file.stem in images:
            first = images[file.stem].name
            skips.add(
                SkipReason.SECOND_IMAGE,
                file.name,
                f"{file.name}: {first} already goes with its caption; keep one of the two",
            )
        else:
            images[file.stem] = file
    return images, texts


def _read_captions(root: Path, text: _File, skips: Skips) -> tuple[str, ...]:
    """The lines that hold text; none, and counted, when the file cannot be used."""
    if text.num_bytes > MAX_CAPTION_BYTES:
        skips.add(SkipReason.GIANT_CAPTION, text.name)
        return ()
    try:
        content = (root / text.name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skips.add(
            SkipReason.NOT_UTF8,
            text.name,
            f"{text.name}: not UTF-8 at byte {error.start}; save it as UTF-8",
        )
        return ()
    except OSError as error:
        skips.add(SkipReason.UNREADABLE, text.name, f"{text.name}: {error.strerror}")
        return ()
    captions = tuple(line.strip() for line in content.split("\n") if line.strip())
    if not captions:
        skips.add(SkipReason.EMPTY_CAPTION, text.name)
    return captions
