"""What `docker compose` left behind, and how it is cleared away. Standard library only.

Containers are found by where their compose file stood; files they wrote as root are given back.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from infra.docker import docker

DIRECTORY = "com.docker.compose.project.working_dir"
SERVICE = "com.docker.compose.service"
START_SECONDS = 480.0
"""Until an endpoint must answer pings on the platform."""


@dataclass(frozen=True)
class Composed:
    """A container. service: its name in the compose file. status: Docker's words, "Exited (0) 3
    seconds ago" or "Up 2 minutes"."""

    id: str
    service: str
    directory: Path
    status: str

    @property
    def lives(self) -> bool:
        return self.status.startswith(("Up", "Created"))

    @property
    def ended_well(self) -> bool:
        return self.status.startswith("Exited (0)")


def containers(root: Path) -> list[Composed]:
    """Those of every compose file under a directory, running or not."""
    columns = ("{{.ID}}", f'{{{{.Label "{SERVICE}"}}}}', f'{{{{.Label "{DIRECTORY}"}}}}')
    listed = docker("ps", "--all", "--format", "\t".join([*columns, "{{.Status}}"]))
    found = []
    for line in listed.splitlines():
        container, service, directory, status = line.split("\t")
        if directory and Path(directory).is_relative_to(root):
            found.append(Composed(container, service, Path(directory), status))
    return sorted(found, key=lambda container: container.service)


def running(service: str, network: str) -> list[str]:
    """The names of running containers, of whatever compose file, on one network."""
    filters = ("--filter", f"network={network}", "--filter", f"label={SERVICE}={service}")
    return docker("ps", *filters, "--format", "{{.Names}}").split()


def logs(root: Path, lines: int = 20) -> str:
    """The last lines of all of them."""
    return "\n".join(docker("logs", "--tail", str(lines), c.id) for c in containers(root))


def wait_for_pings(root: Path, port: int, seconds: float = START_SECONDS) -> None:
    """Return once /ping answers 200 on a port of loopback. Raises RuntimeError with the log when
    the containers composed under a directory have ended, or the time is up."""
    deadline = time.monotonic() + seconds
    seen = False
    while not _answers_pings(port):
        found = containers(root)
        seen = seen or bool(found)
        if time.monotonic() > deadline or (seen and not any(c.lives for c in found)):
            states = ", ".join(c.status for c in found) or "none was started"
            raise RuntimeError(f"the container does not answer pings ({states}):\n{logs(root)}")
        time.sleep(0.1)


def _answers_pings(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/ping", timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, HTTPException):  # not bound yet, or 503
        return False


def remove(root: Path, network: str) -> None:
    """Remove the containers, and the network where nothing else hangs on it."""
    for container in containers(root):
        docker("rm", "--force", "--volumes", container.id)
    docker("network", "rm", network, check=False)  # refused while a container is on it


def remove_tree(path: Path | str, image: str) -> None:
    """Remove a directory that containers wrote into as root. A user who is not root borrows the
    image's `chown`."""
    if os.getuid() != 0:
        owner = f"{os.getuid()}:{os.getgid()}"
        volume = ("--volume", f"{Path(path).absolute()}:/reclaimed")
        chown = ("--entrypoint", "chown", image, "--recursive", owner, "/reclaimed")
        docker("run", "--rm", "--network", "none", "--user", "0:0", *volume, *chown)
    shutil.rmtree(path)
