"""Image-text folders that are written: name.png beside name.txt, and `attributes.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from dalle.preprocess.images import Pixels


def write_pairs(folder: Path, pairs: Iterable[tuple[str, Pixels, str]]) -> int:
    """Write pairs of a name, an image [H, W, 3] uint8 and a caption; return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, image, caption in pairs:
        Image.fromarray(image).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
        count += 1
    return count


def write_attributes(path: Path, attributes: Mapping[str, Mapping[str, str]]) -> None:
    """Write caption -> attribute -> word, a line for each caption, for `training.evaluate`."""
    lines = [
        f"{json.dumps(caption)}: {json.dumps(dict(words))}" for caption, words in attributes.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
