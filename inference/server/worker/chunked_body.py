"""Body of a request in chunks, as it arrives."""

from __future__ import annotations

from enum import Enum, auto

from dalle.errors import UserError
from inference.server.worker.connection import RequestBody

_LINE_BYTES = 4_096  # of a chunk's size with its extensions
_TRAILER_BYTES = 16_384  # of all lines behind the last chunk
_FREE_CHUNKS = 65_536  # that may be small; further ones have at least _CHUNK_BYTES on average
_CHUNK_BYTES = 16
_HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")
_MOST_DIGITS = 16  # of a chunk's size
_CODE = "malformed_body"


class _Part(Enum):
    """What a chunked body continues with."""

    SIZE = auto()
    DATA = auto()
    BREAK = auto()  # the line break behind a chunk's data
    TRAILER = auto()


class ChunkedBody(RequestBody):
    """Body in chunks. Extensions of chunks and the fields behind the last one are discarded."""

    def __init__(self, limit: int) -> None:
        super().__init__(1, limit)
        self._unread = b""  # the beginning of a line
        self._part = _Part.SIZE
        self._chunks = 0
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Take what was received; return what lies behind the end of the body."""
        data = self._unread + data
        self._unread = b""
        at = 0
        while at < len(data) and not self.is_complete:
            if self._part is _Part.DATA:
                mine = data[at : at + self._missing]
                at += len(mine)
                self._missing -= len(mine)
                self._keep(mine)
                if not self._missing:
                    self._part = _Part.BREAK
                continue
            end = data.find(b"\n", at)
            if end < 0:
                self._unread = data[at:]
                if len(self._unread) > _LINE_BYTES:
                    self._refuse("a line is too long")
                return b""
            line, at = data[at : end + 1], end + 1
            if not line.endswith(b"\r\n") or b"\r" in line[:-2] or len(line) > _LINE_BYTES:
                self._refuse("a line has no proper end")
            else:
                self._take_line(line[:-2])
        return data[at:]

    def end(self) -> None:
        """The client has closed its half: nothing more will come."""
        if not self.is_complete:
            self.fail(UserError("the body ended in the middle of its chunks", code=_CODE))

    def _take_line(self, line: bytes) -> None:
        if self._part is _Part.BREAK:
            if line:
                self._refuse("a chunk is longer than its size")
            self._part = _Part.SIZE
        elif self._part is _Part.TRAILER:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _TRAILER_BYTES:
                self._refuse("the fields behind them are too long")
            elif line and line.find(b":") <= 0:
                self._refuse("a field behind them has no name")
            self._is_whole = not line
        else:
            self._begin_chunk(line)

    def _begin_chunk(self, line: bytes) -> None:
        digits, mark, _ = line.partition(b";")
        digits = digits.rstrip(b" \t") if mark else digits
        if not 0 < len(digits) <= _MOST_DIGITS or not _HEX_DIGITS.issuperset(digits):
            self._refuse("a size is not a hexadecimal number")
            return
        self._missing = int(digits, 16)
        self._part = _Part.DATA if self._missing else _Part.TRAILER
        self._chunks += 1
        if self._chunks > _FREE_CHUNKS + self.size // _CHUNK_BYTES:
            self._refuse("they are too small")

    def _refuse(self, why: str) -> None:
        self.fail(UserError(f"the body is malformed, its chunks cannot be read: {why}", code=_CODE))
