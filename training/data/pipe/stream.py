"""The FIFO of a channel in Pipe mode, read from front to back.

SageMaker creates `<channel>_0`, possibly after the job has begun, and writes once the FIFO is open
for reading; end of file is the end of the channel. All waiting has a time limit and ends at a stop.
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import time
from contextlib import suppress
from pathlib import Path

from dalle.errors import DataError
from training.stopping import Stop, Stopped

OPEN_SECONDS = 120.0  # until the FIFO exists
SILENCE_SECONDS = 900.0  # between two bytes: the platform may have to retry S3
POLL_SECONDS = 0.2
CHUNK_BYTES = 1 << 20
KEPT_BYTES = 1024  # kept of what was read: tarfile seeks back by a block


class Stream(io.RawIOBase):
    """The bytes of a FIFO. `seek` goes forward, or back by at most `KEPT_BYTES`.

    name: channel and FIFO, for messages.
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
        """Wait until the FIFO exists. Raises DataError, Stopped."""
        super().__init__()
        self.name = f"{channel}: {path.name}"
        self._stop = stop
        self._silence_seconds = silence_seconds
        self._buffer = bytearray()
        self._start = 0  # offset of the buffer's first byte in the stream
        self._position = 0  # of the next byte to return
        self._is_at_end = False
        self._descriptor: int | None = None
        self._descriptor = self._open(path, open_seconds)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def _open(self, path: Path, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        while True:
            try:
                # Waiting for a writer could not be interrupted.
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                break
            except FileNotFoundError:
                if self._stop.is_set():
                    raise Stopped from None
                if time.monotonic() >= deadline:
                    raise DataError(
                        f"{self.name}: there is no {path} after {seconds:g} s; in Pipe mode the "
                        "platform creates and fills it"
                    ) from None
                time.sleep(POLL_SECONDS)
        with suppress(OSError):  # above the allowed size the default of 64 KiB stays
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        return descriptor

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    @property
    def is_at_end(self) -> bool:
        """Whether the last byte has been returned, as far as is known."""
        return self._is_at_end and self._position >= self._start + len(self._buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, or to the end if that comes first. Raises ValueError for dropped bytes."""
        if whence != io.SEEK_SET or offset < self._start:
            raise ValueError(f"{self.name}: byte {offset:,} has passed")
        while self._position < offset and self.read(min(CHUNK_BYTES, offset - self._position)):
            pass
        self._position = min(self._position, offset)
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        """Return `size` bytes, fewer only at the end. Raises DataError when none come; Stopped."""
        end = self._position + size
        while (size < 0 or self._start + len(self._buffer) < end) and self._fill():
            pass
        first = self._position - self._start
        data = bytes(self._buffer[first:] if size < 0 else self._buffer[first : first + size])
        self._position += len(data)
        passed = self._position - self._start - KEPT_BYTES
        if passed > CHUNK_BYTES:  # not at every read: the rest of the buffer is moved
            del self._buffer[:passed]
            self._start += passed
        return data

    def _fill(self) -> bool:
        """Read the next chunk into the buffer; return False at the end."""
        deadline = time.monotonic() + self._silence_seconds
        while not self._is_at_end:
            if self._stop.is_set():
                raise Stopped
            events = self._poll.poll(int(1000 * POLL_SECONDS))
            if events:  # or a hang-up, which comes only after a writer had it open
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
