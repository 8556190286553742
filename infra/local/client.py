"""One POST to a container, with one deadline from connection to last byte.

Standard library only.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

PART_BYTES = 65_536


class TimedOutError(Exception):
    """The container did not answer in time."""


class BrokenError(Exception):
    """The container went away before its reply was complete."""


class StoppingError(Exception):
    """The stand-in for the runtime is being stopped."""


class Invocation:
    """One request to a container under one deadline. `close` closes the connection, by which the
    container sees that the client has gone."""

    def __init__(self, port: int, seconds: float) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
        self._timed_out = threading.Event()
        self._stopping = threading.Event()
        self._timer = threading.Timer(seconds, self._cut, [self._timed_out])
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None

    def send(
        self, body: bytes, headers: Mapping[str, str], path: str = "/invocations"
    ) -> http.client.HTTPResponse:
        """Send the request; return the reply with status and headers, its body unread."""
        with self._failures():
            self.connection.connect()
            self._socket = self.connection.sock
            if self._stopping.is_set():
                raise ConnectionAbortedError
            self._timer.start()
            self.connection.putrequest("POST", path, skip_accept_encoding=True)
            for name, value in headers.items():
                self.connection.putheader(name, value)
            self.connection.putheader("Content-Length", str(len(body)))
            # A server that refuses a body may answer before it has read all of it.
            with suppress(BrokenPipeError, ConnectionResetError):
                self.connection.endheaders(body)
            self._response = self.connection.getresponse()
            return self._response

    def parts(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the body as it arrives."""
        with self._failures():
            while part := response.read1(PART_BYTES):
                yield part
            if response.length or self._timed_out.is_set() or self._stopping.is_set():
                raise http.client.IncompleteRead(b"", response.length)

    def stop(self) -> None:
        self._cut(self._stopping)

    def close(self) -> None:
        self._timer.cancel()
        if self._response is not None:
            self._response.close()
        self.connection.close()

    def _cut(self, reason: threading.Event) -> None:
        reason.set()
        if self._socket is not None:
            with suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            if self._stopping.is_set():
                raise StoppingError from error
            if self._timed_out.is_set() or isinstance(error, TimeoutError):
                raise TimedOutError from error
            raise BrokenError from error
