"""The real `serve` process: the tests start it, send requests and end it."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import requests

from inference.__main__ import main
from tests import REPOSITORY
from tests.forked import PIPE, Forked

PATIENCE = 180.0  # seconds until a test that waits for a process gives up

Work = Callable[[list[str]], int]
"""Takes the words of a command line and returns an exit status."""


class Served:
    """A running `serve`. Its log is read by a thread, so that waiting for a line needs no sleep."""

    def __init__(self, process: Any, log: IO[str]) -> None:
        self.process = process  # subprocess.Popen, or what has of it what tests use
        self._log = log
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.http = requests.Session()
        self.http.trust_env = False  # no proxy for loopback
        self.url = ""

    def _read(self) -> None:
        for line in self._log:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line of the log, past or future, in which the pattern is found."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, PATIENCE)
            match = found()
        assert match is not None, f"{pattern!r} is not in the log:\n" + "\n".join(self.lines)
        return match

    def wait_until(self, is_so: Callable[[list[str]], bool]) -> None:
        """Wait until something is true of the lines of the log."""
        with self._news:
            self._news.wait_for(lambda: is_so(self.lines) or self._ended, PATIENCE)
        assert is_so(self.lines), "it does not become true of the log:\n" + "\n".join(self.lines)

    def listening(self) -> "Served":
        self.url = self.wait_for(r"Listening at: (http://[\d.]+:\d+)")[1]
        return self

    def ready(self) -> "Served":
        self.listening().wait_for(r": ready$")
        return self

    def get(self, path: str) -> requests.Response:
        return self.http.get(self.url + path, timeout=PATIENCE)

    def ask(
        self, *, accept: str = "*/*", stream: bool = False, **fields: object
    ) -> requests.Response:
        body = {"caption": "a red square", "num_candidates": 2, "seed": 7, **fields}
        return requests.Session().post(
            f"{self.url}/invocations",
            json=body,
            headers={"Accept": accept},
            stream=stream,
            timeout=PATIENCE,
        )

    def end(self) -> int:
        """Wait for the process to end; return its status."""
        status: int = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def close(self) -> None:
        """End the process if it still runs."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        self._reader.join(PATIENCE)
        self._log.close()


@contextmanager
def running(
    root: Path, *arguments: str, work: Work | None = None, **variables: str
) -> Iterator[Served]:
    """`serve`, sooner than the command: a fork of a process that has torch, see `tests.forked`.

    work: a function of a module to run in place of `serve`.
    """
    process = Forked(
        work or serve,
        _words(root, arguments),
        log=PIPE,
        environment=_environment(variables),
        folder=root,
    )
    served = Served(process, process.output)
    try:
        yield served
    finally:
        served.close()


@contextmanager
def command(
    root: Path, *arguments: str, module: str = "inference", **variables: str
) -> Iterator[Served]:
    """The command itself, whose start takes seconds. module: another one that is run."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *_words(root, arguments)],
        env=_environment(variables),
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    served = Served(process, process.stderr)
    try:
        yield served
    finally:
        served.close()


def serve(words: list[str]) -> int:
    """Main function of a fork."""
    return main(words)


def _words(root: Path, arguments: tuple[str, ...]) -> list[str]:
    return ["--root", str(root), "--host", "127.0.0.1", *(arguments or ("--port", "0"))]


def _environment(variables: dict[str, str]) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name[:5] != "DALLE"}
    path = f"{REPOSITORY / 'container'}{os.pathsep}{REPOSITORY}"
    environment |= {"PYTHONPATH": path, "DALLE_THREADS": "1", "DALLE_DEVICE": "cpu"}
    return environment | variables
