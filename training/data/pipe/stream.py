"""The FIFO of a channel in Pipe mode, read from front to back.

SageMaker makes `<channel>_0`, may take a moment to do so, and writes once somebody reads; end of
file is the end of the channel. Waiting for any of this looks after a stop and has an end.
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from dalle.errors import DataError
from training.stopping import Stop, Stopped

OPEN_SECONDS = 120.0  # until the FIFO is there
SILENCE_SECONDS = 900.0  # between two bytes: S3 may have to be asked again
POLL_SECONDS = 0.2
CHUNK_BYTES = 1 << 20
KEPT_BYTES = 1024  # of what was read: tarfile goes back by a block


class Stream(io.RawIOBase):
    """The bytes of a FIFO. `seek` goes forward, or back by at most `KEPT_BYTES`.

    name: of the channel and the FIFO, for messages.
    """

    def __init__(
        self,
        path: Path,
        channel: str,
        stop: Stop,
        *,
        open_seconds: float = OPEN_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        """Wait until the FIFO is there. Raises DataError, Stopped."""
        super().__init__()
        self.name = f"{channel}: {path.name}"
        self._stop = stop
        self._silence_seconds = silence_seconds
        self._buffer = bytearray()
        self._start = 0  # offset of the buffer's first byte in the stream
        self._position = 0  # of the next byte to give
        self._is_at_end = False
        self._descriptor: int | None = None
        self._descriptor = self._open(path, open_seconds)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def _open(self, path: Path, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while True:
            try:
                # Without waiting for a writer, which could not be stopped.
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                break
            except FileNotFoundError:
                self._wait(deadline, f"there is no {path} after {seconds:g} s; in Pipe mode it is")
        with suppress(OSError):  # where so much is not allowed, the usual 64 KiB do
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        return descriptor

    def _wait(self, deadline: float, late: str) -> None:
        if self._stop.is_set():
            raise Stopped
        if time.monotonic() >= deadline:
            raise DataError(f"{self.name}: {late} the platform's to make and to fill")
        time.sleep(POLL_SECONDS)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    @property
    def is_at_end(self) -> bool:
        """Whether the last byte has been given, as far as is known."""
        return self._is_at_end and self._position >= self._start + len(self._buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Raises ValueError for bytes that are gone; behind the end there is only the end."""
        if whence != io.SEEK_SET or offset < self._start:
            raise ValueError(f"{self.name}: byte {offset:,} has passed")
        while self._position < offset and self.read(min(CHUNK_BYTES, offset - self._position)):
            pass
        self._position = min(self._position, offset)
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, fewer only at the end. Raises DataError after a long silence; Stopped."""
        end = self._position + size
        while (size < 0 or self._start + len(self._buffer) < end) and self._fill():
            pass
        first = self._position - self._start
        data = bytes(self._buffer[first:] if size < 0 else self._buffer[first : first + size])
        self._position += len(data)
        gone = self._position - self._start - KEPT_BYTES
        if gone > CHUNK_BYTES:  # not at every read: what is kept must be moved
            del self._buffer[:gone]
            self._start += gone
        return data

    def _fill(self) -> bool:
        """Take in what comes next; False at the end."""
        deadline = time.monotonic() + self._silence_seconds
        while not self._is_at_end:
            if self._stop.is_set():
                raise Stopped
            events = self._poll.poll(int(1000 * POLL_SECONDS))
            if events:  # a hang-up too: only once somebody had it open for writing
                assert self._descriptor is not None
                chunk = os.read(self._descriptor, CHUNK_BYTES)
                self._buffer += chunk
                self._is_at_end = not chunk
                return bool(chunk)
            if time.monotonic() >= deadline:
                raise DataError(
                    f"{self.name}: nothing came for {self._silence_seconds:g} s, at byte "
                    f"{self._start + len(self._buffer):,}"
                )
        return False

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
