"""Pairs that lie in a channel as files, or as members of its shards: what both have in common.

Each image and each caption is distrusted on its own: what cannot be used is skipped, counted and
named. Images are not opened before they are needed.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from dalle.errors import DataError
from dalle.preprocess.images import ImageError, ImageFault, Pixels, decode_image, to_square
from training.data.pairs import SkipReason, Skips, fingerprint, printable
from training.data.sources.captions import MAX_CAPTION_BYTES, Captions
from training.data.sources.files import File

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_IMAGE_BYTES = 256 << 20

WANTED = (
    "a channel holds images (png, jpg, jpeg or webp), each beside a text file of the same name "
    "(0017.png, 0017.txt) in UTF-8 with one caption a line, sub-folders are fine; or tar shards of "
    "such files"
)

Found = TypeVar("Found", bound=File)


class StoredPairs(ABC):
    """A `Dataset` of images that are read when they are asked for; children say how."""

    def __init__(
        self,
        images: Sequence[File],
        captions: Sequence[Captions],
        *,
        skips: Skips,
        image_size: int,
        max_bad_share: float,
    ) -> None:
        self._images = images
        self._captions = captions
        self.skips = skips
        self.channel = skips.channel
        self.image_size = image_size
        self.max_bad_share = max_bad_share
        self.fingerprint = fingerprint(
            (image.name, image.num_bytes, captions[number]) for number, image in enumerate(images)
        )

    @property
    @abstractmethod
    def layout(self) -> str:
        """How the channel is laid out, for people."""

    @property
    def groups(self) -> tuple[int, ...] | None:
        return None

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of one image file. Raises OSError."""

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._images[index].name

    def num_bytes(self, index: int) -> int:
        """Of the image file."""
        return self._images[index].num_bytes

    def captions(self, index: int) -> Captions:
        return self._captions[index]

    def image(self, index: int) -> Pixels:
        """Read, decode and square one image: uint8 [image_size, image_size, 3].

        Raises `ImageError` when the file cannot be used.
        """
        data = self.image_bytes(index)
        # JPEG's own scaling differs from the slow way, all pixels first, by 38 to 46 dB PSNR.
        image = decode_image(data, what=self._what(index), min_side=self.image_size)
        return to_square(image, self.image_size)

    def image_bytes(self, index: int) -> bytes:
        """One image file as it is. Raises `ImageError` when it is too large or cannot be read."""
        file = self._images[index]
        if file.num_bytes > MAX_IMAGE_BYTES:
            raise ImageError(
                f"{self._what(index)} has {file.num_bytes:,} bytes; the limit is "
                f"{MAX_IMAGE_BYTES:,}",
                ImageFault.GIANT,
            )
        try:
            return self.read(index)
        except OSError as error:
            raise ImageError(
                f"{self._what(index)} cannot be read ({error.strerror})", ImageFault.UNREADABLE
            ) from error

    def _what(self, index: int) -> str:
        return f"{self.channel}/{printable(self.name(index))}"


def pair_up(
    images: Mapping[str, Found],
    texts: Mapping[str, Found],
    parse: Callable[[Found], Captions],
    skips: Skips,
) -> Iterator[tuple[Found, Captions]]:
    """Images with their captions, by what their names have in common and in its order.

    parse: reads a caption file; gives nothing, having counted why, when that cannot be used.
    """
    for stem in sorted(images.keys() | texts.keys()):
        image, text = images.get(stem), texts.get(stem)
        if image is None:
            assert text is not None
            skips.add(SkipReason.CAPTION_WITHOUT_IMAGE, text.name)
        elif text is None:
            skips.add(SkipReason.IMAGE_WITHOUT_CAPTION, image.name)
        elif image.num_bytes == 0:
            skips.add(SkipReason.EMPTY_IMAGE, image.name)
        elif text.num_bytes > MAX_CAPTION_BYTES:
            skips.add(SkipReason.GIANT_CAPTION, text.name)
        elif captions := parse(text):
            yield image, captions


def add_image(images: dict[str, Found], stem: str, file: Found, skips: Skips) -> None:
    """Take an image in, unless its caption has one already."""
    if stem in images:
        skips.add(
            SkipReason.SECOND_IMAGE,
            file.name,
            f"{file.name}: {images[stem].name} already goes with its caption; keep one of the two",
        )
    else:
        images[stem] = file


def require_enough(captions: Sequence[Captions], root: Path, skips: Skips, share: float) -> None:
    """Say what was found; `captions` are those of each pair.

    Raises `DataError` when there is none, or when more than `share` of the would-be pairs are bad.
    """
    if not captions:
        found = skips.describe()
        raise DataError(
            f"{skips.channel}: no image-caption pair in {root}"
            f"{f' (skipped: {found})' if found else ''}; {WANTED}"
        )
    skips.num_pairs = len(captions)
    skips.check_share(share)
    log.info(
        "%s: %d pairs with %d captions; skipped: %s; ignored files: %d",
        skips.channel,
        len(captions),
        sum(map(len, captions)),
        skips.describe() or "none",
        skips.counts[SkipReason.IGNORED],
    )
