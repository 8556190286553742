"""gunicorn application of `serve`: the port, the worker process and its exit status.

The port is bound before torch is imported. The worker process loads the model in a thread and
answers /ping with 503 meanwhile.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger

from dalle.errors import DalleError
from inference.engine.engine_core import Engine, EngineCore
from inference.server.gunicorn_worker import Worker
from inference.settings import Settings

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger(__name__)

_KILL_SECONDS = 28  # after SIGTERM; the platform itself kills after 30
_KEEP_ALIVE_SECONDS = 75  # longer than the platform keeps a connection idle
_CAUSE_BYTES = 4096  # of an error message; a pipe holds so many before anything is read


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no annotations
    """gunicorn application of `serve`.

    load: returns the engine; called in the worker process, in the model's thread.
    """

    def __init__(
        self, load: Callable[[], Engine], settings: Settings, *, host: str, port: int
    ) -> None:
        self.settings = settings
        self.death: Exception | None = None
        self.stop: Callable[[], None] | None = None  # set by the worker
        self.engine_core = EngineCore(
            load,
            queue_size=settings.queue_size,
            stall_seconds=settings.stall_seconds,
            on_death=self._note_death,
        )
        self._pid = os.getpid()
        self._causes, self._cause = os.pipe()  # from the worker process to this one
        os.set_blocking(self._causes, False)
        self._bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        super().__init__()

    def load_config(self) -> None:
        """Set gunicorn's settings. No file and no environment variable of gunicorn's is read."""
        values: dict[str, Any] = {
            "bind": self._bind,
            "workers": 1,
            "worker_class": Worker,
            "threads": self.settings.http_threads,
            "logger_class": _Log,
            # Requests may take an hour. Where the main loop hangs, pings fail and the platform
            # replaces the container.
            "timeout": 0,
            "graceful_timeout": _KILL_SECONDS,
            "keepalive": _KEEP_ALIVE_SECONDS,
            "worker_tmp_dir": _writable_directory(),
            "control_socket_disable": True,  # it would be written under HOME
            "proc_name": "serve",
        }
        if self.settings.playground:
            values["when_ready"] = _say_where
        for name, value in values.items():
            self.cfg.set(name, value)

    def run(self) -> None:
        """Serve until stopped; raise SystemExit with gunicorn's status.

        When the worker process could not begin, the last line of the log is the cause, which
        gunicorn's messages do not give.
        """
        try:
            super().run()
        except SystemExit:
            if os.getpid() == self._pid and (cause := self._read_cause()):
                logger.error("serve cannot begin: %s", cause)
            raise

    def load(self) -> Flask:
        """Start loading the model and return the app at once, in the worker process."""
        try:
            from inference.server.app import create_app  # not before the port is bound

            self.engine_core.start()
            return create_app(self.engine_core, self.settings)
        except Exception as error:
            self._write_cause(error)
            raise

    def _write_cause(self, error: Exception) -> None:
        kind = "" if isinstance(error, DalleError) else f"{type(error).__name__}: "
        line = " ".join(f"{kind}{error}".split())
        os.write(self._cause, line.encode()[:_CAUSE_BYTES])

    def _read_cause(self) -> str:
        try:
            return os.read(self._causes, _CAUSE_BYTES).decode(errors="replace")
        except BlockingIOError:
            return ""

    def _note_death(self, error: Exception) -> None:
        """End the process where the model never worked; one that broke later answers pings 500."""
        if not self.engine_core.was_ready:
            self._write_cause(error)
            self.death = error
            if self.stop is not None:
                self.stop()


def _say_where(arbiter: Any) -> None:
    """Log the address of the page for the one who started the server."""
    host, port = arbiter.LISTENERS[0].sock.getsockname()[:2]
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104
    logger.info("open http://%s:%d/ in a browser", f"[{host}]" if ":" in host else host, port)


class _Log(Logger):  # type: ignore[misc]  # gunicorn has no annotations
    """Logger that sends gunicorn's messages to the handlers that `__main__` set up."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.error_log.propagate = True
        self.error_log.setLevel(logging.INFO)


def _writable_directory() -> str | None:
    """Return a directory for gunicorn's heartbeat file, in memory where possible."""
    for directory in ("/dev/shm", tempfile.gettempdir()):  # noqa: S108 - no name is guessed there
        if Path(directory).is_dir() and os.access(directory, os.W_OK | os.X_OK):
            return directory
    return None
