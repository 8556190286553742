"""gunicorn around the app: one process that holds the model, threads that talk HTTP.

The port is bound before anything heavy is imported; the worker process loads the model in its own
thread and answers /ping with 503 meanwhile. On SIGTERM the worker goes on answering (503 to what is
new) until accepted work has ended, then closes idle connections and leaves.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker

from inference.scheduler import Engine, Scheduler
from inference.settings import Settings

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger(__name__)

_KILL_SECONDS = 28  # after SIGTERM; the platform itself kills after 30
_KEEP_ALIVE_SECONDS = 75  # longer than the platform keeps a connection idle, so it never races us
_HEADER_SECONDS = 5.0  # for one read of a request's header, which is sent at once or not at all
_SOCKET_SECONDS = 60.0  # for one read or write; waiting for the model is neither


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no annotations
    """The gunicorn application of `serve`.

    load: makes the engine; called in the worker process, in the model's thread.
    """

    def __init__(
        self, load: Callable[[], Engine], settings: Settings, *, host: str, port: int
    ) -> None:
        self.settings = settings
        self.death: Exception | None = None
        self.worker: _Worker | None = None
        self.scheduler = Scheduler(
            load,
            queue_size=settings.queue_size,
            stall_seconds=settings.stall_seconds,
            on_death=self._note_death,
        )
        self._bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        super().__init__()

    def load_config(self) -> None:
        """Called by gunicorn. No file and no environment variable of gunicorn's is read."""
        values: dict[str, Any] = {
            "bind": self._bind,
            "workers": 1,
            "worker_class": _Worker,
            "threads": self.settings.http_threads,
            "logger_class": _Log,
            # Requests may take an hour. A worker whose main loop hangs does not answer pings, by
            # which the platform replaces the whole container; gunicorn need not watch it too.
            "timeout": 0,
            "graceful_timeout": _KILL_SECONDS,
            "keepalive": _KEEP_ALIVE_SECONDS,
            "worker_tmp_dir": _writable_directory(),
            "control_socket_disable": True,  # it would be written under HOME
            "proc_name": "serve",
        }
        for name, value in values.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Called by gunicorn in the worker process: start loading, return the app at once."""
        from inference.app import create_app  # not before the port is bound

        self.scheduler.start()
        return create_app(self.scheduler, self.settings)

    def _note_death(self, error: Exception) -> None:
        """A model that never worked ends the process; one that broke later answers pings 500."""
        if not self.scheduler.was_ready:
            self.death = error
            if self.worker is not None:
                self.worker.stop_soon()


class _Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no annotations
    """gunicorn's threaded worker with a drain that still answers."""

    app: Server

    def init_process(self) -> None:
        self.app.worker = self
        # Short turns: a ping waits for at most a few of them while the model's thread computes.
        sys.setswitchinterval(0.001)
        super().init_process()

    def run(self) -> None:
        super().run()
        if self.app.death is not None:
            sys.exit(Arbiter.APP_LOAD_ERROR)  # the arbiter stops too instead of trying again

    def handle(self, conn: Any) -> Any:
        """Read and answer a request; a header that stays half-sent must not keep its thread."""

        def begin() -> None:
            # gunicorn calls this between its own setting of the socket and the header's parsing.
            type(conn).init(conn)
            conn.sock.settimeout(_HEADER_SECONDS)

        conn.init = begin
        return super().handle(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        conn.sock.settimeout(_SOCKET_SECONDS)
        return super().handle_request(req, conn)

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
        self.alive = False


class _Log(Logger):  # type: ignore[misc]  # gunicorn has no annotations
    """gunicorn's messages through the handlers that `__main__` set up."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.error_log.propagate = True
        self.error_log.setLevel(logging.INFO)


def _writable_directory() -> str | None:
    """In memory where possible: gunicorn's heartbeat file must not wait for a slow disk."""
    for directory in ("/dev/shm", tempfile.gettempdir()):  # noqa: S108 - no name is guessed there
        if Path(directory).is_dir() and os.access(directory, os.W_OK | os.X_OK):
            return directory
    return None
