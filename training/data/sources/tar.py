"""The members of a tar file as pairs: what WebDataset's convention makes of their names.

The key of a member ends at the first dot of its file name, and what follows says what it holds.
Nothing is unpacked, so that no member's name can reach a file outside.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from training.data.pairs import SkipReason, Skips
from training.data.sources.captions import (
    DEFAULT_CAPTION_KEY,
    MAX_CAPTION_BYTES,
    Captions,
    captions_of_json,
    captions_of_text,
)
from training.data.sources.files import File
from training.data.sources.index import IMAGE_SUFFIXES, add_image, pair_up
from training.stopping import Stop, unless_stopped

# Besides its own errors, tarfile raises what its parsers stumble on.
DAMAGES = (tarfile.TarError, ValueError, OverflowError, EOFError)

Keep = Callable[[tarfile.TarInfo, IO[bytes]], int]
"""An image member, and the file in which its bytes are next -> where they can be read later."""


@dataclass(frozen=True, slots=True)
class Member(File):
    """A file within a shard. name: `shard.tar/path`. shard: its number. offset: of its bytes."""

    shard: int
    offset: int


class PairIndex:
    """The members of one tar file that may make up pairs, by key."""

    def __init__(
        self,
        number: int,
        prefix: str,
        caption_key: str | None,
        skips: Skips,
        keep: Keep = lambda info, file: info.offset_data,
    ) -> None:
        """prefix: of the members' names. caption_key: see `shards_of`."""
        self._number = number
        self._prefix = prefix
        self._caption_key = caption_key
        self._skips = skips
        self._keep = keep
        self._images: dict[str, Member] = {}
        self._texts: dict[str, Member] = {}
        self._jsons: dict[str, Member] = {}
        self._contents: dict[str, bytes] = {}

    def read(self, file: IO[bytes], stop: Stop) -> str | None:
        """Go through the headers, from where the file stands; returns what is wrong, if anything.

        The file then stands behind its end mark, or where it is damaged. Raises OSError, and
        `DAMAGES`.
        """
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in unless_stopped(_members(archive), stop):
                self._add(info, file)
            return _wrong_end(file, archive.offset)

    def pairs(self) -> Iterator[tuple[Member, Captions]]:
        texts = self._jsons if self._caption_key else {**self._jsons, **self._texts}
        key = self._caption_key or DEFAULT_CAPTION_KEY

        def parse(text: Member) -> Captions:
            data = self._contents[text.name]
            if text.suffix == ".json":
                return captions_of_json(data, key, text.name, self._skips)
            return captions_of_text(data, text.name, self._skips)

        yield from pair_up(self._images, texts, parse, self._skips)

    def _add(self, info: tarfile.TarInfo, file: IO[bytes]) -> None:
        name = f"{self._prefix}{info.name}"
        folder, base = posixpath.split(info.name)
        if info.isdir() or base.startswith("."):
            self._skips.add(SkipReason.IGNORED, name)
            return
        if info.name.startswith("/") or ".." in info.name.split("/"):
            self._skips.add(SkipReason.OUTSIDE_NAME, name)
            return
        if not info.isreg() or info.issparse():
            self._skips.add(SkipReason.NOT_A_FILE, name)
            return
        base, _, suffix = base.partition(".")
        key, suffix = posixpath.join(folder, base), f".{suffix.lower()}"
        if suffix in IMAGE_SUFFIXES:
            place = self._keep(info, file)
            add_image(self._images, key, Member(name, info.size, self._number, place), self._skips)
        elif suffix in (".txt", ".json"):
            member = Member(name, info.size, self._number, info.offset_data)
            (self._texts if suffix == ".txt" else self._jsons)[key] = member
            if info.size <= MAX_CAPTION_BYTES:
                self._contents[name] = content_of(info, file)
        else:
            self._skips.add(SkipReason.IGNORED, name)


def content_of(info: tarfile.TarInfo, file: IO[bytes]) -> bytes:
    """A member's bytes. Raises EOFError when the file ends before."""
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) < info.size:
        raise EOFError(f"{info.name} is cut off")
    return data


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined] # or it would keep every one
        yield info


def _wrong_end(file: IO[bytes], offset: int) -> str | None:
    """What is wrong with what follows the last header that tarfile could read.

    It takes anything that is no header for the end; a sound end begins with zeros. Raises EOFError.
    """
    file.seek(offset)
    if not (first := file.read(tarfile.BLOCKSIZE)):
        return f"ends at byte {offset:,} without an end mark: it was cut off"
    if len(first) < tarfile.BLOCKSIZE:
        raise EOFError(f"it is cut off in the header at byte {offset:,}")
    if first.strip(b"\0"):
        file.seek(offset)
        return f"damaged at byte {offset:,}: no member begins there"
    return None
