"""The image-text folder: `name.png` beside `name.txt`, in any sub-folder.

Images are png, jpg, jpeg or webp; a text file is UTF-8 with one caption a line. Every file is
opened at most once a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dalle.errors import DataError
from training.data.pairs import DEFAULT_MAX_BAD_SHARE, SkipReason, Skips
from training.data.sources.captions import Captions, captions_of_text
from training.data.sources.files import File, walk
from training.data.sources.index import (
    IMAGE_SUFFIXES,
    WANTED,
    StoredPairs,
    add_image,
    pair_up,
    require_enough,
)
from training.stopping import NEVER, Stop, unless_stopped

CAPTION_SUFFIX = ".txt"


class ImageTextFolder(StoredPairs):
    """The pairs of one folder, sorted by name; a `Dataset`. Made by `open_folder`."""

    def __init__(
        self,
        root: Path,
        images: Sequence[File],
        captions: Sequence[Captions],
        *,
        skips: Skips,
        image_size: int,
        max_bad_share: float,
    ) -> None:
        super().__init__(
            images, captions, skips=skips, image_size=image_size, max_bad_share=max_bad_share
        )
        self._root = root

    @property
    def layout(self) -> str:
        return "image-text folder"

    def read(self, index: int) -> bytes:
        return (self._root / self.name(index)).read_bytes()


def open_folder(
    root: Path,
    *,
    image_size: int,
    channel: str | None = None,
    max_bad_share: float = DEFAULT_MAX_BAD_SHARE,
    stop: Stop = NEVER,
) -> ImageTextFolder:
    """Find the pairs of an image-text folder and read their captions.

    channel: the name used in messages; the folder's own when not given.
    max_bad_share: 0 to 1, how many of the would-be pairs may be unusable.
    Raises `DataError` when there is no pair, or when too many are unusable; Stopped.
    """
    skips = Skips(channel or root.name)
    if not root.is_dir():
        raise DataError(f"{skips.channel}: {root} is not a directory; {WANTED}")
    return folder_of(root, walk(root, skips), skips, image_size, max_bad_share, stop)


def folder_of(
    root: Path,
    files: Iterable[File],
    skips: Skips,
    image_size: int,
    max_bad_share: float,
    stop: Stop = NEVER,
) -> ImageTextFolder:
    """`open_folder` of files that were found already."""
    images: dict[str, File] = {}
    texts: dict[str, File] = {}
    for file in unless_stopped(files, stop):
        if file.suffix == CAPTION_SUFFIX:
            texts[file.stem] = file
        elif file.suffix in IMAGE_SUFFIXES:
            add_image(images, file.stem, file, skips)
        else:
            skips.add(SkipReason.IGNORED, file.name)

    def parse(text: File) -> Captions:
        try:
            data = (root / text.name).read_bytes()
        except OSError as error:
            skips.add(SkipReason.UNREADABLE, text.name, f"{text.name}: {error.strerror}")
            return ()
        return captions_of_text(data, text.name, skips)

    pairs = list(unless_stopped(pair_up(images, texts, parse, skips), stop))
    captions = [lines for _, lines in pairs]
    require_enough(captions, root, skips, max_bad_share)
    return ImageTextFolder(
        root,
        [image for image, _ in pairs],
        captions,
        skips=skips,
        image_size=image_size,
        max_bad_share=max_bad_share,
    )
