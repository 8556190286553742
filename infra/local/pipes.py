"""A channel in Pipe mode as SageMaker provides it: a FIFO for each epoch, one at a time.

Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

MAGIC = struct.pack("<I", 0xCED7230A)
POLL_SECONDS = 0.05
CHUNK_BYTES = 1 << 20

Content = Callable[[], Iterable[bytes]]
"""Returns an epoch's stream, piece by piece."""


class Pipe:
    """The FIFOs `<directory>_0`, `<directory>_1`, ... of a channel, until the end of `with`."""

    def __init__(self, directory: Path, content: Content) -> None:
        self._directory = directory
        self._content = content
        self._is_closed = threading.Event()
        self._feeder = threading.Thread(target=self._feed, daemon=True)

    def __enter__(self) -> Self:
        self._make(0)  # before the container starts, which mounts it
        self._feeder.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_closed.set()
        self._feeder.join(timeout=5)  # it may be blocked in a write; it is a daemon
        for path in self._directory.parent.glob(f"{self._directory.name}_*"):
            path.unlink()

    def _path(self, epoch: int) -> Path:
        return self._directory.with_name(f"{self._directory.name}_{epoch}")

    def _make(self, epoch: int) -> None:
        self._path(epoch).unlink(missing_ok=True)
        os.mkfifo(self._path(epoch))

    def _feed(self) -> None:
        epoch = 0
        while (descriptor := self._open(self._path(epoch))) is not None:
            with suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as file:
                for piece in self._content():
                    file.write(piece)
            epoch += 1
            self._make(epoch)

    def _open(self, path: Path) -> int | None:
        """Open the FIFO once it has a reader; return None when the pipe is closed before."""
        while not self._is_closed.wait(POLL_SECONDS):
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno == errno.ENXIO:  # it has no reader
                    continue
                raise
            os.set_blocking(descriptor, True)
            return descriptor
        return None


def stream_of(folder: Path, attributes: str) -> tuple[Content, str]:
    """Return a folder's stream and RecordWrapperType: of its one *.manifest, or of its files.

    attributes: of a manifest, separated by commas.
    """
    manifest = next(iter(sorted(folder.glob("*.manifest"))), None)
    if manifest is None:
        return partial(objects, folder), "None"
    return partial(augmented, manifest, attributes.split(",")), "RecordIO"


def objects(folder: Path) -> Iterator[bytes]:
    """Yield all files of a folder in the order of their names: S3Prefix in Pipe mode."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                yield piece


def augmented(manifest: Path, attributes: Sequence[str]) -> Iterator[bytes]:
    """Yield an AugmentedManifestFile in Pipe mode: a RecordIO record an attribute of each line.

    The value of an attribute whose name ends in `-ref` is a file beside the manifest (on the
    platform, an object in S3) and gives its content; others give text, or JSON.
    """
    for line in manifest.read_text("utf-8").splitlines():
        sample = json.loads(line)
        for name in attributes:
            value = sample[name]
            if name.endswith("-ref"):
                yield record((manifest.parent / value).read_bytes())
            else:
                yield record((value if isinstance(value, str) else json.dumps(value)).encode())


def record(data: bytes) -> bytes:
    """Return bytes in RecordIO's frame (dmlc-core, `recordio.h`).

    Bytes that contain the magic number at a multiple of four are split there.
    """
    cuts = [place for place in range(0, len(data) - 3, 4) if data[place : place + 4] == MAGIC]
    begins = [0, *(cut + len(MAGIC) for cut in cuts)]
    parts = [data[begin:end] for begin, end in zip(begins, [*cuts, len(data)], strict=True)]
    places = [1, *[2] * (len(parts) - 2), 3] if len(parts) > 1 else [0]
    return b"".join(
        MAGIC + struct.pack("<I", place << 29 | len(part)) + part + bytes(-len(part) % 4)
        for place, part in zip(places, parts, strict=True)
    )
