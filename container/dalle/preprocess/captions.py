"""Which characters of a caption count: one rule for training, requests and the tokenizer.

A run of blanks, tabs and line breaks is one blank. Characters that leave no trace on a screen (a
zero-width space, a byte-order mark, a control character) are nothing, but for the joiners, which
decide how their neighbours look. Standard library only.
"""

from __future__ import annotations

import re
import unicodedata

NUL = "\0"
"""In a text that was not meant to hold it: most often UTF-16 that was read as UTF-8."""

BLANKS = r"[\s\x1c-\x1f]+"
"""Regular expression of a run of blanks, for Python and for the `tokenizers` library."""

TRACELESS = (
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u2064\u2066-\u206f\ufeff]+"
)
"""Regular expression of characters that may be left out without a visible difference."""

_BLANK_LETTERS = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0"
_UNSEEN = re.compile(f"[{_BLANK_LETTERS}\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_UNSEEN_CATEGORIES = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})


def is_visible(caption: str) -> bool:
    """Return whether any character of a caption can be seen."""
    return any(
        unicodedata.category(character) not in _UNSEEN_CATEGORIES and not _UNSEEN.match(character)
        for character in caption
    )


def joined_blanks(caption: str) -> str:
    """Return a caption with one blank for each run of them, and none around it."""
    return re.sub(BLANKS, " ", caption).strip()
