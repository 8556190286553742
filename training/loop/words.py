"""Durations and large numbers in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return `40 s`, `12 min`, `9.5 h` or `4 days`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.{0 if seconds >= 36_000 else 1}f} h"
    return f"{seconds / 86_400:,.0f} days"


def thousands(number: float) -> str:
    """Return `400 thousand`, `3.1 million` or `1.2 billion`."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number / 1e3:.0f} thousand"
