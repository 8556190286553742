"""Docker's command line: one command, one container, and what is missing to run either.

Knows nothing of SageMaker. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

PATIENCE = 300.0
"""Seconds that a command may take unless it names another limit."""


class DockerError(RuntimeError):
    """A docker command failed. returncode: its exit status. output: both of its streams."""

    def __init__(self, arguments: Sequence[str], returncode: int, output: str) -> None:
        super().__init__(f"docker {' '.join(arguments)}: {output}")
        self.returncode = returncode
        self.output = output


def program() -> str:
    """Return the Docker client: DOCKER in the environment, or the first `docker` on PATH."""
    return os.environ.get("DOCKER") or "docker"


def image_name() -> str:
    """Return the default image: DALLE_IMAGE in the environment, or dalle-sagemaker."""
    return os.environ.get("DALLE_IMAGE") or "dalle-sagemaker"


def docker(
    *arguments: str,
    check: bool = True,
    seconds: float | None = PATIENCE,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Return the output of a docker command, both streams.

    environment: variables beside those of this process. Raises DockerError when the command fails.
    """
    done = subprocess.run(  # noqa: S603
        [program(), *arguments],
        input=stdin,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    if check and done.returncode != 0:
        raise DockerError(arguments, done.returncode, done.stdout.strip())
    return done.stdout


def why_no_docker(image: str | None = None) -> str:
    """Return what is missing to run the image here; empty when nothing is."""
    image = image or image_name()
    if shutil.which(program()) is None:
        return f"the program {program()} is not installed"
    try:
        docker("info")
    except DockerError as error:
        reason = (error.output.splitlines() or ["docker info failed"])[-1]
        return f"no Docker engine answers (it must be running, and needs root): {reason}"
    if not docker("image", "ls", "--quiet", image).strip():
        return f"the image {image} is not built: make image"
    return ""


class Container:
    """A running container. A thread reads its log, so that waiting for a line needs no polling.

    As a context manager it removes the container at the end, whatever its state.
    """

    def __init__(self, image: str, *command: str, options: Sequence[str] = ()) -> None:
        self.id = docker("run", "--detach", *options, image, *command).split()[-1]
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._echo = False
        self._logs = subprocess.Popen(  # noqa: S603
            [program(), "logs", "--follow", self.id],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C must not end it: the rest of the log is needed
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._logs.stdout is not None
        for line in self._logs.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
                if self._echo:
                    print(line, end="", flush=True)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def echo(self) -> None:
        """Print the log, past and future."""
        with self._changed:
            print("\n".join(self.lines), flush=True)
            self._echo = True

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """Return the match in the first line of the log, past or future, that has one."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, seconds)
            match = found()
        if match is None:
            raise RuntimeError(f"{pattern!r} is not in the log of {self.id[:12]}:\n{self.log}")
        return match

    def wait(self, seconds: float | None = PATIENCE) -> int:
        """Return the exit status once the container ends and its log is read; None: no limit."""
        status = int(docker("wait", self.id, seconds=seconds))
        self._reader.join(seconds)
        return status

    def stop(self, seconds: int) -> int:
        """Send SIGTERM, and SIGKILL after `seconds`; return the exit status (137 when killed)."""
        docker("stop", "--time", str(seconds), self.id, seconds=seconds + PATIENCE)
        return self.wait()

    def kill(self) -> None:
        docker("kill", self.id)
        self.wait()

    def state(self) -> dict[str, Any]:
        """Return Docker's description of the state: ExitCode, OOMKilled, StartedAt, ..."""
        state: dict[str, Any] = json.loads(
            docker("inspect", "--format", "{{json .State}}", self.id)
        )
        return state

    def written(self) -> list[str]:
        """Return the paths added, changed or deleted outside its volumes, such as "A /tmp/x"."""
        return docker("diff", self.id).splitlines()

    def python(self, code: str) -> str:
        """Run code in a second Python process inside; return what it prints."""
        return docker("exec", self.id, "/opt/venv/bin/python", "-c", code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        docker("rm", "--force", "--volumes", self.id, check=False)
        self._logs.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self._logs.stdout is not None
        self._logs.stdout.close()
