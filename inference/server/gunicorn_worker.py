"""gunicorn's threaded worker, hardened against slow, incomplete and closed connections.

    accepted ──> poller ──header whole──> thread ──> poller (kept alive) or lingering (closed)

A thread is taken only once a request's header is whole, and is kept no longer than its body may
take, so that pings find one. A connection whose body was not read to its end is closed after the
reply, and the reply says so. On SIGTERM the worker goes on answering until accepted work has ended.

No stock worker does this. gthread, with 32 threads and its limits, fails 16 of the 24 tests in
tests/inference/command/test_gunicorn_worker.py: half-sent headers and bodies take every thread, so
that pings time out; no body has a time limit (408); a refused body is read on, or its reply is lost
to a reset; header errors are HTML. sync has one thread, and the others need gevent or tornado.

Of gunicorn's internals it uses the hooks of `ThreadWorker`, its poller and its lists of
connections; a socket class below gunicorn's parser limits the time. Tested with 26.2 and 27.0.
"""

from __future__ import annotations

import json
import logging
import math
import selectors
import socket
import sys
import threading
import time
from collections import deque
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import Any, Protocol

from gunicorn.arbiter import Arbiter
from gunicorn.http import errors
from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.workers.gthread import _DEFER, ThreadWorker

from inference.engine.engine_core import EngineCore
from inference.settings import Settings

logger = logging.getLogger(__name__)

_HEADER_SECONDS = 5.0  # for a request's header
_PAUSE_SECONDS = 10.0  # between two parts of a body
_SEND_SECONDS = 60.0  # for one write of a reply
_LINGER_SECONDS = 5.0  # for a client to read the reply to a request that it is still sending
_LEAVING_SECONDS = 1.0  # the same, once the server is about to exit
_HEADER_BYTES = 65_536  # a longer header is refused by the parser, in a thread
_RECEIVE_BYTES = 65_536

_STATUSES: tuple[tuple[type[Exception], HTTPStatus], ...] = (
    (errors.LimitRequestHeaders, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE),
    (errors.LimitRequestLine, HTTPStatus.REQUEST_URI_TOO_LONG),
    (errors.ExpectationFailed, HTTPStatus.EXPECTATION_FAILED),
    (errors.UnsupportedTransferCoding, HTTPStatus.NOT_IMPLEMENTED),
    (errors.ParseException, HTTPStatus.BAD_REQUEST),
)


class Application(Protocol):
    """What the worker uses of gunicorn's application object.

    stop: set by the worker; ends its main loop from any thread.
    death: why the model could not be loaded; the arbiter then ends too.
    """

    settings: Settings
    engine_core: EngineCore
    death: Exception | None
    stop: Any


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no annotations
    """Process that holds the model, with threads that answer HTTP."""

    app: Application

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lingering: deque[Any] = deque()  # connections, in the order of their time-outs

    def init_process(self) -> None:
        self.app.stop = self.stop_soon
        # Short turns: a ping waits for at most a few of them while the model's thread computes.
        sys.setswitchinterval(0.001)
        super().init_process()

    def run(self) -> None:
        super().run()
        if self.app.death is not None:
            sys.exit(Arbiter.APP_LOAD_ERROR)  # the arbiter stops too instead of trying again

    def enqueue_req(self, conn: Any) -> None:
        """Hand a connection to a thread, in the main loop; a new one gets our socket first."""
        if not isinstance(conn.sock, _Socket):
            conn.sock = _Socket(fileno=conn.sock.detach())
            conn.close = partial(self._close_connection, conn)
        super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        """Read what has arrived on a connection, in a thread; answer a request that is whole."""
        try:
            conn.init()
            if not conn.sock.take_header(conn.parser.unreader.take_buffered()):
                return _DEFER
        except OSError:
            return False
        conn.sock.allow(_HEADER_SECONDS)
        return super().handle(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose header has been read, in a thread."""
        conn.sock.settimeout(_SEND_SECONDS)
        conn.sock.allow(self.app.settings.body_seconds)
        match req.body.reader:
            case LengthReader(length=length):
                req.body.reader = _WholeParts(conn, length)
            case ChunkedReader() as reader:
                req.body.reader = _Chunks(reader)
        # gunicorn calls this when it writes the reply's header, and again before it reads on. Of a
        # body that was not read to its end, parts can still be on the socket.
        must_close = req.should_close
        req.should_close = lambda: must_close() or not getattr(req.body.reader, "is_read", False)
        return super().handle_request(req, conn)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        """Refuse a header that cannot be read, in JSON as every other error."""
        status = next((status for kind, status in _STATUSES if isinstance(exc, kind)), None)
        if status is None:
            super().handle_error(req, client, addr, exc)
            return
        logger.info("refused: status=%d; %s", status, exc)
        code = status.phrase.lower().replace(" ", "_").replace("-", "_")
        error = {"code": code, "message": f"the header cannot be read: {exc}", "field": None}
        body = json.dumps({"error": error}).encode()
        lines = (
            f"HTTP/1.1 {status.value} {status.phrase}",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        try:
            client.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        except OSError:
            logger.info("the refusal could not be sent: the client has gone")

    def _close_connection(self, conn: Any, graceful: bool = False) -> None:
        """Close a connection in the main loop, without blocking it.

        graceful: after a reply. A socket that is closed before everything was received resets the
        connection, and the client may lose the reply. So the sending half is closed first, what
        still arrives is discarded, and the rest is closed when the client has closed its half or
        after `_LINGER_SECONDS`.
        """
        try:
            if graceful:
                conn.sock.shutdown(socket.SHUT_WR)
                conn.sock.setblocking(False)
        except OSError:
            graceful = False
        if not graceful:
            conn.sock.close()
            return
        self.nr_conns += 1  # gunicorn has already subtracted it
        conn.timeout = time.monotonic() + (_LINGER_SECONDS if self.alive else _LEAVING_SECONDS)
        self._lingering.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._discard, conn))

    def _discard(self, conn: Any, sock: socket.socket) -> None:
        try:
            has_ended = not sock.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            has_ended = True
        if has_ended:
            self._lingering.remove(conn)
            self._end_lingering(conn)

    def _end_lingering(self, conn: Any) -> None:
        self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.sock.close()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Run one turn of the main loop, of at most a second even while the worker leaves."""
        super().wait_for_and_dispatch_events(min(timeout, 1.0))

    def murder_pending(self) -> None:
        """Close connections whose time is over. The main loop calls this in every turn."""
        super().murder_pending()
        while self._lingering and self._lingering[0].timeout <= time.monotonic():
            self._end_lingering(self._lingering.popleft())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM, drain beside the main loop, which goes on accepting, then leave it."""
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGINT or SIGQUIT, cancel what runs, so that its threads end."""
        self.app.engine_core.cancel_all()
        super().handle_quit(sig, frame)

    def stop_soon(self) -> None:
        """End the main loop. Any thread may call this."""
        self.method_queue.defer(self._leave)

    def _drain(self) -> None:
        seconds = self.app.settings.drain_seconds
        if not self.app.engine_core.drain(seconds):
            logger.warning("work was still running after %g seconds", seconds)
        self.stop_soon()

    def _leave(self) -> None:
        # Idle connections would hold the loop until they time out; nothing is lost with them.
        for connection in (*self.keepalived_conns, *self.pending_conns):
            connection.timeout = 0.0
        latest = time.monotonic() + _LEAVING_SECONDS
        for connection in self._lingering:
            connection.timeout = min(connection.timeout, latest)
        self.alive = False


class _Socket(socket.socket):
    """Socket of a connection with a time limit, so that a slow client does not keep a thread."""

    def __init__(self, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self._deadline = math.inf
        self._header = b""  # received, and not yet read
        self._header_began = 0.0  # 0: no header is on its way

    def allow(self, seconds: float) -> None:
        """Limit all reading from now on to so many seconds."""
        self._deadline = time.monotonic() + seconds

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return the next bytes; none at the end. Raises `TimeoutError` when they come too late."""
        if flags:
            return super().recv(size, flags)
        if self._header:
            data, self._header = self._header[:size], self._header[size:]
            return data
        seconds = min(self._deadline - time.monotonic(), _PAUSE_SECONDS)
        if seconds <= 0:
            raise TimeoutError("the time to send a request is over")
        before = self.gettimeout()
        self.settimeout(seconds)
        try:
            return super().recv(size)
        finally:
            self.settimeout(before)

    def take_header(self, buffered: bytes = b"") -> bool:
        """Receive what has arrived, without waiting; return whether it holds a whole header.

        buffered: what the parser has received beyond the last request.
        Raises `OSError` when no more will come, or not in time.
        """
        now = time.monotonic()
        self._header_began = self._header_began or now
        self._header = buffered + self._header
        while b"\r\n\r\n" not in self._header and len(self._header) < _HEADER_BYTES:
            try:
                data = super().recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if now - self._header_began > _HEADER_SECONDS:
                    raise TimeoutError("the header did not arrive in time") from None
                return False
            if not data:
                raise ConnectionAbortedError("the client closed before its header was whole")
            self._header += data
        self._header_began = 0.0
        return True


class _WholeParts:
    """Reader of a body of known length that returns the parts as they arrive.

    gunicorn 26 cuts off 1 kB at a time and copies the rest of the part each time: of a body of
    25 MB a second of Python's lock.
    """

    def __init__(self, conn: Any, length: int) -> None:
        self._sock: _Socket = conn.sock
        self.length = length  # of what is still to be read
        buffered: bytes = conn.parser.unreader.take_buffered()
        self._first = buffered[:length]
        conn.parser.unreader.unread(buffered[length:])  # the beginning of the next request

    def read(self, size: int) -> bytes:
        """Return the next part, of any size; nothing at the end of the body or the connection."""
        if not self.length:
            return b""
        part = self._first or self._sock.recv(min(self.length, _RECEIVE_BYTES))
        self._first = b""
        self.length -= len(part)
        return part

    @property
    def is_read(self) -> bool:
        return self.length == 0


class _Chunks:
    """Reader of a chunked body; an error in it is an `OSError` in every version of gunicorn."""

    def __init__(self, reader: ChunkedReader) -> None:
        self._reader = reader

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; nothing at the end of the body."""
        try:
            part: bytes = self._reader.read(size)
        except errors.ParseException as error:
            raise OSError(f"the chunks cannot be read: {error}") from error
        return part

    @property
    def is_read(self) -> bool:
        return self._reader.parser is None
