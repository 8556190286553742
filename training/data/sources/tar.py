"""The members of a tar file as pairs, by the rule for files of a folder.

See `training.data.sources.index.PairsByName`; hidden folders and files are ignored as there.
Nothing is unpacked, so that no member's name can reach a file outside.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from dalle.platform.tar import BoundedTarInfo
from training.data.skips import SkipReason, Skips
from training.data.sources.captions import (
    DEFAULT_CAPTION_KEY,
    MAX_CAPTION_BYTES,
    Captions,
    captions_of_json,
    captions_of_text,
)
from training.data.sources.files import File, is_hidden
from training.data.sources.index import IMAGE_SUFFIXES, PairsByName
from training.stopping import Stop, unless_stopped

StoreImage = Callable[[tarfile.TarInfo, IO[bytes]], int]
"""An image member, and the file that is at its bytes -> the offset to read them from later."""


@dataclass(frozen=True, slots=True)
class TarMember(File):
    """A file within a shard. name: `shard.tar/path`. shard: its number. offset: of its bytes."""

    shard: int
    offset: int


class TarIndex:
    """The members of one tar file that may make up pairs."""

    def __init__(
        self,
        number: int,
        prefix: str,
        caption_key: str | None,
        skips: Skips,
        store: StoreImage = lambda info, file: info.offset_data,
    ) -> None:
        """number, prefix: of the shard and its members' names. caption_key: see `ShardReader`."""
        self._number = number
        self._prefix = prefix
        self._caption_key = caption_key
        self._skips = skips
        self._store = store
        self._names = PairsByName[TarMember](skips)
        self._contents: dict[int, bytes] = {}  # of caption files, by offset

    def read(self, file: IO[bytes], stop: Stop) -> str | None:
        """Read the headers, from the file's position on; return what is wrong, if anything.

        The file is then behind the end mark, or where it is damaged. Raises OSError, `TAR_ERRORS`,
        Stopped.
        """
        with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as archive:
            for info in unless_stopped(_members(archive), stop):
                self._add(info, file)
            return _end_fault(file, archive.offset)

    def pairs(self) -> Iterator[tuple[TarMember, Captions]]:
        """Pair the members that were read, sorted by name without suffix."""
        key = self._caption_key or DEFAULT_CAPTION_KEY

        def parse(text: TarMember) -> Captions:
            data = self._contents[text.offset]
            if text.suffix == ".json":
                return captions_of_json(data, key, text.name, self._skips)
            return captions_of_text(data, text.name, self._skips)

        yield from self._names.pairs(parse)

    def _add(self, info: tarfile.TarInfo, file: IO[bytes]) -> None:
        name = f"{self._prefix}{info.name}"
        parts = info.name.split("/")
        if info.isdir():
            self._skips.add(SkipReason.IGNORED, name)
            return
        if info.name.startswith("/") or ".." in parts:
            self._skips.add(SkipReason.OUTSIDE_NAME, name)
            return
        if is_hidden(info.name):
            self._skips.add(SkipReason.IGNORED, name)
            return
        if not info.isreg() or info.issparse():
            self._skips.add(SkipReason.NOT_A_FILE, name)
            return
        path = posixpath.normpath(info.name)
        suffix = posixpath.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            image = TarMember(name, info.size, self._number, self._store(info, file))
            self._names.add_image(path, image)
        elif suffix == ".json" or (suffix == ".txt" and not self._caption_key):
            text = TarMember(name, info.size, self._number, info.offset_data)
            self._names.add_text(path, text, is_spare=suffix == ".json")
            if info.size <= MAX_CAPTION_BYTES:
                self._contents[info.offset_data] = read_member(info, file)
        else:
            self._skips.add(SkipReason.IGNORED, name)


def read_member(info: tarfile.TarInfo, file: IO[bytes]) -> bytes:
    """Return a member's bytes. Raises EOFError when the file ends before them."""
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) < info.size:
        raise EOFError(f"{info.name} is cut off")
    return data


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined] # or it would keep every one
        yield info


def _end_fault(file: IO[bytes], offset: int) -> str | None:
    """Return what is wrong with the bytes after the last header that tarfile could read.

    tarfile takes anything that is not a header for the end; a sound end begins with zeros. Raises
    EOFError.
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
