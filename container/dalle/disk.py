"""Trouble with the disk as our own errors, and writing that survives a power cut. No torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dalle.errors import DiskFullError, PlatformError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
    """Whether the disk, a quota or a limit on file sizes left no room."""
    return error.errno in _FULL


def disk_error(error: OSError, action: str, *, if_full: str) -> PlatformError:
    """The error to raise instead; returns a DiskFullError when there was no room.

    action: what could not be done, as in "write model/manifest.json". if_full: what is left as it
    was, and what to do.
    """
    reason = error.strerror or str(error)
    if is_full(error):
        return DiskFullError(f"no room to {action} ({reason}); {if_full}")
    return PlatformError(f"cannot {action}: {reason}")


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a directory, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
