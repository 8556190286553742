"""Which input channels a job may have, checked before anything is read from them."""

from __future__ import annotations

import difflib

from dalle.contract import Channel, Job
from dalle.errors import ChannelError

REQUIRED = "train"
CHANNELS = (REQUIRED, "validation", "artefact", "clip")
INPUT_MODES = ("File", "FastFile")


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
    if not channel.directory.is_dir():
        return f"the channel {channel.name} should be the directory {channel.directory}"
    if next(channel.directory.iterdir(), None) is None:
        return f"the channel {channel.name} is empty: {channel.directory}"
    return None
