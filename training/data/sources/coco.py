"""COCO's captions: one JSON file with `images` and `annotations`, and the images in any folder.

    {"images": [{"id": 9, "file_name": "000000000009.jpg"}],
     "annotations": [{"image_id": 9, "caption": "A bowl of fruit."}]}

The image files are found by their path, or by the last part of it.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from training.data.skips import SkipReason, Skips, printable
from training.data.sources.captions import Captions, captions_of_value
from training.data.sources.files import File
from training.data.sources.index import IMAGE_SUFFIXES, Reader
from training.stopping import Stop, unless_stopped

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 512 << 20
MAX_OBJECTS = 20_000_000  # objects and lists of a file: each takes memory
MAX_FILES = 32  # JSON files that are looked into: more are captions of single images
DEFAULT_KEY = "caption"


class CocoReader(Reader[File]):
    """The images that a COCO captions file names, sorted by name without suffix."""

    def __init__(
        self,
        root: Path,
        files: Iterable[File],
        captions: File,
        table: Mapping[str, Any],
        caption_key: str | None,
    ) -> None:
        """captions, table: the JSON file and its content, as `find_coco` returns them.

        caption_key: of an annotation's text; None is `caption`.
        """
        self._root = root
        self._files = [file for file in files if file is not captions]
        self._name = captions.name
        self._table = table
        self._key = caption_key or DEFAULT_KEY
        self.layout = f"COCO captions {posixpath.basename(captions.name)}"

    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[File, Captions]]:
        texts: dict[object, list[str]] = defaultdict(list)
        for annotation in unless_stopped(self._dicts("annotations", skips), stop):
            where = f"{self._name}: annotation {annotation.get('id')!r:.40}"
            found = captions_of_value(annotation.get(self._key), self._key, where, skips)
            texts[_id(annotation.get("image_id"))] += found
        images = {file.name: file for file in self._files if file.suffix in IMAGE_SUFFIXES}
        last_parts = Counter(posixpath.basename(name) for name in images)
        by_last_part = {posixpath.basename(name): file for name, file in images.items()}
        captions: dict[str, list[str]] = {}
        seen: set[object] = set()
        for image in unless_stopped(self._dicts("images", skips), stop):
            if (number := _id(image.get("id"))) is None or number in seen:
                where = f"{self._name}: image {number!r:.40}"
                skips.add(SkipReason.BAD_ROW, where, f"{where} has no number that it alone has")
                continue
            seen.add(number)
            if (found_texts := texts.pop(number, None)) is None:
                continue
            path = str(image.get("file_name"))
            last_part = posixpath.basename(path)
            file = images.get(path)
            if file is None and last_parts[last_part] == 1:
                file = by_last_part[last_part]
            if file is None:
                where = f"{self._name}: image {image.get('id')!r:.40}"
                count = last_parts[last_part]
                detail = f"{where}: {count} files of the channel are called {last_part:.200}"
                skips.add(SkipReason.CAPTION_WITHOUT_IMAGE, where, detail)
            else:
                captions.setdefault(file.name, []).extend(found_texts)
        for unknown in texts:
            where = f"{self._name}: image_id {unknown!r:.40}"
            skips.add(SkipReason.CAPTION_WITHOUT_IMAGE, where, f"{where} is none of its images")
        for file in sorted(self._files, key=lambda file: file.stem):
            if file.name not in images:
                skips.add(SkipReason.IGNORED, file.name)
            elif not captions.get(file.name):
                skips.add(SkipReason.UNLISTED, file.name)
            elif file.num_bytes == 0:
                skips.add(SkipReason.EMPTY_IMAGE, file.name)
            else:
                yield file, tuple(captions[file.name])

    def read(self, image: File) -> bytes:
        return (self._root / image.name).read_bytes()

    def _dicts(self, key: str, skips: Skips) -> Iterator[Mapping[str, Any]]:
        """Yield the objects of a list of the table; anything else in it is counted."""
        for number, each in enumerate(self._table[key]):
            if isinstance(each, dict):
                yield each
            else:
                where = f"{self._name}: {key}[{number}]"
                skips.add(SkipReason.BAD_ROW, where, f"{where} is no JSON object")


def find_coco(
    root: Path, files: Iterable[File], caption_key: str | None
) -> list[tuple[File, Mapping[str, Any]]]:
    """Return the JSON files of a channel that are COCO captions, with their content."""
    tables = [file for file in files if file.suffix == ".json"]
    if len(tables) > MAX_FILES:
        return []
    key = caption_key or DEFAULT_KEY
    found = ((file, _read(root, file, key)) for file in tables)
    return [
        (file, table) for file, table in found if table is not None and _has_captions(table, key)
    ]


def _read(root: Path, file: File, key: str) -> Mapping[str, Any] | None:
    """Return a file of COCO's form; None for any other JSON, and for what cannot be read."""
    try:
        with (root / file.name).open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
        # Files of polygons are as large as captions are small, and are not parsed.
        if any(json.dumps(name).encode() not in data for name in ("images", "annotations", key)):
            return None
        if len(data) > MAX_FILE_BYTES or data.count(b"{") + data.count(b"[") > MAX_OBJECTS:
            log.warning(
                "%s is not read: it has more than %s bytes or %s objects",
                *(printable(file.name), f"{MAX_FILE_BYTES:,}", f"{MAX_OBJECTS:,}"),
            )
            return None
        content = json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    is_coco = all(isinstance(content.get(name), list) for name in ("images", "annotations"))
    return content if is_coco else None


def _has_captions(table: Mapping[str, Any], key: str) -> bool:
    return any(isinstance(each, dict) and key in each for each in table["annotations"])


def _id(value: object) -> object:
    """An image's number, or its text; files that were converted mix the two."""
    return str(value) if isinstance(value, int | str) else None
