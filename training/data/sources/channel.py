"""A channel as a data set, whatever its layout: the place where layouts are told apart."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dalle.errors import DataError
from training.config.fields import DEFAULT_MAX_BAD_SHARE
from training.data.skips import Skips, printable
from training.data.sources.files import File, walk
from training.data.sources.folder import FolderReader
from training.data.sources.index import EXPECTED_LAYOUT, IMAGE_SUFFIXES, Pairs, Reader
from training.data.sources.shards import SHARD_SUFFIX, ShardReader
from training.stopping import NEVER, Stop, unless_stopped

log = logging.getLogger(__name__)

PACKED_SUFFIXES = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def open_channel(
    root: Path,
    *,
    image_size: int,
    channel: str | None = None,
    max_bad_share: float = DEFAULT_MAX_BAD_SHARE,
    caption_key: str | None = None,
    is_streamed: bool = False,
    is_part: bool = False,
    stop: Stop = NEVER,
) -> Pairs:
    """Find the pairs of a channel and read their captions; images are read when needed.

    channel: the name used in messages; the folder's name when not given.
    max_bad_share: 0 to 1, how many pairs may be unusable.
    caption_key, is_streamed: see `ShardReader`. is_part: whether other hosts have other objects of
        the channel.
    Raises `DataError` for a layout that cannot be read, when there is no pair, or when too many
    are unusable; Stopped.
    """
    skips = Skips(channel or root.name)
    if not root.is_dir():
        raise DataError(f"{skips.channel}: {root} is not a directory; {EXPECTED_LAYOUT}")
    files = list(unless_stopped(walk(root, skips), stop))
    if is_part and not files:
        raise DataError(
            f"{skips.channel}: this host was given none of the channel's objects; ShardedByS3Key "
            "needs at least as many shards as there are hosts, all of about one size"
        )
    reader = reader_of(root, files, skips.channel, caption_key, is_streamed, is_part)
    pairs = Pairs(
        reader,
        root,
        skips=skips,
        image_size=image_size,
        max_bad_share=max_bad_share,
        stop=stop,
    )
    log.info("%s: layout: %s", skips.channel, pairs.layout)
    return pairs


def reader_of(
    root: Path,
    files: list[File],
    channel: str,
    caption_key: str | None,
    is_streamed: bool,
    is_part: bool,
) -> Reader[Any]:
    """Tell a channel's layout by the names of its files, and return the reader of that layout.

    Two layouts at once are a DataError: half of the data would be left out unnoticed.
    """
    shard = _first(files, (SHARD_SUFFIX,))
    image = _first(files, IMAGE_SUFFIXES)
    packed = _first(files, PACKED_SUFFIXES)
    if shard and image:
        raise DataError(
            f"{channel}: a channel holds either tar shards or single files, this one has "
            f"both, such as {shard} and {image}; keep one of the two"
        )
    if shard:
        return ShardReader(root, files, caption_key=caption_key, is_streamed=is_streamed)
    if packed and not image:
        raise DataError(
            f"{channel}: {packed} is compressed, and cannot be read from the middle; give "
            "plain .tar shards, or unpack it"
        )
    if caption_key is not None:
        log.warning("%s: caption_key has no effect: the channel holds no tar shards", channel)
    if is_streamed:
        log.warning(
            "%s: single files are slow to fetch one by one (FastFile); shards are quick: "
            "python -m training.data shard",
            channel,
        )
    if is_part:
        log.warning(
            "%s: ShardedByS3Key distributes single files, and so separates images from their "
            "captions; give shards: python -m training.data shard",
            channel,
        )
    return FolderReader(root, files)


def _first(files: list[File], suffixes: tuple[str, ...]) -> str | None:
    """Return the name of the first file with one of these suffixes."""
    names = (printable(file.name) for file in files if file.name.lower().endswith(suffixes))
    return next(names, None)
