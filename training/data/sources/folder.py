"""The image-text folder: `name.png` beside `name.txt`, in any sub-folder.

Images are png, jpg, jpeg or webp; a text file is UTF-8 with one caption a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from training.data.skips import SkipReason, Skips
from training.data.sources.captions import Captions, captions_of_text
from training.data.sources.files import File
from training.data.sources.index import IMAGE_SUFFIXES, Reader, add_image, match_by_stem
from training.stopping import Stop, unless_stopped

CAPTION_SUFFIX = ".txt"


class FolderReader(Reader[File]):
    """The pairs among the files of a folder, sorted by name."""

    layout = "image-text folder"

    def __init__(self, root: Path, files: Iterable[File]) -> None:
        self._root = root
        self._files = files

    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[File, Captions]]:
        images: dict[str, File] = {}
        texts: dict[str, File] = {}
        for file in self._files:
            if file.suffix == CAPTION_SUFFIX:
                texts[file.stem] = file
            elif file.suffix in IMAGE_SUFFIXES:
                add_image(images, file.stem, file, skips)
            else:
                skips.add(SkipReason.IGNORED, file.name)
        parse = partial(self._captions, skips=skips)
        yield from unless_stopped(match_by_stem(images, texts, parse, skips), stop)

    def read(self, image: File) -> bytes:
        return (self._root / image.name).read_bytes()

    def _captions(self, text: File, skips: Skips) -> Captions:
        try:
            data = self.read(text)
        except OSError as error:
            skips.add(SkipReason.UNREADABLE, text.name, f"{text.name}: {error.strerror}")
            return ()
        return captions_of_text(data, text.name, skips)
