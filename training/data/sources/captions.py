"""Captions in the bytes of a file: text with one caption a line, or JSON.

Each function returns () and counts the reason when the bytes cannot be used. Knows nothing of where
the bytes came from.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable

from dalle.preprocess.captions import NUL, is_visible, joined_blanks
from training.data.skips import SkipReason, Skips

MAX_CAPTION_BYTES = 1 << 20
DEFAULT_CAPTION_KEY = "caption"

Captions = tuple[str, ...]


def captions_of_text(data: bytes, name: str, skips: Skips) -> Captions:
    """Return the lines of a text file that hold text."""
    content = _decode(data, name, skips)
    return () if content is None else _with_text(content.split("\n"), name, name, skips)


def captions_of_json(data: bytes, key: str, name: str, skips: Skips) -> Captions:
    """Return the text, or the list of texts, under a key of a JSON object.

    Line breaks within a text become blanks: it is one caption.
    """
    content = _decode(data, name, skips)
    if content is None:
        return ()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        skips.add(SkipReason.NOT_JSON, name, f"{name}: not JSON ({error})")
        return ()
    if not isinstance(value, dict) or key not in value:
        found = ", ".join(sorted(value)[:8]) if isinstance(value, dict) else type(value).__name__
        skips.add(SkipReason.NO_CAPTION_KEY, name, f"{name}: no key {key!r}, it has: {found}")
        return ()
    return captions_of_value(value[key], key, name, skips)


def captions_of_value(value: object, key: str, name: str, skips: Skips) -> Captions:
    """Return the text, or the list of texts, that a JSON value or a table's cell is.

    key: where it stands, for messages. Line breaks within a text become blanks: it is one caption.
    """
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if sum(map(len, texts)) > MAX_CAPTION_BYTES:
        skips.add(SkipReason.GIANT_CAPTION, name)
        return ()
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # JSON may spell what is not Unicode, such as "\ud800"
        skips.add(SkipReason.NOT_UTF8, name, f"{name}: {key!r} holds what is not Unicode")
        return ()
    if any(NUL in text for text in texts):
        skips.add(SkipReason.NUL_IN_CAPTION, name, f"{name}: {key!r} holds a NUL character")
        return ()
    return _with_text(texts, f"{name}: {key!r}", name, skips)


def captions_of_attribute(data: bytes, key: str, name: str, skips: Skips) -> Captions | None:
    """Return the captions in one attribute of an augmented manifest; None when it holds no caption.

    An attribute is text, or JSON: a text, a list of texts, or an object with them under a key.
    Numbers, and objects without the key (Ground Truth adds one to each label), hold no caption.
    """
    content = _decode(data, name, skips)
    if content is None:
        return ()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return captions_of_text(data, name, skips)  # plain text
    if isinstance(value, dict):
        return captions_of_value(value[key], key, name, skips) if key in value else None
    if isinstance(value, str | list):
        return captions_of_value(value, key, name, skips)
    return None


def _with_text(texts: Iterable[str], where: str, name: str, skips: Skips) -> Captions:
    """Return the texts that can be seen, each on one line; count the name when none can."""
    texts = tuple(joined_blanks(text) for text in texts)
    captions = tuple(text for text in texts if is_visible(text))
    if not captions:
        unseen = sorted({f"U+{ord(character):04X}" for text in texts for character in text})
        of_what = f", only {', '.join(unseen[:4])}" if unseen else ""
        skips.add(SkipReason.EMPTY_CAPTION, name, f"{where} holds no text{of_what}")
    return captions


def _decode(data: bytes, name: str, skips: Skips) -> str | None:
    """Decode UTF-8, or UTF-16 that begins with its mark, as Windows' programs write it."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "UTF-16" if is_utf16 else "UTF-8"
    try:
        content = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        detail = f"{name}: not {encoding} at byte {error.start}; save it as UTF-8"
        skips.add(SkipReason.NOT_UTF8, name, detail)
        return None
    if NUL in content:
        at = "it holds NUL" if is_utf16 else f"byte {data.index(NUL.encode())} is NUL, as in UTF-16"
        skips.add(SkipReason.NUL_IN_CAPTION, name, f"{name}: {at}; save it as UTF-8")
        return None
    return content
