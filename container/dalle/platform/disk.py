"""Disk errors as errors of this project, free space, and fsync. Standard library only."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def disk_errors(
    action: str, *, if_full: str, directory: Path | None = None, num_bytes: int | None = None
) -> Iterator[None]:
    """Raise a `disk_error` in place of an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise disk_error(
            error, action, if_full=if_full, directory=directory, num_bytes=num_bytes
        ) from error


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


@contextmanager
def replacing(path: Path, *, is_durable: bool = False) -> Iterator[Path]:
    """Give a temporary path in the same directory, and rename it to `path` after the block.

    The directory is made if it is missing. After an error `path` is as it was and the temporary
    file is removed. is_durable: the new file survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        if is_durable:
            sync(temporary)
        os.replace(temporary, path)
    except Exception:
        with suppress(OSError):
            temporary.unlink()
        raise
    if is_durable:
        sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, completely or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
