"""gunicorn's threaded worker, made safe against callers that are slow, half-hearted or gone.

    accepted ──> poller ──header whole──> thread ──> poller (kept alive) or lingering (closed)

A thread is taken only once a request's header is whole, and kept no longer than its body may take,
so that pings find one. A connection whose body was not read to its end is closed after the reply,
and the reply says so. On SIGTERM the worker goes on answering until accepted work has ended.

It reaches into gunicorn's worker, which is why pyproject.toml pins gunicorn to one version.
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
from typing import TYPE_CHECKING, Any

from gunicorn.arbiter import Arbiter
from gunicorn.http import errors
from gunicorn.http.body import Body, ChunkedReader, LengthReader
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import _DEFER, TConn, ThreadWorker

if TYPE_CHECKING:
    from inference.server.server import Server

logger = logging.getLogger(__name__)

_HEADER_SECONDS = 5.0  # for a request's header, which is sent at once or not at all
_PAUSE_SECONDS = 10.0  # between two parts of a body
_SEND_SECONDS = 60.0  # for one write of a reply
_LINGER_SECONDS = 5.0  # for a client to read the reply to a request that it is still sending
_LEAVING_SECONDS = 1.0  # the same, once the server is about to exit
_HEADER_BYTES = 65_536  # of a longer header the rest is read, and refused, by a thread
_RECEIVE_BYTES = 65_536


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no annotations
    """The process that holds the model, and its threads that talk HTTP."""

    app: Server

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lingering: deque[_Connection] = deque()  # the earliest to be closed first

    def init_process(self) -> None:
        self.app.worker = self
        # Short turns: a ping waits for at most a few of them while the model's thread computes.
        sys.setswitchinterval(0.001)
        super().init_process()

    def run(self) -> None:
        super().run()
        if self.app.death is not None:
            sys.exit(Arbiter.APP_LOAD_ERROR)  # the arbiter stops too instead of trying again

    def accept(self, listener: socket.socket) -> None:
        """A new connection, in the main loop."""
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.nr_conns += 1
        self.enqueue_req(_Connection(self, sock, address, listener.getsockname()))

    def handle(self, conn: _Connection) -> Any:
        """What has arrived on a connection, in a thread: a whole request, or not yet."""
        try:
            conn.init()
            if not conn.reader.take_header():
                return _DEFER
        except OSError:
            return False
        conn.reader.allow(_HEADER_SECONDS)
        return super().handle(conn)

    def handle_request(self, req: Any, conn: _Connection) -> Any:
        """A request whose header has been read, in a thread."""
        conn.sock.settimeout(_SEND_SECONDS)
        conn.reader.allow(self.app.settings.body_seconds)
        if isinstance(req.body.reader, LengthReader):
            req.body.reader = _WholeParts(req.body.reader.unreader, req.body.reader.length)
        # gunicorn asks when it writes the reply's header, and again before it reads on.
        req.should_close = lambda: type(req).should_close(req) or not _is_read(req.body)
        return super().handle_request(req, conn)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        """A header that cannot be read is refused in JSON, as everything else is."""
        if not isinstance(exc, errors.ParseException):
            super().handle_error(req, client, addr, exc)
            return
        status = HTTPStatus.BAD_REQUEST
        if isinstance(exc, errors.LimitRequestHeaders):
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        elif isinstance(exc, errors.LimitRequestLine):
            status = HTTPStatus.REQUEST_URI_TOO_LONG
        elif isinstance(exc, errors.ExpectationFailed):
            status = HTTPStatus.EXPECTATION_FAILED
        elif isinstance(exc, errors.UnsupportedTransferCoding):
            status = HTTPStatus.NOT_IMPLEMENTED
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

    def linger(self, conn: _Connection) -> None:
        """Close a connection in the main loop without waiting for anybody.

        A socket that is closed before everything was received resets the connection, and the
        client may lose the reply. So the sending half is closed first, what still comes is thrown
        away, and the rest is closed when the client has closed its half or the time is over.
        """
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
        except OSError:
            conn.close()
            return
        self.nr_conns += 1  # gunicorn has just counted it off
        conn.timeout = time.monotonic() + (_LINGER_SECONDS if self.alive else _LEAVING_SECONDS)
        self._lingering.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._discard, conn))

    def _discard(self, conn: _Connection, sock: socket.socket) -> None:
        try:
            has_ended = not sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            has_ended = True
        if has_ended:
            self._lingering.remove(conn)
            self._close(conn)

    def _close(self, conn: _Connection) -> None:
        self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """One turn of the main loop; the last ones, too, look every second for what is over."""
        super().wait_for_and_dispatch_events(min(timeout, 1.0))

    def murder_pending(self) -> None:
        """Called by the main loop in every turn: end what has had its time."""
        super().murder_pending()
        while self._lingering and self._lingering[0].timeout <= time.monotonic():
            self._close(self._lingering.popleft())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM: drain beside the main loop, which goes on accepting, then leave it."""
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT or SIGQUIT: give up what runs, so that its threads end."""
        self.app.scheduler.cancel_all()
        super().handle_quit(sig, frame)

    def stop_soon(self) -> None:
        """End the main loop from another thread."""
        self.method_queue.defer(self._leave)

    def _drain(self) -> None:
        seconds = self.app.settings.drain_seconds
        is_complete = self.app.scheduler.drain(seconds)
        if not is_complete:
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


class _Connection(TConn):  # type: ignore[misc]  # gunicorn has no annotations
    """A connection that is read within a time and closed without waiting."""

    def __init__(self, worker: Worker, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__(worker.cfg, sock, client, server)
        self._worker = worker

    @property
    def reader(self) -> _Reader:
        """What its requests are read through, once `init` was called."""
        reader: _Reader = self.parser.unreader
        return reader

    def init(self) -> None:
        """Called before each request; only the first time does something."""
        if not self.initialized:
            super().init()
            self.parser.unreader = _Reader(self.sock)

    def close(self, graceful: bool = False) -> None:
        """graceful: after a reply, which the client shall be able to read to its end."""
        if graceful:
            self._worker.linger(self)
        else:
            super().close()


class _Reader(SocketUnreader):  # type: ignore[misc]  # gunicorn has no annotations
    """What a connection sends, within a time: sending slowly must not keep a thread."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, max_chunk=_RECEIVE_BYTES)
        self._deadline = math.inf
        self._header_began = 0.0  # 0: no header is on its way

    def allow(self, seconds: float) -> None:
        """From now on, reading may take so long together."""
        self._deadline = time.monotonic() + seconds

    def chunk(self) -> bytes:
        """The next bytes; none at the end. Raises `TimeoutError` when they do not come in time."""
        seconds = min(self._deadline - time.monotonic(), _PAUSE_SECONDS)
        if seconds <= 0:
            raise TimeoutError("the time to send a request is over")
        before = self.sock.gettimeout()
        self.sock.settimeout(seconds)
        try:
            data: bytes = super().chunk()
            return data
        finally:
            self.sock.settimeout(before)

    def take_header(self) -> bool:
        """Take what has arrived, without waiting; whether there is a whole header to be parsed.

        Raises `OSError` when no more will come, or not in time.
        """
        now = time.monotonic()
        self._header_began = self._header_began or now
        header: bytes = self.take_buffered()
        self.sock.setblocking(False)
        try:
            while b"\r\n\r\n" not in header and len(header) < _HEADER_BYTES:
                try:
                    data = self.sock.recv(self.mxchunk)
                except BlockingIOError:
                    if now - self._header_began > _HEADER_SECONDS:
                        raise TimeoutError("the header did not arrive in time") from None
                    return False
                if not data:
                    raise ConnectionAbortedError("the client closed before its header was whole")
                header += data
        finally:
            self.unread(header)
        self._header_began = 0.0
        return True


class _WholeParts(LengthReader):  # type: ignore[misc]  # gunicorn has no annotations
    """A body of known length, handed on in the parts that arrive.

    gunicorn's own cuts off 1 kB at a time and copies the rest of the part each time: of a body of
    25 MB a second of Python's lock.
    """

    def read(self, size: int) -> bytes:
        """The next part, whatever its size; nothing at the end of the body or the connection."""
        data: bytes = self.unreader.read() if self.length else b""
        part, rest = data[: self.length], data[self.length :]
        if rest:  # the next request's beginning
            self.unreader.unread(rest)
        self.length -= len(part)
        return part


def _is_read(body: Body) -> bool:
    """Whether nothing of a request's body can still be on the socket."""
    match body.reader:
        case LengthReader() as reader:
            return bool(reader.length == 0)
        case ChunkedReader() as reader:
            return reader.parser is None
    return False
