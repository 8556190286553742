"""The image-text folder: `name.png` beside `name.txt`, in any sub-folder.

Images are png, jpg, jpeg or webp; a text file is UTF-8 with one caption a line. Which files make up
a pair is the rule of `training.data.sources.index.PairsByName`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from training.data.skips import SkipReason, Skips
from training.data.sources.captions import Captions, captions_of_text
from training.data.sources.files import File
from training.data.sources.index import IMAGE_SUFFIXES, PairsByName, Reader
from training.stopping import Stop, unless_stopped

CAPTION_SUFFIX = ".txt"


class FolderReader(Reader[File]):
    """The pairs among the files of a folder, sorted by name."""

    layout = "image-text folder"

    def __init__(self, root: Path, files: Iterable[File]) -> None:
        self._root = root
        self._files = files

    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[File, Captions]]:
        names = PairsByName[File](skips)
        for file in self._files:
            if file.suffix == CAPTION_SUFFIX:
                names.add_text(file.name, file)
            elif file.suffix in IMAGE_SUFFIXES:
                names.add_image(file.name, file)
            else:
                skips.add(SkipReason.IGNORED, file.name)
        yield from unless_stopped(names.pairs(partial(self._captions, skips=skips)), stop)

    def read(self, image: File) -> bytes:
        return (self._root / image.name).read_bytes()

    def _captions(self, text: File, skips: Skips) -> Captions:
        try:
            data = self.read(text)
        except OSError as error:
            skips.add(SkipReason.UNREADABLE, text.name, f"{text.name}: {error.strerror}")
            return ()
        return captions_of_text(data, text.name, skips)
