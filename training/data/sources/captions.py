"""Caption files as captions: text, one a line, or JSON. Knows bytes, not where they came from."""

from __future__ import annotations

import json

from training.data.pairs import SkipReason, Skips

MAX_CAPTION_BYTES = 1 << 20
DEFAULT_CAPTION_KEY = "caption"

Captions = tuple[str, ...]


def captions_of_text(data: bytes, name: str, skips: Skips) -> Captions:
    """The lines of a UTF-8 file that hold text; none, and counted, when it cannot be used."""
    content = _decoded(data, name, skips)
    if content is None:
        return ()
    captions = tuple(line.strip() for line in content.split("\n") if line.strip())
    if not captions:
        skips.add(SkipReason.EMPTY_CAPTION, name)
    return captions


def captions_of_json(data: bytes, key: str, name: str, skips: Skips) -> Captions:
    """The text, or texts, under a key of a JSON object; none, and counted, without any.

    Line breaks within one are blanks: it is one caption still.
    """
    content = _decoded(data, name, skips)
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
    texts = value[key] if isinstance(value[key], list) else [value[key]]
    if any(isinstance(text, str) and not _is_encodable(text) for text in texts):
        skips.add(SkipReason.NOT_UTF8, name, f"{name}: {key!r} holds half of a surrogate pair")
        return ()
    captions = tuple(
        " ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()
    )
    if not captions:
        skips.add(SkipReason.EMPTY_CAPTION, name, f"{name}: {key!r} holds no text")
    return captions


def captions_of_attribute(data: bytes, key: str, name: str, skips: Skips) -> Captions | None:
    """The captions in one attribute of an augmented manifest; None when it is no caption's.

    An attribute is text, or JSON: a text, a list of texts, or an object with them under a key.
    Numbers, and objects without the key (Ground Truth adds one to each label), are no captions.
    Nothing, and counted, when it was meant for one but cannot be used.
    """
    content = _decoded(data, name, skips)
    if content is None:
        return ()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return captions_of_text(data, name, skips)  # a bare text
    if isinstance(value, dict):
        return captions_of_json(data, key, name, skips) if key in value else None
    if isinstance(value, str | list):
        return captions_of_json(json.dumps({key: value}).encode(), key, name, skips)
    return None


def _decoded(data: bytes, name: str, skips: Skips) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        skips.add(
            SkipReason.NOT_UTF8,
            name,
            f"{name}: not UTF-8 at byte {error.start}; save it as UTF-8",
        )
        return None


def _is_encodable(text: str) -> bool:
    r"""Whether a text is Unicode; JSON may spell what is not, such as "\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
