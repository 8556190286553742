"""Channels in Pipe mode: the stream is taken in once, on to the local disk, and read from there.

SageMaker streams a channel through a FIFO, afresh for each epoch. Training on it as it comes would
know neither how many pairs there are, nor all captions (from which the tokenizer is learned), nor
any pair but the next ones: shuffling only within a buffer, nothing of what an interrupted job had
seen, and ranks that run out at different times. So the first epoch's stream is spooled, and the
others are never asked for: order, captions, resuming and token cache are those of File mode. That
takes as much disk as File mode, for the images alone, and is refused in time when there is too
little. What Pipe is good for is what no other mode has: augmented manifests, and objects that the
platform unpacks (CompressionType Gzip). What is too large for a disk is for FastFile.

Pairs are numbered by a digest of image and captions, not as they came: a stream that is shuffled
(ShuffleConfig) gives the same data set again, so that a job started anew goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from dalle.errors import DiskFullError
from dalle.platform.disk import disk_error
from dalle.platform.environment import Channel
from training.data.pairs import PartSkips, Skips, fingerprint
from training.data.pipe.records import pairs_of
from training.data.pipe.stream import Stream
from training.data.sharded import agreed
from training.data.sources.captions import Captions
from training.data.sources.index import StoredPairs, require_enough
from training.data.sources.shards import Descriptor, read_at
from training.data.sources.tar import Member
from training.distributed.process_group import Ranks
from training.stopping import Stop

log = logging.getLogger(__name__)

SPARED_BYTES = 2 << 30  # left on the disk for checkpoints and the model
LOOK_BYTES = 64 << 20  # between two looks at how much is free
_IMAGES, _PAIRS, _SKIPS = "images", "pairs.jsonl", "skips.json"


@dataclass(frozen=True, slots=True)
class Spooled(Member):
    """An image in the spool. digest: of its bytes; shard: which of the stream's, from 0."""

    digest: str


class SpooledPairs(StoredPairs):
    """The pairs of a stream; a `Dataset`. Made by `open_pipe`."""

    def __init__(
        self,
        file: Descriptor,
        pairs: Iterable[tuple[Spooled, Captions]],
        *,
        skips: Skips,
        image_size: int,
        max_bad_share: float,
    ) -> None:
        pairs = sorted(pairs, key=lambda pair: (pair[0].digest, pair[1], pair[0].name))
        images = [image for image, _ in pairs]
        captions = [lines for _, lines in pairs]
        super().__init__(
            images, captions, skips=skips, image_size=image_size, max_bad_share=max_bad_share
        )
        # By content: names may be those of places in the stream.
        self.fingerprint = fingerprint(
            (image.digest, image.num_bytes, lines) for image, lines in pairs
        )
        self._members = images
        self._file = file

    @property
    def layout(self) -> str:
        return "stream"

    def read(self, index: int) -> bytes:
        member = self._members[index]
        return read_at(self._file.number, member.num_bytes, member.offset)


def open_pipe(
    channel: Channel,
    *,
    image_size: int,
    max_bad_share: float,
    caption_key: str | None,
    ranks: Ranks,
    stop: Stop,
) -> SpooledPairs:
    """Take in the first epoch of a channel.

    ranks: those of this host, of which the first one reads and all open what it has spooled. The
    spool has no name any more when this returns: it goes with the last process that has it open.
    Raises DataError, with the byte, for a stream that is no such one or not complete, for one
    without a pair, and when too many are unusable; DiskFullError; Stopped.
    """
    with ExitStack() as stack:

        def spool() -> str:
            if not ranks.is_first:
                return ""
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{channel.name}-"))
            _spool(channel, Path(folder), caption_key, stop)
            return folder

        folder = Path(ranks.each(agreed(ranks, spool))[0])
        skips = Skips(channel.name)
        skips.restore(PartSkips(**json.loads((folder / _SKIPS).read_text("utf-8"))))
        file = Descriptor(os.open(folder / _IMAGES, os.O_RDONLY | os.O_CLOEXEC))
        pairs = list(_read_pairs(folder / _PAIRS))
        ranks.any(False)  # before it goes, all have opened it
    require_enough([lines for _, lines in pairs], channel.pipe(0), skips, max_bad_share)
    return SpooledPairs(
        file, pairs, skips=skips, image_size=image_size, max_bad_share=max_bad_share
    )


def _spool(channel: Channel, folder: Path, caption_key: str | None, stop: Stop) -> None:
    """Write the images of a stream, one behind the other, and which captions go with which."""
    began = time.monotonic()
    skips = Skips(channel.name)
    num_pairs = 0
    with (
        Stream(channel.pipe(0), channel.name, stop) as stream,
        _Images(folder / _IMAGES, channel.name) as images,
        (folder / _PAIRS).open("w", encoding="utf-8") as index,
    ):
        for image, captions in pairs_of(stream, images.add, caption_key, skips, stop):
            row = [image.name, image.num_bytes, image.offset, images.digests.pop(image.offset, "")]
            index.write(json.dumps([*row, captions]) + "\n")
            num_pairs += 1
        (folder / _SKIPS).write_text(json.dumps(asdict(skips.of_part())), encoding="utf-8")
        log.info(
            "%s: %d pairs in %d bytes, %d of them images, after %.0f s",
            *(stream.name, num_pairs, stream.tell(), images.num_bytes, time.monotonic() - began),
        )


def _read_pairs(path: Path) -> Iterator[tuple[Spooled, Captions]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            name, num_bytes, offset, digest, captions = json.loads(line)
            yield Spooled(name, num_bytes, 0, offset, digest), tuple(captions)


class _Images:
    """The file of all images. digests: by offset, of those whose captions are still to come."""

    def __init__(self, path: Path, channel: str) -> None:
        self._path = path
        self._channel = channel
        self._file = path.open("wb")
        self._looked_at = 0
        self.num_bytes = 0
        self.digests: dict[int, str] = {}

    def add(self, data: bytes) -> int:
        """Returns where it begins. Raises DiskFullError while there is room for checkpoints yet."""
        offset = self.num_bytes
        self.num_bytes += len(data)
        if self.num_bytes - self._looked_at > LOOK_BYTES:
            self._looked_at = self.num_bytes
            free = shutil.disk_usage(self._path.parent).free
            if free < SPARED_BYTES:
                raise DiskFullError(
                    f"{self._channel}: {self.num_bytes / 1e9:,.1f} GB of its stream are in "
                    f"{self._path.parent}, where only {free / 1e9:,.1f} GB are free, and "
                    f"{SPARED_BYTES / 1e9:,.1f} GB are kept for checkpoints: give the job a "
                    "larger volume, or tar shards in FastFile mode"
                )
        try:
            self._file.write(data)
        except OSError as error:
            raise self._no_room(error) from error
        # An empty one begins where the next one does; it is never used.
        self.digests[offset] = hashlib.blake2b(data, digest_size=16).hexdigest()
        return offset

    def _no_room(self, error: OSError) -> Exception:
        what = f"spool the channel {self._channel} into {self._path.parent}"
        return disk_error(error, what, if_full="give the job a larger volume")

    def __enter__(self) -> _Images:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._file.close()
        except OSError as trouble:
            raise self._no_room(trouble) from trouble
