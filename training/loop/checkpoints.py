"""Checkpoints of a stage in one directory: written atomically, the newest few kept.

On SageMaker the directory is /opt/ml/checkpoints, copied to S3 while the job runs and copied back
before a restart; each stage has a sub-directory. Knows nothing of the state in a checkpoint, and
unpickles only tensors and plain values.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dalle.errors import CheckpointError
from dalle.platform.disk import disk_errors, replacing

logger = logging.getLogger(__name__)

FORMAT = 2
NAME = re.compile(r"step-(\d{9})\.pt")
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage.

    identity: plain values that decide what the run computes (settings, seed, data fingerprint);
    a checkpoint with another identity is refused. kept: how many of the newest stay.
    """

    directory: Path
    _: KW_ONLY
    identity: Mapping[str, Any]
    kept: int = 2

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps, then remove all but the newest `kept` checkpoints.

        Raises DiskFullError, or PlatformError for other trouble with the disk; the earlier
        checkpoints are untouched then.
        """
        path = self.directory / f"step-{step:09d}.pt"
        content = {"format": FORMAT, "identity": dict(self.identity), "step": step}
        content |= {"state": dict(state)}
        tensors = [each for each in tree_leaves(content) if isinstance(each, Tensor)]
        with (
            disk_errors(
                f"write the checkpoint {path}",
                if_full="the one before it is kept. Give the job a larger volume or keep fewer "
                "checkpoints (checkpoints_kept)",
                directory=self.directory,
                num_bytes=sum(each.nbytes for each in tensors),
            ),
            replacing(path, is_durable=True) as temporary,
        ):
            write_content(temporary, content)
        for old in self._complete()[self.kept :]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """Return the state of the newest readable checkpoint, on the CPU; None without any.

        Unfinished files are removed. A damaged checkpoint is renamed, and the one before it is
        loaded. Raises CheckpointError when it is another run's, naming what differs, or when all
        are damaged; PlatformError for other trouble with the disk.
        """
        for leftover in self.directory.glob("*.tmp"):
            logger.warning("removing %s, which was never finished", leftover)
            leftover.unlink(missing_ok=True)
        for path in self._complete():
            with reading(path):
                content = _read(path)
                if content is None:
                    path.rename(path.with_name(path.name + DAMAGED))
                    continue
            require_same_run(path, content["identity"], self.identity)
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

    def steps(self) -> list[int]:
        """Return the steps of the finished checkpoints, newest first."""
        return [int(path.name[5:-3]) for path in self._complete()]

    def _complete(self) -> list[Path]:
        """Return the finished checkpoints, newest first."""
        if not self.directory.is_dir():
            return []
        paths = [path for path in self.directory.iterdir() if NAME.fullmatch(path.name)]
        return sorted(paths, reverse=True)


@dataclass(frozen=True)
class StoredRun:
    """The newest readable checkpoint of a directory, without its weights.

    budget: (total, unit) of the run that wrote it; None for one of an older version.
    """

    path: Path
    identity: Mapping[str, Any]
    step: int
    seconds: float
    budget: tuple[float, str] | None

    @property
    def is_finished(self) -> bool:
        """Whether the budget of the run that wrote it was spent; assumed without a budget."""
        if self.budget is None:
            return True
        total, unit = self.budget
        return (self.step if unit == "step" else self.seconds) >= total

    def require(self, known: Mapping[str, Any]) -> None:
        """Raise CheckpointError unless its identity has the known values."""
        require_same_run(self.path, {name: self.identity.get(name) for name in known}, known)


def require_same_run(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming what differs between a checkpoint's identity and a run's."""
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


def stored_run(directory: Path) -> StoredRun | None:
    """Return the newest readable checkpoint; None without any. Reads no weights.

    Raises CheckpointError for one of another format, PlatformError for trouble with the disk.
    """
    for path in Checkpoints(directory, identity={})._complete():
        with reading(path):
            content = _read(path, with_tensors=False)
        if content is not None:
            state = content["state"]
            return StoredRun(
                path,
                content["identity"],
                state.get("step", 0),
                state.get("seconds", 0.0),
                state.get("budget"),
            )
    return None


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Seed every random generator of the process for one step of one rank.

    So a checkpoint need not hold the generators' states, which differ between ranks.
    """
    (mixed,) = np.random.SeedSequence([seed, step, rank]).generate_state(1).tolist()
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


class _RememberingFile:
    """Binary file that keeps its OSError: torch reports only that writing failed."""

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


def write_content(path: Path, content: Mapping[str, Any]) -> None:
    """Write by torch.save. Raises OSError, not the errors that torch makes of it."""
    target = _RememberingFile(path)
    try:
        with target.file:
            torch.save(dict(content), cast(IO[bytes], target))
    except (OSError, RuntimeError):
        if target.error is not None:
            raise target.error from None
        raise


def reading(path: Path) -> AbstractContextManager[None]:
    """Raise our errors for OSError while a checkpoint is read."""
    return disk_errors(f"read the checkpoint {path}", if_full="give the job a larger volume")


def read_content(path: Path, *, with_tensors: bool = True) -> dict[str, Any] | None:
    """Return what `write_content` wrote; None for a damaged file, with a warning.

    with_tensors: False leaves the tensors' bytes on the disk until they are used. Raises OSError,
    MemoryError.
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
    return content if isinstance(content, dict) else {}


def _read(path: Path, *, with_tensors: bool = True) -> dict[str, Any] | None:
    """Return a checkpoint's content; None for a damaged file.

    with_tensors: as of `read_content`. Raises CheckpointError for one of another format; OSError,
    MemoryError.
    """
    content = read_content(path, with_tensors=with_tensors)
    if content is None:
        return None
    if not {"format", "identity", "state"} <= content.keys():
        logger.warning("skipping %s, which is not a checkpoint of `train`", path)
        return None
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {content['format']}, this version reads {FORMAT}; "
            "start with an empty checkpoint directory"
        )
    return content
