"""WebDataset tar shards: pairs as members of tar files, `0017.jpg` after or before `0017.txt`.

The `webdataset` library reads shards from front to back and shuffles what a buffer holds, so that
what a step sees depends on what was read before it. Training here asks for any pair of any step
(see `order`), to go on after an interruption with exactly the batches that would have come. So the
headers of every shard are read once, when the channel is opened, and images later by their place
in the file. That index lives in memory: channels are read-only. Which members make up a pair is the
library's convention, see `tar`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from training.data.pairs import SkipReason, Skips
from training.data.sources.captions import Captions
from training.data.sources.files import File
from training.data.sources.index import StoredPairs, require_enough
from training.data.sources.tar import DAMAGES, Member, PairIndex
from training.stopping import NEVER, Stop

SHARD_SUFFIX = ".tar"
MAX_OPEN_SHARDS = 64
STREAM_BYTES = 4 << 20  # read at once where reading on is cheap and reading elsewhere is not


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
        self._files = OpenFiles(paths)
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
        return read_at(file.number, member.num_bytes, member.offset)


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
        index = PairIndex(number, f"{file.name}/", caption_key, skips)
        damage = _index(index, root / file.name, is_streamed, stop)
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


def _index(index: PairIndex, path: Path, is_streamed: bool, stop: Stop) -> str | None:
    """Go through a shard's headers; returns what is wrong with it, if anything."""
    try:
        with path.open("rb", buffering=STREAM_BYTES if is_streamed else -1) as file:
            damage = index.read(file, stop)
            while damage is None and (rest := file.read(1 << 16)):
                if rest.strip(b"\0"):
                    damage = (
                        "goes on behind its end mark; shards that were joined cannot be read: "
                        "part them"
                    )
            return damage
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except DAMAGES as error:
        return f"damaged ({error})"


def read_at(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """Bytes from the middle of an open file. Raises OSError when there are fewer."""
    data = os.pread(descriptor, num_bytes, offset)
    if len(data) < num_bytes:
        raise OSError(errno.EIO, "the file has become shorter")
    return data


class Descriptor:
    """An open file. It is closed when the last who reads from it has done."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class OpenFiles:
    """The files read from of late, open. Several threads, and forked processes, may use one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, number: int) -> Descriptor:
        with self._lock:
            file = self._open.pop(number, None)
            if file is None:
                file = Descriptor(os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC))
            self._open[number] = file
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return file
