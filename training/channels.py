"""Which input channels a job may have, checked before anything is read from them."""

from __future__ import annotations

import difflib
import os
import stat
from itertools import islice
from pathlib import Path

from dalle.contract import Channel, Job
from dalle.errors import ChannelError

REQUIRED = "train"
CHANNELS = (REQUIRED, "validation", "artefact", "clip")
INPUT_MODES = ("File", "FastFile")
OF_FEW_FILES = ("artefact", "clip")
"""Each of their files is needed. Those of the others are looked at as pairs, and a few may fail."""


def check(job: Job) -> None:
    """Raises ChannelError naming every channel that is missing, unexpected or unusable."""
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
    if channel.input_mode not in INPUT_MODES:
        modes = " or ".join(INPUT_MODES)
        return f"the channel {channel.name} has input mode {channel.input_mode}; it must be {modes}"
    try:
        with os.scandir(channel.directory) as listing:
            # Of those with pairs one is enough to know: there may be millions.
            wanted = None if channel.name in OF_FEW_FILES else 1
            names = [entry.name for entry in islice(listing, wanted)]
    except (FileNotFoundError, NotADirectoryError):
        return f"the channel {channel.name} should be the directory {channel.directory}"
    except OSError as error:
        return _unreadable(channel, channel.directory, error)
    if not names:
        return f"the channel {channel.name} is empty: {channel.directory}"
    if channel.name in OF_FEW_FILES:
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
