"""Channels in Pipe mode: the stream is written to the local disk once, and read from there.

SageMaker streams a channel through a FIFO, once for each epoch. Training on the stream directly
would shuffle only within a buffer, could not resume where an interrupted job was, would let ranks
run out at different times, and could not train the tokenizer on all captions first. So the first
epoch's stream is spooled and the others are not opened: order, captions, resuming and the token
cache are those of File mode. That takes as much disk as File mode, for the images alone, and ends
with an error while there is room left for checkpoints. Pipe mode serves for what no other mode has:
augmented manifests, and objects that the platform unpacks (CompressionType Gzip). Channels that are
too large for a disk need FastFile.

Pairs are sorted by a digest of image and captions, not as they came: a shuffled stream
(ShuffleConfig) gives the same data set again, so that a restarted job resumes where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

from dalle.errors import DiskFullError
from dalle.platform.disk import disk_errors
from dalle.platform.environment import Channel
from training.data.pipe.records import read_pairs
from training.data.pipe.stream import Stream
from training.data.sharded import on_all_ranks
from training.data.skips import PartSkips, Skips
from training.data.sources.captions import Captions
from training.data.sources.index import Pairs, Reader
from training.data.sources.shards import Descriptor
from training.data.sources.tar import TarMember
from training.distributed.process_group import ProcessGroup
from training.stopping import Stop, unless_stopped

log = logging.getLogger(__name__)

SPARED_BYTES = 2 << 30  # left on the disk for checkpoints and the model
LOOK_BYTES = 64 << 20  # written between two looks at the free space
_IMAGES, _PAIRS, _SKIPS = "images", "pairs.jsonl", "skips.json"


@dataclass(frozen=True, slots=True)
class SpooledImage(TarMember):
    """An image in the spool. digest: of its bytes."""

    digest: str

    @property
    def identity(self) -> str:
        """The digest: names may depend on the order of the stream."""
        return self.digest


class SpoolReader(Reader[SpooledImage]):
    """The pairs of a spooled stream, by content. The spool may be deleted once this is made."""

    layout = "stream"

    def __init__(self, folder: Path) -> None:
        self._file = Descriptor(folder / _IMAGES)
        self._lines = (folder / _PAIRS).read_text("utf-8").splitlines()
        self._skips = PartSkips(**json.loads((folder / _SKIPS).read_text("utf-8")))

    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[SpooledImage, Captions]]:
        skips.restore(self._skips)
        pairs: list[tuple[SpooledImage, Captions]] = []
        for line in unless_stopped(self._lines, stop):
            name, num_bytes, offset, digest, captions = json.loads(line)
            pairs.append((SpooledImage(name, num_bytes, 0, offset, digest), tuple(captions)))
        self._lines = []
        yield from sorted(pairs, key=lambda pair: (pair[0].digest, pair[1], pair[0].name))

    def read(self, image: SpooledImage) -> bytes:
        return self._file.read(image.num_bytes, image.offset)


def open_pipe(
    channel: Channel,
    *,
    image_size: int,
    max_bad_share: float,
    caption_key: str | None,
    ranks: ProcessGroup,
    stop: Stop,
) -> Pairs:
    """Spool the first epoch of a channel and find its pairs.

    ranks: those of this host. The first one reads the stream, and all open the spool; its files are
    deleted when this returns, and their space is free once no process has them open.
    Raises DataError, with the byte, for a stream in another format or an incomplete one, for one
    without a pair, and when too many are unusable; DiskFullError; Stopped.
    """
    with ExitStack() as stack:

        def spool() -> str:
            if not ranks.is_first:
                return ""
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{channel.name}-"))
            _spool(channel, Path(folder), caption_key, stop)
            return folder

        folder = Path(ranks.each(on_all_ranks(ranks, spool))[0])
        reader = SpoolReader(folder)
        ranks.any(False)  # all ranks have opened the spool before it is deleted
    return Pairs(
        reader,
        channel.pipe(0),
        skips=Skips(channel.name),
        image_size=image_size,
        max_bad_share=max_bad_share,
    )


def _spool(channel: Channel, folder: Path, caption_key: str | None, stop: Stop) -> None:
    """Write the images of a stream into one file, and the pairs and the skips beside it."""
    began = time.monotonic()
    skips = Skips(channel.name)
    num_pairs = 0
    with (
        Stream(channel.pipe(0), channel.name, stop) as stream,
        closing(_ImageWriter(folder / _IMAGES, channel.name)) as images,
        (folder / _PAIRS).open("w", encoding="utf-8") as index,
    ):
        for image, captions in read_pairs(stream, images.add, caption_key, skips, stop):
            digest = images.digests.pop(image.offset, "")
            row = [image.name, image.num_bytes, image.offset, digest, captions]
            index.write(json.dumps(row) + "\n")
            num_pairs += 1
        (folder / _SKIPS).write_text(json.dumps(asdict(skips.of_part())), encoding="utf-8")
        log.info(
            "%s: %d pairs in %d bytes, %d of them images, after %.0f s",
            *(stream.name, num_pairs, stream.tell(), images.num_bytes, time.monotonic() - began),
        )


class _ImageWriter:
    """Writes the file of all images. digests: by offset, of images whose pair is not known yet."""

    def __init__(self, path: Path, channel: str) -> None:
        self._path = path
        self._channel = channel
        self._file = path.open("wb")
        self._looked_at = 0
        self.num_bytes = 0
        self.digests: dict[int, str] = {}

    def add(self, data: bytes) -> int:
        """Append an image and return its offset. Raises DiskFullError before the disk is full."""
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
        with self._disk_errors():
            self._file.write(data)
        # An empty image has the offset of the next one; it is never used.
        self.digests[offset] = hashlib.blake2b(data, digest_size=16).hexdigest()
        return offset

    def _disk_errors(self) -> AbstractContextManager[None]:
        what = f"spool the channel {self._channel} into {self._path.parent}"
        return disk_errors(what, if_full="give the job a larger volume")

    def close(self) -> None:
        with self._disk_errors():
            self._file.close()
