"""The image-text folder: `name.png` beside `name.txt` or `name.json`, in any sub-folder.

Images are png, jpg, jpeg or webp; a text file is UTF-8 with one caption a line, a JSON file an
object with the captions under a key, as img2dataset writes it. Which files make up a pair is the
rule of `training.data.sources.index.PairsByName`. JSON files that are no image's are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from training.data.skips import SkipReason, Skips
from training.data.sources.captions import (
    DEFAULT_CAPTION_KEY,
    Captions,
    captions_of_json,
    captions_of_text,
)
from training.data.sources.files import File
from training.data.sources.index import IMAGE_SUFFIXES, PairsByName, Reader, unicode_key
from training.stopping import Stop, unless_stopped

CAPTION_SUFFIX = ".txt"
JSON_SUFFIX = ".json"


class FolderReader(Reader[File]):
    """The pairs among the files of a folder, sorted by name."""

    layout = "image-text folder"

    def __init__(self, root: Path, files: Iterable[File], caption_key: str | None = None) -> None:
        """caption_key: of the captions in JSON files, which then are read in place of text files;
        without one, an image's text file is read first, and JSON's `caption` second.
        """
        self._root = root
        self._files = list(files)
        self._caption_key = caption_key

    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[File, Captions]]:
        names = PairsByName[File](skips)
        json_files = json_beside_images(self._files)
        for file in self._files:
            if file.suffix in IMAGE_SUFFIXES:
                names.add_image(file.name, file)
            elif file in json_files:
                names.add_text(file.name, file, is_spare=True)
            elif file.suffix == CAPTION_SUFFIX and not (self._caption_key and json_files):
                names.add_text(file.name, file)
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
        if text.suffix == JSON_SUFFIX:
            key = self._caption_key or DEFAULT_CAPTION_KEY
            return captions_of_json(data, key, text.name, skips)
        return captions_of_text(data, text.name, skips)


def json_beside_images(files: Iterable[File]) -> frozenset[File]:
    """Return the JSON files that have the stem of an image."""
    files = list(files)
    images = {unicode_key(file.stem) for file in files if file.suffix in IMAGE_SUFFIXES}
    return frozenset(
        file for file in files if file.suffix == JSON_SUFFIX and unicode_key(file.stem) in images
    )
