"""Resumable training state in one directory: written atomically, the newest few kept.

On SageMaker the directory is /opt/ml/checkpoints, copied to S3 while the job runs and copied back
before a restart. Each stage has its own sub-directory. Knows files and their completeness, not
what is in them; never unpickles anything but tensors and plain values.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from dalle.errors import CheckpointError
from dalle.platform.disk import disk_error, sync

logger = logging.getLogger(__name__)

FORMAT = 2
NAME = re.compile(r"step-(\d{9})\.pt")
DAMAGED = ".damaged"


class Checkpoints:
    """The checkpoints of one stage.

    identity: plain values that decide what the run computes (settings, seed, data fingerprint);
    a checkpoint with another identity is refused. kept: how many of the newest stay.
    """

    def __init__(self, directory: Path, *, identity: Mapping[str, Any], kept: int = 2) -> None:
        if kept < 1:
            raise ValueError(f"kept must be at least 1, got {kept}")
        self.directory = directory
        self._identity = dict(identity)
        self._kept = kept

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps, then remove what is older than the newest `kept`.

        Raises DiskFullError, or PlatformError for other trouble with the disk; whatever was
        there before is untouched then.
        """
        path = self.directory / f"step-{step:09d}.pt"
        temporary = path.with_suffix(".pt.tmp")
        content = {"format": FORMAT, "identity": self._identity, "step": step, "state": dict(state)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _write_durably(temporary, content)
            os.replace(temporary, path)
            sync(self.directory)  # the rename itself is to survive a power cut
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise disk_error(
                error,
                f"write the checkpoint {path}",
                if_full="the one before it is kept. Give the job a larger volume or keep fewer "
                "checkpoints (checkpoints_kept)",
                directory=self.directory,
                num_bytes=_num_bytes(content),
            ) from error
        for old in self._complete()[self._kept :]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The state of the newest readable checkpoint, on the CPU; None when there is none.

        Half-written files are removed; a damaged one is renamed, so that it no longer counts, and
        the one before it taken. Raises CheckpointError when it is another run's, naming what
        differs, or when all are damaged; PlatformError for trouble with the disk.
        """
        for leftover in self.directory.glob("*.tmp"):
            logger.warning("removing %s, which was never finished", leftover)
            leftover.unlink(missing_ok=True)
        for path in self._complete():
            try:
                content = _read(path)
                if content is None:
                    path.rename(path.with_name(path.name + DAMAGED))
                    continue
            except OSError as error:
                raise disk_error(
                    error, f"read the checkpoint {path}", if_full="give the job a larger volume"
                ) from error
            self._require_same_run(path, content)
            logger.info("resuming from %s", path)
            state: dict[str, Any] = content["state"]
            return state
        damaged = sorted(path.name for path in self.directory.glob("*" + DAMAGED))
        if damaged:
            raise CheckpointError(
                f"{self.directory} holds no checkpoint that can be read, "
                f"only {', '.join(damaged)}; delete the directory to start anew"
            )
        return None

    def _complete(self) -> list[Path]:
        """Finished checkpoints, newest first."""
        if not self.directory.is_dir():
            return []
        paths = [path for path in self.directory.iterdir() if NAME.fullmatch(path.name)]
        return sorted(paths, reverse=True)

    def _require_same_run(self, path: Path, content: Mapping[str, Any]) -> None:
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {content['format']}, this version reads {FORMAT}; "
                "start with an empty checkpoint directory"
            )
        theirs, ours = content["identity"], self._identity
        differences = [
            f"{name} was {theirs.get(name)!r}, this job has {ours.get(name)!r}"
            for name in sorted({*theirs, *ours})
            if theirs.get(name) != ours.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{path} belongs to another run: {'; '.join(differences)}. "
                "Give every run its own checkpoint directory, or set the values back"
            )


def stored_identity(directory: Path) -> dict[str, Any] | None:
    """That of the newest readable checkpoint in a directory; None when there is none.

    Reads no weights. Raises PlatformError for trouble with the disk.
    """
    for path in Checkpoints(directory, identity={})._complete():
        try:
            content = _read(path, with_tensors=False)
        except OSError as error:
            raise disk_error(
                error, f"read the checkpoint {path}", if_full="give the job a larger volume"
            ) from error
        if content is not None:
            identity: dict[str, Any] = content["identity"]
            return identity
    return None


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Start every random generator of the process anew, for one step of one rank.

    So a checkpoint need not hold their state, which would be another one for every rank.
    """
    (mixed,) = np.random.SeedSequence([seed, step, rank]).generate_state(1).tolist()
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


class _Counting:
    """A binary file of which only the length is kept."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        size = memoryview(data).nbytes
        self.num_bytes += size
        return size

    def flush(self) -> None:
        pass


def _num_bytes(content: Mapping[str, Any]) -> int:
    """How long the file of a checkpoint is."""
    target = _Counting()
    torch.save(dict(content), cast(IO[bytes], target))
    return target.num_bytes


class _RememberingFile:
    """A binary file that keeps the error it met: torch reports only that writing failed."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_durably(path: Path, content: Mapping[str, Any]) -> None:
    """torch.save, then down to the disk. Raises OSError, never torch's own errors for one."""
    target = _RememberingFile(path)
    try:
        with target.file:
            torch.save(dict(content), cast(IO[bytes], target))
            target.file.flush()
            os.fsync(target.file.fileno())
    except (OSError, RuntimeError):
        if target.error is not None:
            raise target.error from None
        raise


def _read(path: Path, *, with_tensors: bool = True) -> dict[str, Any] | None:
    """A checkpoint's content; None for a damaged file. Raises OSError, MemoryError.

    with_tensors: or leave their bytes on the disk.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not with_tensors)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's reader raises many kinds for a damaged file
        if "DefaultCPUAllocator" in str(error):  # torch's own MemoryError is a RuntimeError
            raise MemoryError(f"not enough memory to read {path}") from error
        logger.warning("skipping the damaged checkpoint %s: %s", path, str(error).split("\n")[0])
        return None
    if not isinstance(content, dict) or not {"format", "identity", "state"} <= content.keys():
        logger.warning("skipping %s, which is not a checkpoint of `train`", path)
        return None
    return content
