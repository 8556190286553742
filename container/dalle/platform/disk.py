"""Disk errors as errors of this project, free space, and fsync. Standard library only."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from dalle.errors import DiskFullError, PlatformError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
    """Return whether the disk, a quota or a file size limit leaves no room."""
    return error.errno in _FULL


def disk_error(
    error: OSError,
    action: str,
    *,
    if_full: str,
    directory: Path | None = None,
    num_bytes: int | None = None,
) -> PlatformError:
    """Return the error to raise in place of an OSError: DiskFullError when there is no room.

    action: what failed, as in "write model/manifest.json". if_full: what is unchanged and what to
    do. directory, num_bytes: where the file goes and how much it takes, if known; the message then
    gives the free space, so remove a partly written file first.
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
    """Return the free bytes below a directory, which need not exist; None if unknown."""
    for existing in (directory, *directory.parents):
        try:
            return shutil.disk_usage(existing).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
