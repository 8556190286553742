"""Which columns of a table hold the images and the captions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dalle.errors import DataError

IMAGE_COLUMNS = ("file_name", "filename", "filepath", "file_path", "path", "image_path", "image")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "title", "description")


@dataclass(frozen=True)
class Columns:
    """The names of the two columns."""

    image: str
    caption: str

    @classmethod
    def of_table(
        cls,
        where: str,
        rows: Iterable[Mapping[str, Any]],
        caption_key: str | None,
        *,
        is_image: Callable[[Any], bool],
    ) -> Columns:
        """Find the columns of a table that names image files.

        where: the table, for messages. rows: the first ones. is_image: whether a value names an
        image of the channel. Raises DataError when there is no such column, or more than one.
        """
        row: dict[str, Any] = {}  # what the columns hold, as far as the rows show it
        for name, value in (item for each in rows for item in each.items()):
            if name not in row or (
                not is_image(row[name]) and (is_image(value) or not _is_text(row[name]))
            ):
                row[name] = value
        image = _image_column(where, row, is_image)
        others = {name: value for name, value in row.items() if name != image}
        return cls(image, caption_column(where, others, caption_key))


def caption_column(where: str, row: Mapping[str, Any], caption_key: str | None) -> str:
    """Return the caption column: the key itself, the one of a usual name, or the only text.

    row: what the columns hold, without the image. Raises DataError naming what the key could be.
    """
    texts = [name for name, value in row.items() if _is_text(value)]
    if caption_key is not None:
        if caption_key in row:
            return caption_key
        raise DataError(
            f"{where} has no column {caption_key!r}; caption_key could be {_listed(texts or row)}",
            field="caption_key",
        )
    usual = [name for name in row if name.lower() in CAPTION_COLUMNS]
    candidates = usual or texts
    if len(candidates) == 1:
        return candidates[0]
    found = "several columns that may hold" if candidates else "no column that may hold"
    raise DataError(
        f"{where} has {found} captions; set caption_key to one of {_listed(candidates or row)}",
        field="caption_key",
    )


def _image_column(where: str, row: Mapping[str, Any], is_image: Callable[[Any], bool]) -> str:
    named = [name for name, value in row.items() if is_image(value)]
    usual = [name for name in row if name.lower() in IMAGE_COLUMNS]
    for candidates in ([name for name in named if name in usual], named, usual):
        if candidates:
            return candidates[0]
    raise DataError(
        f"{where} has no column of image files; it has {_listed(row)}, and one of them must be "
        f"called {' or '.join(IMAGE_COLUMNS[:2])}, with paths relative to the table or the channel"
    )


def _is_text(value: Any) -> bool:
    """Whether a cell is a text, or a list of texts, other than a number."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, str) for each in value)
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _listed(names: Collection[str]) -> str:
    shown = [repr(name)[:60] for name in names]
    return ", ".join([*shown[:12], *(["…"] if len(shown) > 12 else [])]) or "nothing"
