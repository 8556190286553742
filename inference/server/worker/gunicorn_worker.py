"""gunicorn worker whose threads are taken only by requests that have arrived.

    accepted ─> new ─header─> thread ─> body ─whole─> thread ─> idle, or lingering ─> closed

The main loop receives headers and bodies, with a time limit for each, so that neither silent nor
slow clients take a thread. A thread runs the application as soon as the header is whole, which
refuses what the header shows; where it reads a body that has not arrived, it is run again later.
A connection whose body was not read to its end is closed after the reply, and the reply says so. On
SIGTERM the worker goes on answering until accepted work has ended.

Connections and bodies in memory are bounded. Over the bound the oldest that wait are closed.

No stock worker does this. gthread, with 32 threads and its limits, fails 16 of the first 24 tests
in tests/inference/command/test_gunicorn_worker.py: half-sent headers and bodies take every thread;
no body has a time limit (408); a refused body is read on, or its reply is lost to a reset; header
errors are HTML. sync has one thread, and the others need gevent or tornado.

Of gunicorn's `ThreadWorker` it uses the poller, the queue of calls and `handle_request`.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import selectors
import socket
import sys
import threading
import time
from concurrent.futures import Future
from enum import Enum, auto
from functools import partial
from types import FrameType
from typing import Any, Protocol

from gunicorn.arbiter import Arbiter
from gunicorn.workers.gthread import ThreadWorker

from dalle.errors import UserError
from inference.engine.engine_core import EngineCore
from inference.engine.error_log import log_unexpected
from inference.engine.request_queue import Busy
from inference.server.worker.chunked_body import ChunkedBody
from inference.server.worker.connection import RECEIVE_BYTES, BodyPending, Connection
from inference.server.worker.header_errors import header_refusal
from inference.settings import Settings

logger = logging.getLogger(__name__)

_HEADER_SECONDS = 5.0  # for a request's header, from its first byte
_PAUSE_SECONDS = 10.0  # between two parts of a body
_UNREAD_SECONDS = 10.0  # for a client to read replies, before its next request is answered
_LINGER_SECONDS = 5.0  # for a client to read the reply to a request that it is still sending
_LEAVING_SECONDS = 1.0  # the same, once the server is about to exit
_TURN_SECONDS = 0.5  # by which a time limit may be missed
_SMALL_BODY_BYTES = 65_536  # a body up to this size always has room

_MAX_CONNECTIONS = 1_000
_MIN_CONNECTIONS = 4
_ACCEPTS_A_TURN = 32
# File descriptors for the model's files, the process of large bodies, and connections that are
# being closed.
_RESERVED_DESCRIPTORS = 28
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Application(Protocol):
    """What the worker uses of gunicorn's application object.

    stop: set by the worker; ends its main loop from any thread.
    death: why the model could not be loaded; the arbiter then ends too.
    """

    settings: Settings
    engine_core: EngineCore
    death: Exception | None
    stop: Any

    def note_ready(self) -> None:
        """Called when the model is ready."""
        ...


class _Next(Enum):
    """What becomes of a connection that a thread has had."""

    KEEP = auto()
    CLOSE = auto()
    BODY = auto()  # received before the request is answered


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no annotations
    """Process that holds the model, with threads that answer HTTP."""

    app: Application

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Connections that wait, the longest first: for a first request, for another one, for the
        # client to read replies, for a body, and for the client to close.
        self._new: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._unread: dict[Connection, None] = {}
        self._bodies: dict[Connection, None] = {}
        self._lingering: dict[Connection, None] = {}
        self._body_bytes = 0  # received of `_bodies`
        self._max_body_bytes = self.app.settings.max_body_bytes
        self._accepts_again = 0.0  # time, after file descriptors have run out
        self._next_check = 0.0  # time, of the time limits

    def init_process(self) -> None:
        self.app.stop = self.stop_soon
        # Short turns: a ping waits for at most a few of them while the model's thread computes.
        sys.setswitchinterval(0.001)
        super().init_process()

    def run(self) -> None:
        """Main loop: receive, hand requests to threads, keep time limits, until stopped."""
        self.worker_connections = _most_connections()
        wake = self.method_queue.run_callbacks
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, wake)
        has_said = False
        while self.alive and self.is_parent_alive():
            self.notify()
            if self.app.engine_core.was_ready and not has_said:
                self.app.note_ready()
                has_said = True
            self.set_accept_enabled(time.monotonic() >= self._accepts_again)
            self._turn()
        self.set_accept_enabled(False)
        for conn in list(self._bodies):  # the application refuses them by its state
            self._dispatch(conn)
        latest = time.monotonic() + self.cfg.graceful_timeout
        while self.nr_conns > 0 and time.monotonic() < latest:
            self._turn()
        self.tpool.shutdown(wait=False)
        self.poller.close()
        self.method_queue.close()
        for listener in self.sockets:
            listener.close()
        if self.app.death is not None:
            sys.exit(Arbiter.APP_LOAD_ERROR)  # the arbiter stops too instead of trying again

    def _turn(self) -> None:
        self.wait_for_and_dispatch_events(_TURN_SECONDS)
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + _TURN_SECONDS
            groups = (self._new, self._idle, self._unread, self._bodies, self._lingering)
            for group in groups:
                for conn in [each for each in group if each.deadline <= now]:
                    self._end_waiting(conn)

    def accept(self, listener: Any) -> None:
        """Accept connections; where there are too many, close the one that has waited longest."""
        for _ in range(_ACCEPTS_A_TURN):
            if self.nr_conns >= self.worker_connections and not self._make_room():
                self._pause_accepting()
                return
            try:
                accepted, client = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_DESCRIPTOR:
                    raise
                logger.warning(
                    "%d connections are open, and no more is possible: %s", self.nr_conns, error
                )
                self._make_room()
                self._pause_accepting()
                return
            conn = Connection(accepted, client)
            self.nr_conns += 1
            self._wait_for_request(conn)

    def _make_room(self) -> bool:
        """End what has waited longest in the largest group; return whether there was something.

        So many clients of one kind, silent or slow, are in the way of each other only.
        """
        # A connection whose body is refused is open for a while still.
        may_refuse = self.nr_conns < self.worker_connections + _MIN_CONNECTIONS
        groups = [self._new, self._idle, self._unread, self._lingering]
        groups += [self._bodies] * may_refuse
        largest = max(groups, key=len)
        conn = next(iter(largest), None)
        if conn is None:
            return False
        if largest is self._bodies:
            self._refuse_body(conn, "too many requests are arriving")
        else:
            self._close(conn)
        return True

    def _pause_accepting(self) -> None:
        self._accepts_again = time.monotonic() + _TURN_SECONDS
        self.set_accept_enabled(False)

    def _watch(self, conn: Connection, group: dict[Connection, None], deadline: float) -> None:
        conn.group, conn.deadline = group, deadline
        group[conn] = None
        events, call = selectors.EVENT_READ, self._receive
        if group is self._lingering:
            call = self._discard
        elif group is self._unread:
            events, call = selectors.EVENT_WRITE, self._go_on
        self.poller.register(conn, events, partial(call, conn))

    def _unwatch(self, conn: Connection) -> None:
        if conn.group is None:
            return
        self.poller.unregister(conn)
        del conn.group[conn]
        if conn.group is self._bodies and conn.body is not None:
            self._body_bytes -= conn.body.size
        conn.group = None

    def _close(self, conn: Connection) -> None:
        self._unwatch(conn)
        self.nr_conns -= 1
        conn.close()

    def _wait_for_request(self, conn: Connection) -> None:
        """Wait for the next request, which may have been received with the last one."""
        if conn.is_ready:
            self._begin(conn)
            return
        seconds = _HEADER_SECONDS if conn.has_part else self.cfg.keepalive
        group = self._idle if conn.has_answered else self._new
        self._watch(conn, group, time.monotonic() + seconds)

    def _begin(self, conn: Connection) -> None:
        """Hand a new request to a thread, which its client must not keep with unread replies."""
        if conn.can_send:
            self._dispatch(conn)
            return
        self._unwatch(conn)
        self._watch(conn, self._unread, time.monotonic() + _UNREAD_SECONDS)

    def _go_on(self, conn: Connection, _: socket.socket) -> None:
        if conn.group is not None:
            self._dispatch(conn)

    def _wait_for_body(self, conn: Connection) -> None:
        if conn.is_ready:
            self._dispatch(conn)
            return
        assert conn.body is not None
        now = time.monotonic()
        conn.body_deadline = now + self.app.settings.body_seconds
        self._body_bytes += conn.body.size
        self._watch(conn, self._bodies, min(now + _PAUSE_SECONDS, conn.body_deadline))

    def _receive(self, conn: Connection, _: socket.socket) -> None:
        """Take what has arrived; the main loop calls this when there is something."""
        if conn.group is None:  # closed in this turn
            return
        had_part = conn.has_part
        before = conn.body.size if conn.body is not None else 0
        try:
            conn.receive()
        except OSError:
            self._close(conn)
            return
        now = time.monotonic()
        if conn.body is not None:
            self._body_bytes += conn.body.size - before
            conn.deadline = min(now + _PAUSE_SECONDS, conn.body_deadline)
            self._bound_bodies()
        elif conn.has_part and not had_part:
            conn.deadline = now + _HEADER_SECONDS
        if conn.group is None:
            return
        if conn.is_ready and conn.body is None:
            self._begin(conn)
        elif conn.is_ready:
            self._dispatch(conn)
        elif conn.has_ended:
            self._close(conn)

    def _bound_bodies(self) -> None:
        """Refuse the bodies that began first, where those that arrive take too much memory."""
        while self._body_bytes > self._max_body_bytes:
            large = (c for c in self._bodies if c.body and c.body.size > _SMALL_BODY_BYTES)
            oldest = next(large, None)
            if oldest is None:
                return
            self._refuse_body(
                oldest,
                "the bodies that are arriving have more than "
                f"{self._max_body_bytes:,} bytes together",
            )

    def _refuse_body(self, conn: Connection, why: str) -> None:
        assert conn.body is not None
        self._unwatch(conn)
        conn.body.fail(Busy(why, code="too_many_bodies", status=503, retry_after=1))
        self._dispatch(conn)

    def _end_waiting(self, conn: Connection) -> None:
        """Close a connection whose time is over, or refuse its body."""
        if conn.group is not self._bodies or conn.body is None:
            self._close(conn)
            return
        self._unwatch(conn)
        message = "the body did not arrive in time; send it without a pause"
        conn.body.fail(UserError(message, status=408, code="request_timeout"))
        self._dispatch(conn)

    def _dispatch(self, conn: Connection) -> None:
        """Hand a connection to a thread."""
        self._unwatch(conn)
        future = self.tpool.submit(self.handle, conn)
        future.add_done_callback(
            lambda done: self.method_queue.defer(self.finish_request, conn, done)
        )

    def finish_request(self, conn: Connection, done: Future[_Next]) -> None:
        """Take a connection back from its thread, in the main loop."""
        following = _Next.CLOSE if done.cancelled() or done.exception() else done.result()
        try:
            if following is _Next.BODY and self.alive:
                self._wait_for_body(conn)
            elif following is _Next.BODY:
                self._dispatch(conn)  # the application refuses it by its state
            elif following is _Next.KEEP and self.alive and not conn.has_ended:
                self._wait_for_request(conn)
            else:
                self._close_gracefully(conn)
        except OSError:
            self._close(conn)

    def handle(self, conn: Connection) -> _Next:
        """Answer the request that a connection holds, in a thread."""
        try:
            with conn.blocking():
                return self._answer(conn)
        except OSError as error:
            logger.debug("the client is lost: %s", error)
        except StopIteration:  # an error after the reply had begun; gunicorn has logged it
            pass
        except Exception as error:
            log_unexpected(logger, "internal error", error)
        return _Next.CLOSE

    def _answer(self, conn: Connection) -> _Next:
        try:
            if conn.request is None:
                max_bytes = self.app.settings.limits.max_request_bytes
                conn.read_header(self.cfg, max_bytes, ChunkedBody)
            is_kept = self.handle_request(conn.request, conn)
        except BodyPending:
            conn.ask_for_body()
            return _Next.BODY
        except (OSError, StopIteration):
            raise
        except Exception as error:
            self.handle_error(conn.request, conn, conn.client, error)
            return _Next.CLOSE
        conn.finish_request()
        return _Next.KEEP if is_kept else _Next.CLOSE

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        """Refuse a header that cannot be read, in JSON as every other error."""
        reply = header_refusal(exc)
        if reply is None:
            super().handle_error(req, client, addr, exc)
            return
        try:
            client.sendall(reply)
        except OSError:
            logger.info("the refusal could not be sent: the client has gone")

    def _close_gracefully(self, conn: Connection) -> None:
        """Close a connection after a reply, without blocking the main loop.

        A socket that is closed before everything was received resets the connection, and the client
        may lose the reply. So the sending half is closed first, what still arrives is discarded,
        and the rest is closed when the client has closed its half or after `_LINGER_SECONDS`.
        """
        conn.shutdown(socket.SHUT_WR)
        seconds = _LINGER_SECONDS if self.alive else _LEAVING_SECONDS
        self._watch(conn, self._lingering, time.monotonic() + seconds)

    def _discard(self, conn: Connection, _: socket.socket) -> None:
        if conn.group is None:
            return
        try:
            has_ended = not conn.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            has_ended = True
        if has_ended:
            self._close(conn)

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
        for conn in (*self._new, *self._idle, *self._unread):
            self._close(conn)
        latest = time.monotonic() + _LEAVING_SECONDS
        for conn in self._lingering:
            conn.deadline = min(conn.deadline, latest)
        self.alive = False


def _most_connections() -> int:
    """Return how many connections fit in the limit of open files of this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    room = limit - len(os.listdir("/proc/self/fd")) - _RESERVED_DESCRIPTORS
    return max(_MIN_CONNECTIONS, min(_MAX_CONNECTIONS, room))
