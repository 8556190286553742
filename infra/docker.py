"""Docker's own command line: one command, one container, and what is missing to run either.

Knows nothing of SageMaker. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

PATIENCE = 300.0
"""Seconds that anything may take that is not told otherwise."""


def program() -> str:
    """The Docker client: DOCKER in the environment, or the first `docker` on PATH."""
    return os.environ.get("DOCKER", "docker")


def image_name() -> str:
    """The image that is meant where none is named: DALLE_IMAGE in the environment, or ours."""
    return os.environ.get("DALLE_IMAGE", "dalle-sagemaker")


def docker(*arguments: str, check: bool = True, seconds: float | None = PATIENCE) -> str:
    """The output of a docker command, both streams. Raises RuntimeError with it when it fails."""
    done = subprocess.run(  # noqa: S603
        [program(), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.stdout.strip()}")
    return done.stdout


def why_no_docker(image: str | None = None) -> str:
    """What is missing to run the image here; empty when nothing is."""
    image = image or image_name()
    if shutil.which(program()) is None:
        return f"the program {program()} is not installed"
    information = subprocess.run([program(), "info"], capture_output=True, text=True, check=False)  # noqa: S603
    if information.returncode != 0:
        words = information.stderr.strip().splitlines() or ["docker info failed"]
        return f"no Docker engine answers (it must run, and asks for root): {words[-1]}"
    if not docker("image", "ls", "--quiet", image).strip():
        return f"the image {image} is not built: make image"
    return ""


class Container:
    """A running container; its log is read by a thread, so that waiting for a line needs no sleep.

    As a context manager it is removed at the end, whatever its state.
    """

    def __init__(self, image: str, *command: str, options: Sequence[str] = ()) -> None:
        self.id = docker("run", "--detach", *options, image, *command).split()[-1]
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._echo = False
        self._logs = subprocess.Popen(  # noqa: S603
            [program(), "logs", "--follow", self.id],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this program; the rest of the log is wanted
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._logs.stdout is not None
        for line in self._logs.stdout:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
                if self._echo:
                    print(line, end="", flush=True)
        with self._news:
            self._ended = True
            self._news.notify_all()

    def echo(self) -> None:
        """Print the log, past and future."""
        with self._news:
            print("\n".join(self.lines), flush=True)
            self._echo = True

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """The first line of the log, past or future, in which the pattern is found."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._ended, seconds)
            match = found()
        if match is None:
            raise RuntimeError(f"{pattern!r} is not in the log of {self.id[:12]}:\n{self.log}")
        return match

    def wait(self, seconds: float | None = PATIENCE) -> int:
        """The exit status, once it ends by itself and its log has been read; None waits on."""
        status = int(docker("wait", self.id, seconds=seconds))
        self._reader.join(seconds)
        return status

    def stop(self, seconds: int) -> int:
        """SIGTERM, and SIGKILL after so many seconds; the exit status (137 when it was killed)."""
        docker("stop", "--time", str(seconds), self.id, seconds=seconds + PATIENCE)
        return self.wait()

    def kill(self) -> None:
        docker("kill", self.id)
        self.wait()

    def state(self) -> dict[str, Any]:
        """Docker's words: ExitCode, OOMKilled, StartedAt, ..."""
        state: dict[str, Any] = json.loads(
            docker("inspect", "--format", "{{json .State}}", self.id)
        )
        return state

    def written(self) -> list[str]:
        """What was added, changed or deleted inside, outside its volumes: "A /tmp/x"."""
        return docker("diff", self.id).splitlines()

    def python(self, code: str) -> str:
        """What a second Python inside prints."""
        return docker("exec", self.id, "/opt/venv/bin/python", "-c", code)

    def memory(self) -> int:
        """Resident bytes of all its processes; pages that several share count once."""
        return int(
            self.python(
                "from pathlib import Path\n"
                "kilobytes = 0\n"
                "for p in Path('/proc').glob('[0-9]*/smaps_rollup'):\n"
                "    try: kilobytes += int(p.read_text().split('Pss:')[1].split()[0])\n"
                "    except (OSError, IndexError): pass\n"
                "print(kilobytes * 1024)"
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        docker("rm", "--force", "--volumes", self.id, check=False)
        self._logs.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self._logs.stdout is not None
        self._logs.stdout.close()
