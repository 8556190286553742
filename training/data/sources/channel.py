"""A channel as a data set, whatever its layout: files beside each other, or shards of them.

The layout is told by what is there, and never both: half of the data would be left out unseen.
"""

from __future__ import annotations

import logging
from pathlib import Path

from dalle.errors import DataError
from training.data.pairs import DEFAULT_MAX_BAD_SHARE, Skips, printable
from training.data.sources.files import File, walk
from training.data.sources.folder import folder_of
from training.data.sources.index import IMAGE_SUFFIXES, WANTED, StoredPairs
from training.data.sources.shards import SHARD_SUFFIX, shards_of
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
) -> StoredPairs:
    """Find the pairs of a channel and read their captions; images come later.

    channel: the name used in messages; the folder's own when not given.
    max_bad_share: 0 to 1, how many of the would-be pairs may be unusable.
    caption_key, is_streamed: see `shards_of`. is_part: whether other hosts have other objects of
        the channel.
    Raises `DataError` for a layout that cannot be read, when there is no pair, or when too many
    are unusable; Stopped.
    """
    skips = Skips(channel or root.name)
    if not root.is_dir():
        raise DataError(f"{skips.channel}: {root} is not a directory; {WANTED}")
    files = list(unless_stopped(walk(root, skips), stop))
    if is_part and not files:
        raise DataError(
            f"{skips.channel}: this host was given none of the channel's objects; ShardedByS3Key "
            "needs at least as many shards as there are hosts, all of about one size"
        )
    shard = _first(files, (SHARD_SUFFIX,))
    image = _first(files, IMAGE_SUFFIXES)
    packed = _first(files, PACKED_SUFFIXES)
    if shard is not None and image is not None:
        raise DataError(
            f"{skips.channel}: a channel holds either tar shards or single files, this one has "
            f"both, such as {shard} and {image}; keep one of the two"
        )
    dataset: StoredPairs
    if shard is not None:
        dataset = shards_of(
            root,
            files,
            skips,
            image_size,
            max_bad_share,
            caption_key=caption_key,
            is_streamed=is_streamed,
            stop=stop,
        )
    elif image is None and packed is not None:
        raise DataError(
            f"{skips.channel}: {packed} is compressed, and cannot be read from the middle; give "
            "plain .tar shards, or unpack it"
        )
    else:
        if caption_key is not None:
            log.warning(
                "%s: caption_key has no effect: the channel holds no tar shards", skips.channel
            )
        if is_streamed:
            log.warning(
                "%s: single files are slow to fetch one by one (FastFile); shards are quick: "
                "python -m training.data shard",
                skips.channel,
            )
        if is_part:
            log.warning(
                "%s: ShardedByS3Key deals out single files, and so tears images from their "
                "captions; give shards: python -m training.data shard",
                skips.channel,
            )
        dataset = folder_of(root, files, skips, image_size, max_bad_share, stop)
    log.info("%s: layout: %s", skips.channel, dataset.layout)
    return dataset


def _first(files: list[File], suffixes: tuple[str, ...]) -> str | None:
    """The name of the first file with one of these suffixes."""
    names = (file.name for file in files if file.name.lower().endswith(suffixes))
    name = next(names, None)
    return None if name is None else printable(name)
