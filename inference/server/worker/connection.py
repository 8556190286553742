"""One client's connection: what has been received, the request that it holds, and its reply.

The main loop receives without waiting; a thread has the connection to itself while it answers, and
reads the body once it `is_complete`. A body that is read sooner raises `BodyPending`, and its
request is run again when the body has arrived.
"""

from __future__ import annotations

import math
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gunicorn.http import errors
from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.http.parser import RequestParser

RECEIVE_BYTES = 65_536
_HEADER_BYTES = 65_536
_HEADER_END = b"\r\n\r\n"
_SEND_SECONDS = 60.0  # for one write of a reply
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class BodyPending(BaseException):
    """The body that is read has not arrived."""


class RequestBody:
    """Body of known length, and WSGI's `wsgi.input`.

    limit: in bytes; of a longer body no more than `limit + 1` bytes are kept, which is enough to
    know that it is too long.
    """

    def __init__(self, length: int, limit: int) -> None:
        self._missing = length
        self._limit = limit
        self._received = bytearray()
        self._position = 0  # of the reader
        self._is_whole = length == 0
        self._is_cut = False  # it ended too early, is too long, or `_error` says why
        self._error: Exception | None = None

    @property
    def size(self) -> int:
        """Number of bytes in memory."""
        return len(self._received)

    @property
    def is_complete(self) -> bool:
        """Whether no more is to be received: the body is whole, or cannot be had."""
        return self._is_whole or self._is_cut

    @property
    def is_read(self) -> bool:
        """Whether the body was read to its end, so that another request may follow it."""
        return self._is_whole and self._position == len(self._received)

    def feed(self, data: bytes) -> bytes:
        """Take what was received; return what lies behind the end of the body."""
        if self.is_complete:
            return data
        mine, rest = data[: self._missing], data[self._missing :]
        self._missing -= len(mine)
        self._keep(mine)
        self._is_whole = not self._missing and not self._is_cut
        return rest

    def end(self) -> None:
        """The client has closed its half: nothing more will come."""
        self._is_cut = self._is_cut or not self._is_whole

    def fail(self, error: Exception) -> None:
        """Give the body up; reading it raises the error."""
        if not self.is_complete:
            self._error = error
            self._is_cut = True
            self._received.clear()

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, or all; nothing at the end. A part is returned once.

        Raises `BodyPending` before the body is complete, and the error that it was given up for.
        """
        if self._error is not None:
            raise self._error
        if not self.is_complete:
            raise BodyPending
        end = len(self._received) if size < 0 else self._position + size
        with memoryview(self._received) as view:
            part = bytes(view[self._position : end])
        self._position += len(part)
        if self._position >= len(self._received):  # all of it is elsewhere now
            self._received.clear()
            self._position = 0
        return part

    def _keep(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > self._limit:
            del self._received[self._limit + 1 :]
            self._is_cut = True


class Connection(socket.socket):
    """Socket of a client, which gunicorn writes the reply to.

    client, server: addresses, as gunicorn names them.
    request: gunicorn's, from the time when its header has been read until it is answered.
    arrival: when its header was whole, on `time.monotonic()`'s scale.
    group: the connections that wait for the same thing; None while a thread has it. With `deadline`
    and `body_deadline`, this is the main loop's.
    """

    def __init__(self, accepted: socket.socket, client: Any) -> None:
        super().__init__(fileno=accepted.detach())
        self.setblocking(False)
        self.client = client
        self.server = self.getsockname()
        self.request: Any = None
        self.body: RequestBody | None = None
        self.arrival = 0.0
        self.group: dict[Connection, None] | None = None
        self.deadline = self.body_deadline = math.inf
        self.has_answered = False
        self._received = bytearray()  # behind what belongs to `body`
        self._searched = 0  # of it, without finding the header's end
        self._has_ended = False  # the client has closed its half
        self._is_waited_for = False  # by a client that sends the body when it is told to
        self._sent_ahead = b""
        self._has_begun = False  # the reply
        self._is_chunked = False

    @property
    def sock(self) -> Connection:
        """The socket, by the name that gunicorn has for it."""
        return self

    @property
    def has_part(self) -> bool:
        """Whether a part of a header has arrived."""
        return bool(self._received)

    @property
    def has_whole_header(self) -> bool:
        """Whether a header has arrived to its end, or is too long."""
        start = max(0, self._searched - len(_HEADER_END) + 1)
        if self._received.find(_HEADER_END, start) >= 0:
            return True
        self._searched = len(self._received)
        return self._searched > _HEADER_BYTES

    @property
    def can_send(self) -> bool:
        """Whether a small reply can be sent without waiting for the client to read others."""
        poller = select.poll()
        poller.register(self, select.POLLOUT)
        return bool(poller.poll(0))

    @property
    def is_ready(self) -> bool:
        """Whether a thread has something to do."""
        return self.has_whole_header if self.body is None else self.body.is_complete

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come, and nothing that came is left to be answered."""
        return self._has_ended and not self.is_ready

    def receive(self) -> None:
        """Receive what has arrived, without waiting. Raises `OSError` where the client is lost."""
        try:
            data = self.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not data:
            self._has_ended = True
            if self.body is not None:
                self.body.end()
        elif self.body is None:
            self._received += data
        else:
            self._received += self.body.feed(data)

    def read_header(
        self, settings: Any, max_body_bytes: int, new_chunked: Callable[[int], RequestBody]
    ) -> None:
        """Read the header of the next request, and what has arrived of its body.

        settings: gunicorn's; new_chunked: returns a body in chunks.
        Raises gunicorn's errors of headers that cannot be read.
        """
        end = self._received.find(_HEADER_END) + len(_HEADER_END)
        if end < len(_HEADER_END):
            if b"\r\n" not in self._received:
                raise errors.LimitRequestLine(len(self._received), settings.limit_request_line)
            raise errors.LimitRequestHeaders(f"it is longer than {_HEADER_BYTES:,} bytes")
        self.arrival = time.monotonic()
        request = next(RequestParser(settings, iter([bytes(self._received[:end])]), self.client))
        match request.body.reader:
            case ChunkedReader():
                body = new_chunked(max_body_bytes)
            case LengthReader(length=length):
                body = RequestBody(length, max_body_bytes)
        self._received = bytearray(body.feed(bytes(self._received[end:])))
        if self._has_ended:
            body.end()
        self._searched = 0
        self.request, self.body = request, body
        request.body = body
        self._is_waited_for = request._expected_100_continue
        request._expected_100_continue = False  # gunicorn would answer it before any check
        # gunicorn calls this when it writes the reply's header, and again before it reads on. Of a
        # body that was not read to its end, parts can still be on the socket.
        must_close = request.should_close
        request.should_close = lambda: must_close() or not body.is_read

    def ask_for_body(self) -> None:
        """Tell a client that waits for it (`Expect: 100-continue`) to send the body."""
        if self._is_waited_for:
            self._is_waited_for = False
            super().sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def finish_request(self) -> None:
        """Forget the request that was answered; the next one may come."""
        self.request = self.body = None
        self.has_answered = True
        self._has_begun = self._is_chunked = False

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """Let writes wait for the client meanwhile, for a thread."""
        self.settimeout(_SEND_SECONDS)
        try:
            yield
        finally:
            if self.fileno() >= 0:
                self.setblocking(False)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send a part of the reply; the first one holds its header."""
        if not self._has_begun:
            self._has_begun = True
            self._is_chunked = b"\r\nTransfer-Encoding: chunked\r\n" in data
            data = data.removeprefix(self._sent_ahead)
        self._sent_ahead = b""
        super().sendall(data, flags)

    def has_left(self) -> bool:
        """Return whether the client has closed the connection, and not only its half of it.

        Both look the same until something is sent: a client that has closed everything answers it
        with a reset. So the first byte of what comes next is sent ahead: the H of HTTP/1.1, or a
        leading zero of the next chunk's size.
        """
        poller = select.poll()
        poller.register(self, select.POLLRDHUP)
        events = next((events for _, events in poller.poll(0)), 0)
        if events & _GONE:
            return True
        if events & select.POLLRDHUP and not self._sent_ahead:
            if self._has_begun and not self._is_chunked:
                return False  # the next part of the reply will show
            self._sent_ahead = b"0" if self._has_begun else b"H"
            try:
                self.send(self._sent_ahead, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._sent_ahead = b""  # it is alive, and slow
            except OSError:
                return True
        return False
