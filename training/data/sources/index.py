"""The pairs of a channel, listed once and read when needed, and the interface of its layouts.

    Reader.pairs(skips, stop) -> (File, captions)  lists a layout's pairs when the channel is opened
    Reader.read(File) -> bytes                     reads one image file, at any time
    Pairs                                          the `Dataset` of what a reader has listed

`training.data.sources.channel` tells the layouts apart.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from dalle.errors import DataError
from dalle.preprocess.images import ImageError, ImageFault, Pixels, decode_image, to_square
from training.data.pairs import fingerprint
from training.data.skips import SkipReason, Skips, printable
from training.data.sources.captions import MAX_CAPTION_BYTES, Captions
from training.data.sources.files import File
from training.stopping import NEVER, Stop

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_IMAGE_BYTES = 256 << 20

EXPECTED_LAYOUT = (
    "a channel holds images (png, jpg, jpeg or webp), each beside a text file of the same name "
    "(0017.png, 0017.txt) in UTF-8 with one caption a line, sub-folders are fine; or tar shards of "
    "such files; or images and a table of them (metadata.jsonl, metadata.csv, a list of paths and "
    "captions, COCO's captions); or Parquet files with images and captions"
)

FileT = TypeVar("FileT", bound=File)


class Reader(ABC, Generic[FileT]):
    """One layout of a channel. A new layout is a subclass, and a line in `channel.reader_of`.

    Channels are read-only and filled by strangers: a reader writes nothing and follows no path out
    of the channel. What cannot be a pair is counted in `skips` by its reason; only a layout that
    cannot be read at all is a `DataError`.
    layout: its name in logs and reports, such as `image-text folder`.
    """

    layout: str

    @abstractmethod
    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[FileT, Captions]]:
        """List each pair's image file and captions, in an order that depends on the files alone.

        Called once. Image files have names of their own and are not opened; there is at least one
        caption, none empty. `FileT` may say where in a larger file the image is. Raises Stopped.
        """

    @abstractmethod
    def read(self, image: FileT) -> bytes:
        """Return the bytes of an image file, from any thread or forked process. Raises OSError."""

    def groups(self, images: Sequence[FileT]) -> tuple[int, ...] | None:
        """Return the sizes of runs of pairs to read in turn (see `Sampler`), None for any order."""
        return None


class Pairs:
    """The pairs of one channel; a `Dataset` that reads images when they are needed."""

    def __init__(
        self,
        reader: Reader[Any],
        where: Path,
        *,
        skips: Skips,
        image_size: int,
        max_bad_share: float,
        stop: Stop = NEVER,
    ) -> None:
        """List the pairs of a reader. where: names the channel's place in errors.

        Raises `DataError` when there is no pair, or when too many are unusable; Stopped.
        """
        pairs = list(reader.pairs(skips, stop))
        if not pairs:
            found = skips.describe()
            raise DataError(
                f"{skips.channel}: no image-caption pair in {where}"
                f"{f' (skipped: {found})' if found else ''}; {EXPECTED_LAYOUT}"
            )
        skips.num_pairs = len(pairs)
        skips.check_share(max_bad_share)
        log.info(
            "%s: %d pairs with %d captions; skipped: %s; ignored files: %d",
            skips.channel,
            len(pairs),
            sum(len(captions) for _, captions in pairs),
            skips.describe() or "none",
            skips.counts[SkipReason.IGNORED],
        )
        self._reader = reader
        self._images: list[File] = [image for image, _ in pairs]
        self._captions: list[Captions] = [captions for _, captions in pairs]
        self.skips = skips
        self.channel = skips.channel
        self.image_size = image_size
        self.max_bad_share = max_bad_share
        self.layout = reader.layout
        self.groups = reader.groups(self._images)
        self.fingerprint = fingerprint(
            (image.identity, image.num_bytes, captions) for image, captions in pairs
        )

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images[index].name

    def num_bytes(self, index: int) -> int:
        """Return the size of the image file."""
        return self._images[index].num_bytes

    def captions(self, index: int) -> Captions:
        return self._captions[index]

    def image(self, index: int) -> Pixels:
        """Read, decode and square one image: uint8 [image_size, image_size, 3].

        Raises `ImageError` when the file cannot be used.
        """
        data = self.image_bytes(index)
        # JPEG's own scaling differs from decoding all pixels first by 38 to 46 dB PSNR.
        image = decode_image(data, what=self._path(index), min_side=self.image_size)
        return to_square(image, self.image_size)

    def image_bytes(self, index: int) -> bytes:
        """Read one image file. Raises `ImageError` when it is too large or cannot be read."""
        file = self._images[index]
        if file.num_bytes > MAX_IMAGE_BYTES:
            raise ImageError(
                f"{self._path(index)} has {file.num_bytes:,} bytes; the limit is "
                f"{MAX_IMAGE_BYTES:,}",
                ImageFault.GIANT,
            )
        try:
            return self._reader.read(file)
        except OSError as error:
            raise ImageError(
                f"{self._path(index)} cannot be read ({error.strerror})", ImageFault.UNREADABLE
            ) from error

    def _path(self, index: int) -> str:
        return f"{self.channel}/{printable(self.name(index))}"


def match_by_stem(
    images: Mapping[str, FileT],
    texts: Mapping[str, FileT],
    parse: Callable[[FileT], Captions],
    skips: Skips,
) -> Iterator[tuple[FileT, Captions]]:
    """Pair images with their captions by stem (the keys), sorted by it.

    parse: reads a caption file; returns () and counts the reason when that cannot be used.
    """
    for stem in sorted(images.keys() | texts.keys()):
        image, text = images.get(stem), texts.get(stem)
        if image is None:
            skips.add(SkipReason.CAPTION_WITHOUT_IMAGE, texts[stem].name)
        elif text is None:
            skips.add(SkipReason.IMAGE_WITHOUT_CAPTION, image.name)
        elif image.num_bytes == 0:
            skips.add(SkipReason.EMPTY_IMAGE, image.name)
        elif text.num_bytes > MAX_CAPTION_BYTES:
            skips.add(SkipReason.GIANT_CAPTION, text.name)
        elif captions := parse(text):
            yield image, captions


def add_image(images: dict[str, FileT], stem: str, file: FileT, skips: Skips) -> None:
    """Add an image, or count it when there is one of the same stem already."""
    if images.setdefault(stem, file) is not file:
        other = images[stem].name
        detail = f"{file.name}: {other} already goes with its caption; keep one of the two"
        skips.add(SkipReason.SECOND_IMAGE, file.name, detail)
