"""WebDataset tar shards: pairs as members of tar files, `0017.jpg` after or before `0017.txt`.

The `webdataset` library reads shards from front to back and shuffles what a buffer holds, so that
what a step sees depends on what was read before it. Training here asks for any pair of any step
(see `order`), to go on after an interruption with exactly the batches that would have come. So the
headers of every shard are read once, when the channel is opened, and images later by their place
in the file. That index lives in memory: channels are read-only. The convention is the library's:
the key of a member ends at the first dot of its file name, and what follows says what it holds.

Nothing is unpacked, so that no member's name can reach a file outside.
"""

from __future__ import annotations

import errno
import os
import posixpath
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from training.data.captions import (
    DEFAULT_CAPTION_KEY,
    MAX_CAPTION_BYTES,
    Captions,
    captions_of_json,
    captions_of_text,
)
from training.data.files import File
from training.data.pairs import SkipReason, Skips
from training.data.stored import (
    IMAGE_SUFFIXES,
    StoredPairs,
    add_image,
    pair_up,
    require_enough,
)
from training.stopping import NEVER, Stop, unless_stopped

SHARD_SUFFIX = ".tar"
MAX_OPEN_SHARDS = 64
STREAM_BYTES = 4 << 20  # read at once where reading on is cheap and reading elsewhere is not


@dataclass(frozen=True, slots=True)
class Member(File):
    """A file within a shard. name: `shard.tar/path`. shard: its number. offset: of its bytes."""

    shard: int
    offset: int


class Shards(StoredPairs):
    """The pairs of tar shards, by shard and key; a `Dataset`. Made by `shards_of`."""

    def __init__(
        self,
        paths: Sequence[Path],
        images: Sequence[Member],
        captions: Sequence[Captions],
        *,
        skips: Skips,
        image_size: int,
        max_bad_share: float,
        is_streamed: bool,
    ) -> None:
        super().__init__(
            images, captions, skips=skips, image_size=image_size, max_bad_share=max_bad_share
        )
        self._members = images
        self._is_streamed = is_streamed
        self._files = _OpenFiles(paths)
        self._num_shards = len(paths)

    @property
    def layout(self) -> str:
        return f"{self._num_shards:,} tar shards"

    @property
    def groups(self) -> tuple[int, ...] | None:
        """The pairs of each shard, where shards are fetched while they are read."""
        if not self._is_streamed:
            return None
        counts = Counter(member.shard for member in self._members)
        return tuple(counts[shard] for shard in sorted(counts))

    def read(self, index: int) -> bytes:
        member = self._members[index]
        file = self._files.of(member.shard)
        data = os.pread(file.number, member.num_bytes, member.offset)
        if len(data) < member.num_bytes:
            raise OSError(errno.EIO, "the shard has become shorter")
        return data


def shards_of(
    root: Path,
    files: Iterable[File],
    skips: Skips,
    image_size: int,
    max_bad_share: float,
    *,
    caption_key: str | None = None,
    is_streamed: bool = False,
    stop: Stop = NEVER,
) -> Shards:
    """Find the pairs in the shards among these files, which are those of the channel.

    caption_key: where JSON members have the captions; without one, text members go first and
        JSON's `caption` second. is_streamed: whether the channel is a mount that fetches what is
        read (FastFile), so that it is quicker to read a shard from front to back than to jump in
        it: `groups` then tells the order of training to do that.
    Raises `DataError` when there is no pair, or when too many are unusable; Stopped.
    """
    shards = []
    for file in files:
        if file.suffix == SHARD_SUFFIX:
            shards.append(file)
        else:
            skips.add(SkipReason.IGNORED, file.name)
    images: list[Member] = []
    captions: list[Captions] = []
    damaged: list[tuple[File, int, str]] = []
    num_whole = 0  # pairs of the sound shards
    shards.sort(key=lambda file: file.name)
    # A bar only on a terminal, and only where there is something to wait for.
    bar = tqdm(
        shards, f"indexing {skips.channel}", unit="shards", disable=None, delay=0.5, leave=False
    )
    for number, file in enumerate(bar):
        index = _Index(number, file.name, caption_key, skips)
        damage = index.read(root / file.name, is_streamed, stop)
        before = len(images)
        for image, lines in index.pairs():
            images.append(image)
            captions.append(lines)
        if damage is None:
            num_whole += len(images) - before
        else:
            damaged.append((file, len(images) - before, damage))
    num_sound = len(shards) - len(damaged)
    for file, num_read, damage in damaged:
        # What is lost can only be guessed: as many pairs as the other shards have, on average.
        lost = max(1, (num_whole // num_sound if num_sound else 0) - num_read)
        detail = f"{file.name}: {damage}; {num_read:,} pairs before that are used; copy it again"
        skips.add(SkipReason.DAMAGED_SHARD, file.name, detail, count=lost)
    require_enough(captions, root, skips, max_bad_share)
    return Shards(
        [root / file.name for file in shards],
        images,
        captions,
        skips=skips,
        image_size=image_size,
        max_bad_share=max_bad_share,
        is_streamed=is_streamed,
    )


class _Index:
    """The members of one shard that may make up pairs, by key."""

    def __init__(self, number: int, name: str, caption_key: str | None, skips: Skips) -> None:
        self._number = number
        self._name = name
        self._caption_key = caption_key
        self._skips = skips
        self._images: dict[str, Member] = {}
        self._texts: dict[str, Member] = {}
        self._jsons: dict[str, Member] = {}
        self._contents: dict[str, bytes] = {}

    def read(self, path: Path, is_streamed: bool, stop: Stop) -> str | None:
        """Go through the headers; returns what is wrong with it, if anything."""
        try:
            with (
                path.open("rb", buffering=STREAM_BYTES if is_streamed else -1) as file,
                tarfile.open(fileobj=file, mode="r:") as archive,
            ):
                for info in unless_stopped(_members(archive), stop):
                    self._add(info, file)
                return _wrong_end(file, archive.offset)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        # Besides its own errors, tarfile raises what its parsers stumble on.
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            return f"damaged ({error})"

    def pairs(self) -> Iterator[tuple[Member, Captions]]:
        texts = self._jsons if self._caption_key else {**self._jsons, **self._texts}
        key = self._caption_key or DEFAULT_CAPTION_KEY

        def parse(text: Member) -> Captions:
            data = self._contents[text.name]
            if text.suffix == ".json":
                return captions_of_json(data, key, text.name, self._skips)
            return captions_of_text(data, text.name, self._skips)

        yield from pair_up(self._images, texts, parse, self._skips)

    def _add(self, info: tarfile.TarInfo, file: BinaryIO) -> None:
        name = f"{self._name}/{info.name}"
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
        member = Member(name, info.size, self._number, info.offset_data)
        if suffix in IMAGE_SUFFIXES:
            add_image(self._images, key, member, self._skips)
        elif suffix in (".txt", ".json"):
            (self._texts if suffix == ".txt" else self._jsons)[key] = member
            if info.size <= MAX_CAPTION_BYTES:
                file.seek(info.offset_data)
                self._contents[name] = file.read(info.size)
                if len(self._contents[name]) < info.size:
                    raise EOFError(f"{info.name} is cut off")
        else:
            self._skips.add(SkipReason.IGNORED, name)


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined] # or it would keep every one
        yield info


def _wrong_end(file: BinaryIO, offset: int) -> str | None:
    """What is wrong with what follows the last header that tarfile could read.

    It takes anything that is no header for the end; a sound end is zeros and nothing else.
    """
    file.seek(offset)
    if not (first := file.read(tarfile.BLOCKSIZE)):
        return f"ends at byte {offset:,} without an end mark: it was cut off"
    if first.strip(b"\0"):
        return f"damaged at byte {offset:,}: no member begins there"
    while rest := file.read(1 << 16):
        if rest.strip(b"\0"):
            return "goes on behind its end mark; shards that were joined cannot be read: part them"
    return None


class _Descriptor:
    """An open file. It is closed when the last who reads from it has done."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _OpenFiles:
    """The files read from of late, open. Several threads, and forked processes, may use one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, number: int) -> _Descriptor:
        with self._lock:
            file = self._open.pop(number, None)
            if file is None:
                file = _Descriptor(os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC))
            self._open[number] = file
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return file
