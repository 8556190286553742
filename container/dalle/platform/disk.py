"""Trouble with the disk as our own errors, and writing that survives a power cut. No torch."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from dalle.errors import DiskFullError, PlatformError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
    """Whether the disk, a quota or a limit on file sizes left no room."""
    return error.errno in _FULL


def disk_error(
    error: OSError,
    action: str,
    *,
    if_full: str,
    directory: Path | None = None,
    num_bytes: int | None = None,
) -> PlatformError:
    """The error to raise instead; returns a DiskFullError when there was no room.

    action: what could not be done, as in "write model/manifest.json". if_full: what is left as it
    was, and what to do. directory, num_bytes: where it was to be, and how much it takes, if known;
    the message then says what is free there now, so remove what was half written before.
    """
    reason = error.strerror or str(error)
    if not is_full(error):
        return PlatformError(f"cannot {action}: {reason}")
    takes = "" if num_bytes is None else f"it takes {num_bytes:,} bytes"
    free = None if directory is None else free_bytes(directory)
    room = "" if free is None else f"{free:,} {'are' if takes else 'bytes are'} free"
    figures = ", ".join(filter(None, (takes, room)))
    return DiskFullError(f"no room to {action} ({reason}){figures and ': ' + figures}; {if_full}")


def free_bytes(directory: Path) -> int | None:
    """What may still be written below a directory, which need not exist; None if nobody knows."""
    for existing in (directory, *directory.parents):
        try:
            return shutil.disk_usage(existing).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a directory, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
