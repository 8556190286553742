"""Which versions of DALLE-pytorch can have written a file, and what they did."""

from __future__ import annotations

import re
from dataclasses import dataclass

FIRST, LAST = "0.1.19", "1.6.6"


@dataclass(frozen=True)
class VersionRange:
    """From the first to the last version, both included."""

    first: str = FIRST
    last: str = LAST

    def within(self, first: str = FIRST, last: str = LAST) -> VersionRange:
        """Return the part of the range that is in another one. Raises ValueError for none."""
        narrowed = VersionRange(
            max(self.first, first, key=parse_version), min(self.last, last, key=parse_version)
        )
        if parse_version(narrowed.first) > parse_version(narrowed.last):
            raise ValueError(
                f"version {self} of DALLE-pytorch, and weights of version "
                f"{VersionRange(first, last)}, contradict each other"
            )
        return narrowed

    def narrowed(self, first: str = FIRST, last: str = LAST) -> VersionRange:
        """Return the part of the range that is in another one; the whole range for none.

        For signs that a fork, or a commit between two versions, may have too.
        """
        try:
            return self.within(first, last)
        except ValueError:
            return self

    def is_before(self, version: str) -> bool:
        """Whether every version of the range is before one."""
        return parse_version(self.last) < parse_version(version)

    def may_be_before(self, version: str) -> bool:
        """Whether some version of the range is before one."""
        return parse_version(self.first) < parse_version(version)

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


def parse_version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version. Raises ValueError for a text that is none."""
    if not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", text):
        raise ValueError(f"version must be numbers as in 1.6.6, got {text[:40]!r}")
    return tuple(int(part) for part in text.split("."))
