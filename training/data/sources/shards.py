"""WebDataset tar shards: pairs as members of tar files, `0017.jpg` after or before `0017.txt`.

The `webdataset` library reads shards from front to back and shuffles within a buffer, so that a
step's pairs depend on what was read before. Training here needs any pair at any step (see
`training.data.batching.sampler`), to resume with exactly the batches that would have come. So the
headers of every shard are read once, when the channel is opened, and images later by their offset.
The index lives in memory: channels are read-only. Which members make up a pair follows the
library's convention, see `training.data.sources.tar`.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from dalle.platform.tar import TAR_ERRORS
from training.data.skips import SkipReason, Skips
from training.data.sources.captions import Captions
from training.data.sources.files import File
from training.data.sources.index import Reader
from training.data.sources.tar import TarIndex, TarMember
from training.stopping import Stop

SHARD_SUFFIX = ".tar"
MAX_OPEN_SHARDS = 64
STREAM_BYTES = 4 << 20  # buffer of a streamed shard, where reading on is cheap and seeking is not


class ShardReader(Reader[TarMember]):
    """The pairs in the shards among a channel's files, by shard and key."""

    def __init__(
        self,
        root: Path,
        files: Iterable[File],
        *,
        caption_key: str | None = None,
        is_streamed: bool = False,
    ) -> None:
        """caption_key: key of the captions in JSON members; without one, text members are used
            first and JSON's `caption` second.
        is_streamed: whether the channel is a mount that fetches what is read (FastFile), where it
            is quicker to read a shard from front to back: `groups` then says so to the sampler.
        """
        files = list(files)
        self._shards = sorted(
            (file for file in files if file.suffix == SHARD_SUFFIX), key=lambda file: file.name
        )
        self._others = [file for file in files if file.suffix != SHARD_SUFFIX]
        self._root = root
        self._caption_key = caption_key
        self._is_streamed = is_streamed
        self._open = lru_cache(MAX_OPEN_SHARDS)(Descriptor)
        self.layout = f"{len(self._shards):,} tar shards"

    def pairs(self, skips: Skips, stop: Stop) -> Iterator[tuple[TarMember, Captions]]:
        for file in self._others:
            skips.add(SkipReason.IGNORED, file.name)
        damaged: list[tuple[File, int, str]] = []
        num_in_sound_shards = 0
        # A bar only on a terminal, and only where there is something to wait for.
        bar = tqdm(
            self._shards,
            f"indexing {skips.channel}",
            unit="shards",
            disable=None,
            delay=0.5,
            leave=False,
        )
        for number, file in enumerate(bar):
            index = TarIndex(number, f"{file.name}/", self._caption_key, skips)
            damage = self._index(index, self._root / file.name, stop)
            pairs = list(index.pairs())
            yield from pairs
            if damage is None:
                num_in_sound_shards += len(pairs)
            else:
                damaged.append((file, len(pairs), damage))
        num_sound = len(self._shards) - len(damaged)
        for file, num_read, damage in damaged:
            # How many were lost is estimated: as many as sound shards have on average.
            lost = max(1, (num_in_sound_shards // num_sound if num_sound else 0) - num_read)
            detail = (
                f"{file.name}: {damage}; {num_read:,} pairs before that are used; copy it again"
            )
            skips.add(SkipReason.DAMAGED_SHARD, file.name, detail, count=lost)

    def read(self, image: TarMember) -> bytes:
        file = self._open(self._root / self._shards[image.shard].name)
        return file.read(image.num_bytes, image.offset)

    def groups(self, images: Sequence[TarMember]) -> tuple[int, ...] | None:
        """Return the number of pairs of each shard where shards are fetched while they are read."""
        if not self._is_streamed:
            return None
        counts = Counter(member.shard for member in images)
        return tuple(counts[shard] for shard in sorted(counts))

    def _index(self, index: TarIndex, path: Path, stop: Stop) -> str | None:
        """Read a shard's headers; return what is wrong with it, if anything."""
        try:
            with path.open("rb", buffering=STREAM_BYTES if self._is_streamed else -1) as file:
                damage = index.read(file, stop)
                while damage is None and (rest := file.read(1 << 16)):
                    if rest.strip(b"\0"):
                        damage = (
                            "goes on after its end mark; shards that were joined cannot be read: "
                            "split them"
                        )
                return damage
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        except TAR_ERRORS as error:
            return f"damaged ({error})"


class Descriptor:
    """An open file, closed when nothing refers to it. Threads and forked processes may share it."""

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, num_bytes: int, offset: int) -> bytes:
        """Read from the middle of the file. Raises OSError when there are fewer bytes."""
        data = os.pread(self._number, num_bytes, offset)
        if len(data) < num_bytes:
            raise OSError(errno.EIO, "the file has become shorter")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)
