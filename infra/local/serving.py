"""The image's `serve` on this machine: the model unpacked read-only, a container, its replies.

Standard library only.
"""

from __future__ import annotations

import http.client
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.docker import PATIENCE, Container, docker, image_name

STOP_SERVING_SECONDS = 30
"""Between SIGTERM and SIGKILL on the platform."""


@dataclass
class Reply:
    """An HTTP reply; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Serving(Container):
    """The image's `serve` on an unpacked model, its port published on loopback.

    port: on this machine, 0 for a free one. inside: the port that it listens on.
    """

    def __init__(
        self,
        model: Path,
        *options: str,
        image: str | None = None,
        port: int = 0,
        inside: int = 8080,
    ) -> None:
        publish = f"127.0.0.1:{port or ''}:{inside}"
        volume = f"{model.absolute()}:/opt/ml/model:ro"
        self.began = time.monotonic()
        super().__init__(
            image or image_name(),
            "serve",
            options=["--publish", publish, "--volume", volume, *options],
        )
        try:
            published = docker("port", self.id, str(inside))
        except RuntimeError:  # without a network, or it has ended already
            published = ":0"
        self.port = int(published.split()[0].rpartition(":")[2])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(
        self,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send GET, or POST with a body, a dictionary as JSON. Raises OSError while unbound."""
        sent = dict(headers or {})
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = self.connect()
        try:
            connection.request("GET" if body is None else "POST", path, body, sent)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        finally:
            connection.close()

    def wait_until_ready(self, seconds: float = PATIENCE) -> list[int]:
        """Ping as the platform does, until 200; return the statuses without repetitions, 200 last.

        Raises RuntimeError with the log when the container ends or the time is over.
        """
        statuses: list[int] = []
        while time.monotonic() < self.began + seconds and not self._ended:
            try:
                status = self.ask("/ping").status
            except (OSError, http.client.HTTPException):
                status = 0  # not bound yet
            if status and status not in statuses[-1:]:
                statuses.append(status)
            if status == 200:
                return statuses
            time.sleep(0.02)
        raise RuntimeError(f"/ping did not answer 200 within {seconds:g} s:\n{self.log}")


def unpack_model(archive: Path, directory: Path) -> Path:
    """Unpack into a read-only directory, as an endpoint's /opt/ml/model is.

    Raises ValueError for links and special files, which SageMaker's hosting does not support.
    """
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{archive}: {member.name} is neither a file nor a directory")
        # Filters exist since Python 3.11.4; this one is the default since 3.14.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(directory)  # noqa: S202 - checked above
    for path in [directory, *directory.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return directory


@contextmanager
def unpacked(model: Path) -> Iterator[Path]:
    """Yield a directory unchanged, or an archive unpacked until the end of `with`."""
    if model.is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory() as directory:
        path = unpack_model(model, Path(directory) / "model")
        try:
            yield path
        finally:
            for folder in [path, *(p for p in path.rglob("*") if p.is_dir())]:
                folder.chmod(0o755)
