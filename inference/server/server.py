"""gunicorn application of `serve`: the port, the worker process and its exit status.

The port is bound before torch is imported. The worker process loads the model in a thread and
answers /ping with 503 meanwhile.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger

from dalle.errors import DalleError, PlatformError
from inference.engine.engine_core import Engine, EngineCore
from inference.server.stop_watch import StopWatch
from inference.server.worker.gunicorn_worker import Worker
from inference.settings import Settings

if TYPE_CHECKING:
    from flask import Flask

logger = logging.getLogger(__name__)

_KILL_SECONDS = 28  # after SIGTERM; the platform itself kills after 30
_KEEP_ALIVE_SECONDS = 75  # longer than the platform keeps a connection idle
_IN_MEMORY = "/dev/shm"  # noqa: S108 - no name is guessed there
_MOST_LOADS = 3  # in a row, of which none has come to its end
_PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl
_CAUSE_BYTES = 4096  # of an error message; a pipe holds so many before anything is read


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no annotations
    """gunicorn application of `serve`.

    load: returns the engine; called in the worker process, in the model's thread.
    Raises `PlatformError` where no directory can be written.
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
        self._directory = _writable_directory()
        self._was_ready = mmap.mmap(-1, 1)  # shared with the worker process, which sets it to 1
        self._loads = 0  # in a row that ended before the model was ready
        self._last_cause = ""
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
            "worker_tmp_dir": self._directory,
            "child_exit": self._note_exit,
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
            _Arbiter(self).run()
        except SystemExit:
            if os.getpid() == self._pid and (cause := self._last_cause or self._read_cause()):
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

    def note_ready(self) -> None:
        """Remember in the other process too that the model was loaded."""
        self._was_ready[0] = 1

    def _note_exit(self, arbiter: Any, worker: Any) -> None:
        """End the server when its processes end again and again before the model is ready."""
        if not arbiter.LISTENERS:  # it is being stopped
            return
        self._loads = 0 if self._was_ready[0] else self._loads + 1
        self._was_ready[0] = 0
        if self._loads >= _MOST_LOADS:
            self._last_cause = (
                f"the process that loads the model ended {self._loads} times in a row before it "
                "was ready; perhaps it needs more memory than there is"
            )
            raise HaltServer("the model cannot be loaded", Arbiter.APP_LOAD_ERROR)

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


class _Arbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no annotations
    """The process that starts the worker, and another one where it has ended or is stopped.

    Children of a worker that has ended become its own, and are killed: one that is stopped would
    not notice. In a container it is the first process, which adopts all; elsewhere it asks for it.
    """

    def __init__(self, app: Server) -> None:
        super().__init__(app)
        self._watches: dict[int, StopWatch] = {}

    def start(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        super().start()

    def reap_workers(self) -> None:
        super().reap_workers()
        for child in psutil.Process().children():
            if child.pid not in self.WORKERS:
                with suppress(psutil.NoSuchProcess):
                    child.kill()

    def murder_workers(self) -> None:
        """Kill a worker process that a signal has stopped; called every second."""
        self._watches = {pid: self._watches.get(pid, StopWatch(pid)) for pid in self.WORKERS}
        for pid, watch in self._watches.items():
            if watch.is_stopped():
                logger.error("the worker process %d is stopped by a signal; it is replaced", pid)
                self.kill_worker(pid, signal.SIGKILL)


class _Log(Logger):  # type: ignore[misc]  # gunicorn has no annotations
    """Logger that sends gunicorn's messages to the handlers that `__main__` set up."""

    def setup(self, cfg: Any) -> None:
        self.cfg = cfg
        self.error_log.propagate = True
        self.error_log.setLevel(logging.INFO)


def _writable_directory() -> str:
    """Return a directory for gunicorn's heartbeat file, in memory where possible.

    Where Python finds no temporary directory, this becomes it, for child processes too.
    Raises `PlatformError` where no directory can be written.
    """
    try:
        usual, problem = tempfile.gettempdir(), ""
    except FileNotFoundError as error:
        usual, problem = None, str(error)
    try:
        with tempfile.TemporaryFile(dir=_IN_MEMORY) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        if usual is None:
            raise PlatformError(
                f"no directory for temporary files can be written: {_IN_MEMORY}: {error.strerror}; "
                f"{problem}; make room, or set TMPDIR to a directory that has some"
            ) from error
        return usual
    if usual is None:
        tempfile.tempdir = os.environ["TMPDIR"] = _IN_MEMORY
        logger.warning("temporary files are in %s: %s", _IN_MEMORY, problem)
    return _IN_MEMORY
