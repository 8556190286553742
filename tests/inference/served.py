"""The real `serve` process: the tests start it, send requests and end it."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from tests import REPOSITORY

PATIENCE = 180.0  # seconds until a test that waits for a process gives up


class Served:
    """A running `serve`. Its log is read by a thread, so that waiting for a line needs no sleep."""

    def __init__(
        self, root: Path, arguments: list[str], variables: dict[str, str], module: str
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if name[:5] != "DALLE"}
        path = f"{REPOSITORY / 'container'}{os.pathsep}{REPOSITORY}"
        environment |= {"PYTHONPATH": path, "DALLE_THREADS": "1", "DALLE_DEVICE": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--root", root, "--host", "127.0.0.1", *arguments],
            env=environment | variables,
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.http = requests.Session()
        self.http.trust_env = False  # no proxy for loopback
        self.url = ""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
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
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status


@contextmanager
def running(
    root: Path, *arguments: str, module: str = "inference", **variables: str
) -> Iterator[Served]:
    served = Served(root, list(arguments or ("--port", "0")), variables, module)
    try:
        yield served
    finally:
        served.http.close()
        if served.process.poll() is None:
            served.process.terminate()
            try:
                served.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                served.process.kill()
                raise
        served._reader.join(PATIENCE)
        assert served.process.stderr is not None
        served.process.stderr.close()
