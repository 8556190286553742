"""The files of a channel: listed, not opened.

Channels are mounted read-only, sometimes as a stream of S3, and were filled by strangers: nothing
is written, links that lead out of the channel are not followed, and folders are listed once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from training.data.skips import SkipReason, Skips


@dataclass(frozen=True, slots=True)
class File:
    """One regular file. name: its path within the channel, with `/`."""

    name: str
    num_bytes: int

    @property
    def identity(self) -> str:
        """What stands for the file in a data set's fingerprint."""
        return self.name

    @property
    def suffix(self) -> str:
        """Lower case, with its dot."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def stem(self) -> str:
        """The name without its suffix: the same for an image and its captions."""
        return self.name[: -len(self.suffix)] if self.suffix else self.name


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder on the way to it, begins with a dot: no data set's, but a tool's.

    >>> is_hidden(".ipynb_checkpoints/0017.png"), is_hidden("./0017.png")
    (True, False)
    """
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def walk(root: Path, skips: Skips) -> Iterator[File]:
    """List all regular files below root that are not hidden, sorted by name in each folder."""
    real_root = root.resolve()
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            skips.add(SkipReason.UNREADABLE, folder, f"{folder}: {error.strerror}")
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                skips.add(SkipReason.IGNORED, name)
                continue
            try:
                if entry.is_symlink():
                    target = Path(entry.path).resolve(strict=True)
                    if not target.is_relative_to(real_root):
                        skips.add(SkipReason.OUTSIDE, name)
                        continue
                    if target.is_dir():  # its files are listed where they are
                        skips.add(SkipReason.IGNORED, name)
                        continue
                if entry.is_dir():
                    folders.append(name)
                elif entry.is_file():
                    yield File(name, entry.stat().st_size)
                else:
                    skips.add(SkipReason.IGNORED, name)  # sockets, FIFOs, devices
            except (OSError, RuntimeError) as error:  # broken links; RuntimeError: links in a ring
                skips.add(SkipReason.UNREADABLE, name, f"{name}: {error}")
