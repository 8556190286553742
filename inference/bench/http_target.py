"""One client's HTTP connection to a server: send bytes, return the response or its failure."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from dalle.errors import UserError

TIMEOUT_SECONDS = 70.0  # above the platform's 60 s, so that its error response arrives


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response, or why there was none.

    outcome: the status as text ("200"), `timeout` or `connection`. retry_after: seconds, where
    the response has the header.
    """

    outcome: str
    body: bytes = b""
    retry_after: float | None = None


class Connection(Protocol):
    """One client's connection to the server; used by one thread at a time."""

    def send(self, body: bytes) -> Response: ...

    def close(self) -> None: ...


class Target(Protocol):
    """A server that takes requests. `connect` may be called by any thread."""

    def connect(self) -> Connection: ...


class HttpTarget:
    """The /invocations below a URL. Raises UserError for anything but an http(s) address."""

    def __init__(self, url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"the URL must be like http://127.0.0.1:8080, got {url!r}", field="--url"
            )
        self.host, self.port = parts.hostname, parts.port
        self.is_tls = parts.scheme == "https"
        self.base = parts.path.rstrip("/").removesuffix("/invocations")
        self.path = f"{self.base}/invocations"
        self.timeout_seconds = timeout_seconds

    def connect(self) -> HttpConnection:
        return HttpConnection(self)

    def open(self) -> http.client.HTTPConnection:
        """Return a new connection, which connects at its first request."""
        kind = http.client.HTTPSConnection if self.is_tls else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=self.timeout_seconds)

    def get(self, path: str) -> bytes:
        """Return the body of another route's 200. Raises OSError for any other outcome."""
        connection = self.open()
        try:
            connection.request("GET", f"{self.base}{path}")
            response = connection.getresponse()
            body = response.read()
        except http.client.HTTPException as error:
            raise OSError(f"{path} gave no HTTP response: {error!r}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise OSError(f"{path} answered {response.status}")
        return body


class HttpConnection:
    """One kept-alive connection, opened again when the server closed it between requests."""

    def __init__(self, target: HttpTarget) -> None:
        self._path = target.path
        self._http = target.open()

    def send(self, body: bytes) -> Response:
        was_open = self._http.sock is not None
        try:
            return self._send(body)
        except TimeoutError:
            self._http.close()
            return Response("timeout")
        except (OSError, http.client.HTTPException):
            self._http.close()
            if not was_open:
                return Response("connection")
        # The server may close a kept-alive connection at any time, which is no failure.
        return self.send(body)

    def close(self) -> None:
        self._http.close()

    def _send(self, body: bytes) -> Response:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._http.request("POST", self._path, body, headers)
        response = self._http.getresponse()
        content = response.read()
        waits = response.getheader("Retry-After", "")
        retry_after = float(waits) if waits.isdigit() else None
        return Response(str(response.status), content, retry_after)
