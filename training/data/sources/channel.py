"""A channel as a data set, whatever its layout: the place where layouts are told apart."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from dalle.errors import DataError
from training.config.fields import DEFAULT_MAX_BAD_SHARE
from training.data.skips import Skips, printable
from training.data.sources.coco import CocoReader, find_coco
from training.data.sources.files import File, walk
from training.data.sources.folder import CAPTION_SUFFIX, FolderReader, json_beside_images
from training.data.sources.index import (
    EXPECTED_LAYOUT,
    IMAGE_SUFFIXES,
    Pairs,
    Reader,
    unicode_key,
)
from training.data.sources.shards import SHARD_SUFFIX, ShardReader
from training.data.sources.tables import LIST_SUFFIXES, METADATA_NAMES, TableReader
from training.stopping import NEVER, Stop, unless_stopped

log = logging.getLogger(__name__)

MAX_PROBED_FILES = 16  # Parquet files that are looked into for images
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
    """Tell a channel's layout by its files, and return the reader of that layout.

    Two layouts at once are a DataError: half of the data would be left out unnoticed.
    """
    image = _first(files, IMAGE_SUFFIXES)
    if shard := _first(files, (SHARD_SUFFIX,)):
        beside = image or _first(_parquet_files(files, not_beside=SHARD_SUFFIX), (".parquet",))
        if beside:
            raise _mixture(channel, "tar shards or other files", [shard, beside])
        return ShardReader(root, files, caption_key=caption_key, is_streamed=is_streamed)
    if parquet := _with_images(root, files):
        if image:
            raise _mixture(channel, "Parquet files or single images", [parquet, image])
        from training.data.sources.parquet import ParquetReader

        return ParquetReader(root, files, caption_key)
    packed = _first(files, PACKED_SUFFIXES)
    if packed and not image:
        raise DataError(
            f"{channel}: {packed} is compressed, and cannot be read from the middle; give "
            "plain .tar shards, or unpack it"
        )
    _warn_of_single_files(channel, is_streamed, is_part)
    if image and (reader := _table_reader(root, files, channel, caption_key)):
        return reader
    if caption_key is not None and not json_beside_images(files):
        log.warning(
            "%s: caption_key has no effect: the channel holds neither tar shards nor a table, and "
            "no JSON beside its images",
            channel,
        )
    return FolderReader(root, files, caption_key)


def _table_reader(
    root: Path, files: list[File], channel: str, caption_key: str | None
) -> Reader[Any] | None:
    """Return the reader of the tables that name a channel's single images; None without any."""
    filled = [file for file in files if file.num_bytes]
    metadata = [file for file in filled if posixpath.basename(file.name) in METADATA_NAMES]
    if text := _text_beside_an_image(files):
        if metadata:
            log.warning(
                "%s: %s is not read, since images have text files such as %s; take one of the two "
                "out of the channel",
                channel,
                printable(metadata[0].name),
                text,
            )
        return None
    if metadata:
        for folder, tables in groupby(metadata, key=lambda file: posixpath.dirname(file.name)):
            if len(names := [file.name for file in tables]) > 1:
                raise _mixture(channel, f"one metadata file in {folder or 'its folder'}", names)
        return TableReader(root, files, metadata, caption_key)
    lists = [file for file in filled if file.suffix in LIST_SUFFIXES]
    coco = find_coco(root, filled, caption_key)
    if len(lists) + len(coco) > 1:
        names = [printable(file.name) for file in (*lists, *(file for file, _ in coco))]
        raise _mixture(channel, "one table of captions", names)
    if coco:
        return CocoReader(root, files, *coco[0], caption_key)
    return TableReader(root, files, lists, caption_key) if lists else None


def _mixture(channel: str, either: str, names: list[str]) -> DataError:
    shown = ", ".join(names[:8])
    return DataError(
        f"{channel}: a channel holds {either}, this one has {shown}; keep one of them in the "
        "channel and take the others out"
    )


def _warn_of_single_files(channel: str, is_streamed: bool, is_part: bool) -> None:
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


def _first(files: Iterable[File], suffixes: tuple[str, ...]) -> str | None:
    """Return the name of the first file with one of these suffixes."""
    names = (printable(file.name) for file in files if file.name.lower().endswith(suffixes))
    return next(names, None)


def _parquet_files(files: list[File], *, not_beside: str = "") -> list[File]:
    """Return the Parquet files, without those of statistics that img2dataset puts beside shards."""
    shards = {file.stem for file in files if file.suffix == not_beside}
    return [file for file in files if file.suffix == ".parquet" and file.stem not in shards]


def _with_images(root: Path, files: list[File]) -> str | None:
    """Return the name of the first Parquet file that holds images, or that cannot be read."""
    if not (tables := sorted(_parquet_files(files), key=lambda file: file.name)):
        return None
    from training.data.sources.parquet import has_images  # pyarrow takes half a second

    damaged: str | None = None
    for file in tables[:MAX_PROBED_FILES]:
        if found := has_images(root / file.name):
            return printable(file.name)
        if found is None:
            damaged = damaged or printable(file.name)
    return None if _first(files, IMAGE_SUFFIXES) else damaged


def _text_beside_an_image(files: list[File]) -> str | None:
    """Return the name of the first text file that has the stem of an image."""
    images = {unicode_key(file.stem) for file in files if file.suffix in IMAGE_SUFFIXES}
    beside = (file for file in files if unicode_key(file.stem) in images)
    return _first(beside, (CAPTION_SUFFIX,))
