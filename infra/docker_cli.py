"""What `push` needs of the `docker` command (DOCKER names another), each step told when it fails.

The password goes through stdin and into a configuration that is deleted afterwards, so that it is
neither in a process list nor left on the disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dalle.errors import PlatformError, UserError


@dataclass(frozen=True)
class LocalImage:
    """identity: `sha256:…` of the image as the engine counts it. num_bytes: unpacked."""

    name: str
    identity: str
    platform: str
    num_bytes: int


def program() -> str:
    return os.environ.get("DOCKER") or "docker"


def inspect(name: str) -> LocalImage:
    """An image of this machine. Raises UserError when it is not there."""
    try:
        text = run("image", "inspect", name)
    except PlatformError as error:
        if "no such image" in str(error).lower():
            raise UserError(
                f"there is no image {name!r} on this machine; `make image` builds it"
            ) from error
        raise
    found = json.loads(text)[0]
    return LocalImage(
        name=name,
        identity=found["Id"],
        platform=f"{found['Os']}/{found['Architecture']}",
        num_bytes=found["Size"],
    )


@contextmanager
def logged_in(registry: str, user: str, password: str) -> Iterator[dict[str, str]]:
    """The environment in which `docker` may push to the registry, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="docker-") as directory:
        environment = {"DOCKER_CONFIG": str(Path(directory))}
        run(
            "login",
            "--username",
            user,
            "--password-stdin",
            registry,
            stdin=password,
            environment=environment,
        )
        yield environment


def run(*words: str, stdin: str | None = None, environment: dict[str, str] | None = None) -> str:
    """stdout of one docker command. Raises PlatformError with its last words when it fails."""
    command = [program(), *words]
    try:
        done = subprocess.run(  # noqa: S603
            command,
            input=stdin,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise PlatformError(
            f"there is no command {program()!r}; `push` needs the Docker client and an engine"
        ) from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PlatformError(
            f"`docker {words[0]}` failed with {done.returncode}: {' '.join(said[-3:])}"
        )
    return done.stdout
