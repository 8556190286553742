"""Output directories of a job, and its failure file. Standard library only."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dalle.errors import PlatformError
from dalle.platform.environment import Paths

logger = logging.getLogger(__name__)

FAILURE_CHARACTERS = 1024
"""SageMaker's limit of `FailureReason`; it drops the rest of the failure file."""

FAILURE_BYTES = 6 * FAILURE_CHARACTERS
"""Most bytes of so many characters: an escaped surrogate takes six, all others fewer."""


def prepare_outputs(paths: Paths) -> None:
    """Make the output directories. Raises PlatformError when one is not writable.

    Reserves the disk space of the failure file, as the disk may be full when the job fails;
    `release_outputs` frees it.
    """
    for directory in (paths.model, paths.checkpoints, paths.output_data, paths.tensorboard):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlatformError(
                f"cannot make the directory {directory} ({error.strerror}); "
                "it must be writable for the user that runs `train`"
            ) from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PlatformError(f"the directory {directory} is read-only; it must be writable")
    try:
        _failure_room(paths).write_bytes(b" " * FAILURE_BYTES)
    except OSError as error:  # the job can train without
        logger.warning("no disk space is reserved for %s: %s", paths.failure, error)


def release_outputs(paths: Paths) -> None:
    """Free the space that `prepare_outputs` reserved, unless the failure file has taken it."""
    _failure_room(paths).unlink(missing_ok=True)


def write_failure(paths: Paths, cause: str, traceback: str = "") -> None:
    """Write the failure file: the cause, then as much of the traceback's end as fits.

    At most 1,024 characters in all, in the space that `prepare_outputs` reserved. Logs an error
    where the file cannot be written, so that the caller still reports the failure itself.
    """
    text = cause.strip()
    if len(text) > FAILURE_CHARACTERS:
        text = text[: FAILURE_CHARACTERS - 1] + "…"
    room = FAILURE_CHARACTERS - len(text) - len("\n\n…")
    traceback = traceback.strip()
    if traceback and room >= min(len(traceback), 80):
        # The end of a traceback names the line at fault; the beginning is always main().
        tail = traceback if len(traceback) <= room else "…" + traceback[-room:]
        text = f"{text}\n\n{tail}"
    temporary = _failure_room(paths)
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        # Overwrites the reserved blocks, which needs no space on a full disk.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))
            file.truncate()
        os.replace(temporary, paths.failure)
    except OSError as error:
        logger.error("cannot write %s: %s", paths.failure, error)


def _failure_room(paths: Paths) -> Path:
    return paths.failure.with_name("failure.tmp")
