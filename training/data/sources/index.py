"""The pairs of a channel, listed once and read when needed, and the interface of its layouts.

    Reader.pairs(skips, stop) -> (File, captions)  lists a layout's pairs when the channel is opened
    Reader.read(File) -> bytes                     reads one image file, at any time
    Pairs                                          the `Dataset` of what a reader has listed

`training.data.sources.channel` tells the layouts apart.
"""

from __future__ import annotations

import logging
import posixpath
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from dalle.errors import DataError
from dalle.preprocess.images import ImageError, ImageFault, Pixels, decode_image, to_square
from training.data.pairs import fingerprint
from training.data.skips import Match, SkipReason, Skips, printable
from training.data.sources.captions import MAX_CAPTION_BYTES, Captions
from training.data.sources.files import File
from training.stopping import NEVER, Stop

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_IMAGE_BYTES = 256 << 20

EXPECTED_LAYOUT = (
    "a channel holds images (png, jpg, jpeg or webp), each beside a text file of the same name "
    "(0017.png, 0017.txt) in UTF-8 with one caption a line, or JSON with a caption (0017.json), "
    "sub-folders are fine; or tar shards of such files; or images and a table of them "
    "(metadata.jsonl, metadata.csv, a list of paths and captions, COCO's captions); or Parquet "
    "files with images and captions"
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
        self._hold(pairs)
        self.skips = skips
        self.channel = skips.channel
        self.image_size = image_size
        self.max_bad_share = max_bad_share
        self.layout = reader.layout

    def _hold(self, pairs: Sequence[tuple[File, Captions]]) -> None:
        self._images: list[File] = [image for image, _ in pairs]
        self._captions: list[Captions] = [captions for _, captions in pairs]
        self.groups = self._reader.groups(self._images)
        self.fingerprint = fingerprint(
            (image.identity, image.num_bytes, captions) for image, captions in pairs
        )

    def replace_captions(self, captions: Sequence[Captions]) -> None:
        """Replace each pair's captions, before any image is read; a pair without any is left out.

        captions: of every pair, in order.
        """
        self._hold([pair for pair in zip(self._images, captions, strict=True) if pair[1]])
        self.skips.num_pairs = len(self)

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


class PairsByName(Generic[FileT]):
    """Files of one folder or shard, paired by their names: `a/0017.jpg` with `a/0017.txt`.

    The rule is the same for folders, shards and streams:

    - The stem of a name ends at its last dot; a suffix may be in upper case. (The `webdataset`
      library ends it at the first dot. All pairs that it finds are found here as well.)
    - Equal stems pair. Of those that are left, stems that are equal in Unicode's form NFC pair.
    - Of two files that could take one place, the one with a lower-case suffix is used, then the
      first by name. The other is counted.
    - `1.mask.png` without a caption, where `1` is a pair, is a further file of that pair.
    """

    def __init__(self, skips: Skips) -> None:
        self._skips = skips
        self._images: dict[str, FileT] = {}
        self._texts: dict[str, FileT] = {}
        self._spares: dict[str, FileT] = {}

    def add_image(self, path: str, file: FileT) -> None:
        """path: normal, with `/`, without `.` as a part."""
        self._add(self._images, path, file)

    def add_text(self, path: str, file: FileT, *, is_spare: bool = False) -> None:
        """Add a caption file. is_spare: used only where there is no other one of the same stem."""
        self._add(self._spares if is_spare else self._texts, path, file)

    def _add(self, files: dict[str, FileT], path: str, file: FileT) -> None:
        """Add a file; a later one of the same path replaces it, as when an archive is unpacked."""
        if earlier := files.pop(path, None):
            self._skips.add(SkipReason.REPLACED, earlier.name)
        files[path] = file

    def pairs(self, parse: Callable[[FileT], Captions]) -> Iterator[tuple[FileT, Captions]]:
        """Yield the pairs by stem.

        parse: reads a caption file; returns () and counts the reason when that cannot be used.
        """
        matched = sorted(self._match(), key=lambda each: each.stem)
        pairs = {unicode_key(each.stem) for each in matched if each.image and each.text}
        for stem, image, text, is_same in matched:
            if image is None or text is None:
                for file, reasons in ((image, _ALONE_IMAGE), (text, _ALONE_TEXT)):
                    if file:
                        self._skips.add(_why_alone(stem, pairs, *reasons), file.name)
            elif image.num_bytes == 0:
                self._skips.add(SkipReason.EMPTY_IMAGE, image.name)
            elif text.num_bytes > MAX_CAPTION_BYTES:
                self._skips.add(SkipReason.GIANT_CAPTION, text.name)
            elif captions := parse(text):
                if not is_same:
                    self._skips.note(Match.UNICODE, image.name, text.name)
                elif stem != _first_dot(stem):
                    self._skips.note(Match.LAST_DOT, image.name, text.name)
                yield image, captions

    def _match(self) -> Iterator[_Matched[FileT]]:
        """Yield all stems, once each."""
        images = self._by_key(self._images.items(), _stem, SkipReason.SECOND_IMAGE)
        texts = self._by_key(self._spares.items(), _stem, SkipReason.SECOND_CAPTION)
        texts |= self._by_key(self._texts.items(), _stem, SkipReason.SECOND_CAPTION)
        for stem in images.keys() & texts.keys():
            yield _Matched(stem, images.pop(stem)[1], texts.pop(stem)[1], True)
        images = self._by_key(images.values(), _unicode_stem, SkipReason.SECOND_IMAGE)
        texts = self._by_key(texts.values(), _unicode_stem, SkipReason.SECOND_CAPTION)
        for key in images.keys() | texts.keys():
            path, image = images.get(key, ("", None))
            text_path, text = texts.get(key, ("", None))
            yield _Matched(_stem(path or text_path), image, text, False)

    def _by_key(
        self, files: Iterable[tuple[str, FileT]], key: Callable[[str], str], second: SkipReason
    ) -> dict[str, tuple[str, FileT]]:
        """Return one path and file for each key of their paths; others are counted as second."""
        found: dict[str, tuple[str, FileT]] = {}
        for one in files:
            other = found.setdefault(key(one[0]), one)
            if other is not one:
                kept, left = sorted((one, other), key=lambda each: _rank(each[0]))
                found[key(one[0])] = kept
                detail = f"{left[1].name}: {kept[1].name} is used; keep one of the two"
                self._skips.add(second, left[1].name, detail)
        return found


_ALONE_IMAGE = SkipReason.SECOND_IMAGE, SkipReason.IMAGE_WITHOUT_CAPTION
_ALONE_TEXT = SkipReason.SECOND_CAPTION, SkipReason.CAPTION_WITHOUT_IMAGE


def _why_alone(
    stem: str, pairs: Collection[str], second: SkipReason, without: SkipReason
) -> SkipReason:
    """Return why a file has no other half. pairs: keys of the pairs beside it."""
    if unicode_key(stem) in pairs:
        return second
    return SkipReason.FURTHER if unicode_key(_first_dot(stem)) in pairs else without


class _Matched(NamedTuple, Generic[FileT]):
    """What belongs to one stem. is_same: whether the names are equal as they are written."""

    stem: str
    image: FileT | None
    text: FileT | None
    is_same: bool


def unicode_key(name: str) -> str:
    """Return what equal names have in common: a Mac writes `é` as two characters (NFD)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _rank(path: str) -> tuple[bool, str]:
    """Return the place in the order of preference among files of one stem."""
    suffix = posixpath.splitext(path)[1]
    return suffix != suffix.lower(), path


def _unicode_stem(path: str) -> str:
    return unicode_key(_stem(path))


def _first_dot(stem: str) -> str:
    """Return a stem up to the first dot of its last part."""
    folder, base = posixpath.split(stem)
    return posixpath.join(folder, base.partition(".")[0])
