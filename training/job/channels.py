"""Checks of a job's input channels, before their data is read."""

from __future__ import annotations

import difflib
import os
import stat
from itertools import islice
from pathlib import Path

from dalle.errors import ChannelError
from dalle.platform.environment import Channel, Job
from training.config.hyperparameters import LEGACY, TOKENIZER_MODEL

REQUIRED = "train"
CHANNELS = (REQUIRED, "validation", "artefact", "clip", TOKENIZER_MODEL, LEGACY)
OF_FEW_FILES = ("artefact", "clip", TOKENIZER_MODEL, LEGACY)
"""Channels of which every file is needed. In the others some files may be unusable."""
LOOKED_AT = 10_000
"""Entries of a channel of pairs that are looked at, of perhaps millions."""
REPLICATED, SHARDED = "FullyReplicated", "ShardedByS3Key"


def check(job: Job) -> None:
    """Raise ChannelError naming every channel that is missing, unexpected or unusable."""
    problems = []
    if REQUIRED not in job.channels:
        where = job.paths.input_data / REQUIRED
        problems.append(f"the channel {REQUIRED} is missing; put image-text pairs into {where}")
    for channel in job.channels.values():
        problem = _problem(channel)
        if problem:
            problems.append(problem)
    if problems:
        raise ChannelError("\n".join(problems))


def _problem(channel: Channel) -> str | None:
    if channel.name not in CHANNELS:
        nearest = difflib.get_close_matches(channel.name, CHANNELS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(CHANNELS)}"
        return f"the channel {channel.name} is unexpected; {hint}"
    is_of_pairs = channel.name not in OF_FEW_FILES
    modes = ("File", "FastFile", "Pipe") if is_of_pairs else ("File", "FastFile")
    distributions = (REPLICATED, SHARDED) if is_of_pairs else (REPLICATED,)
    for what, value, allowed in (
        ("input mode", channel.input_mode, modes),
        ("the S3DataDistributionType", channel.distribution, distributions),
    ):
        if value not in allowed:
            allowed_words = " or ".join(allowed)
            return f"the channel {channel.name} has {what} {value}; it must be {allowed_words}"
    if channel.input_mode == "Pipe":
        return None  # its FIFO may not exist yet
    try:
        with os.scandir(channel.directory) as listing:
            # A few files show that a channel of pairs is readable: there may be millions.
            wanted = LOOKED_AT if is_of_pairs else None
            names = [entry.name for entry in islice(listing, wanted)]
    except (FileNotFoundError, NotADirectoryError):
        return f"the channel {channel.name} should be the directory {channel.directory}"
    except OSError as error:
        return _unreadable(channel, channel.directory, error)
    shown = sorted(name for name in names if not name.startswith("."))
    # A channel in parts is judged later, on all hosts; a reader of weights says what it wants.
    if (
        not shown
        and channel.distribution == REPLICATED
        and channel.name not in (TOKENIZER_MODEL, LEGACY)
    ):
        return f"the channel {channel.name} is empty: {channel.directory}"
    if not is_of_pairs:
        for name in sorted(names):
            path = channel.directory / name
            try:
                if stat.S_ISREG(path.stat().st_mode):
                    path.open("rb").close()
            except OSError as error:
                return _unreadable(channel, path, error)
    return None


def _unreadable(channel: Channel, path: Path, error: OSError) -> str:
    return (
        f"the channel {channel.name} cannot be read: {path}: {error.strerror}; "
        f"the job runs as user {os.geteuid()}, who must be allowed to list its folders and to "
        "read its files"
    )
