"""SageMaker's runtime on this machine: the HTTP server between a client and the container.

It listens on loopback, for the unmodified boto3 client `sagemaker-runtime` through
AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME (or `endpoint_url`). It forwards `invoke_endpoint` and
`invoke_endpoint_with_response_stream` to `POST /invocations` of a container, under the platform's
limits: time, sizes, the headers that pass in each direction, and the form of a container's errors.
OpenAI's clients reach it by a path of their own, with bearer tokens (`openai`). It knows nothing of
the content of requests and replies.

Error messages are the platform's where those are known. Signatures are not checked.
Standard library only.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote

from infra.local import openai
from infra.local.client import PART_BYTES, BrokenError, Invocation, StoppingError, TimedOutError
from infra.local.event_stream import MEDIA_TYPE, exception, payload_part

logger = logging.getLogger(__name__)

VARIANT = "AllTraffic"
ACCOUNT = "000000000000"
ROUTE = re.compile(r"/endpoints/(?P<name>[^/]+)/(?P<operation>[a-z0-9/-]+)")
STOP_SECONDS = 10.0
POLL_SECONDS = 0.05

PREFIX = "x-amzn-sagemaker-"
ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
STREAM_ACCEPT = "X-Amzn-SageMaker-Accept"
STREAM_CONTENT_TYPE = "X-Amzn-SageMaker-Content-Type"
REQUEST_HEADERS = ("content-type", "accept")
REPLY_HEADERS = (
    ATTRIBUTES,
    "X-Amzn-SageMaker-New-Session-Id",
    "X-Amzn-SageMaker-Closed-Session-Id",
)

TIMED_OUT = (
    "Your invocation timed out while waiting for a response from container primary. Review the "
    "latency metrics for each container in Amazon CloudWatch, resolve the issue, and try again."
)
STOPPING = "The endpoint is being stopped."
PROCESS_EXITED = "An error occurred while handling request as the model process exited."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The platform's limits of a real-time endpoint.

    reply_seconds: from the request to the last byte of a plain reply. stream_seconds: of a stream.
    request_bytes, reply_bytes: of a body; a streamed reply may be of any size.
    attribute_characters: of the custom attributes, visible ASCII in both directions.
    """

    reply_seconds: float = 60.0
    stream_seconds: float = 480.0
    request_bytes: int = 25 * 2**20
    reply_bytes: int = 25 * 2**20
    attribute_characters: int = 1024


class EndpointError(Exception):
    """An error response to the client: its HTTP status, the error's name, its members."""

    def __init__(self, status: int, name: str, message: str, **members: str | int) -> None:
        super().__init__(message)
        self.status = status
        self.name = name
        self.members = {"Message": message, **members}


class RuntimeFacade:
    """Endpoints by name, each a container's port on loopback; a context manager serves them.

    url: the value for AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME. port: 0 for a free one.
    """

    def __init__(
        self, endpoints: Mapping[str, int], *, limits: Limits | None = None, port: int = 0
    ) -> None:
        self.endpoints = dict(endpoints)
        self.limits = limits or Limits()
        self._invocations: set[Invocation] = set()
        self._change = threading.Condition()
        self._server = _Server(self, port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=[POLL_SECONDS], daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def invoke(self, name: str, seconds: float) -> Iterator[Invocation]:
        """Open an invocation of an endpoint. Raises EndpointError for an unknown name."""
        if name not in self.endpoints:
            message = f"Endpoint {name} of account {ACCOUNT} not found."
            raise EndpointError(400, "ValidationError", message)
        invocation = Invocation(self.endpoints[name], seconds)
        with self._change:
            self._invocations.add(invocation)
        try:
            yield invocation
        finally:
            invocation.close()
            with self._change:
                self._invocations.discard(invocation)
                self._change.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop: invocations in progress end with an error response to their clients."""
        self._server.shutdown()
        with self._change:
            for invocation in self._invocations:
                invocation.stop()
            self._change.wait_for(lambda: not self._invocations, STOP_SECONDS)
        self._server.server_close()
        self._thread.join(STOP_SECONDS)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that keeps a connection open must not delay the end
    request_queue_size = 128

    def __init__(self, facade: RuntimeFacade, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.facade = facade


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # of one read from or write to the client

    def do_POST(self) -> None:
        self.close_connection = True  # one request a connection: none stays open at the end
        began = time.monotonic()
        try:
            self._handle()
        except EndpointError as error:
            logger.info("%s: %s", error.name, error)
            self._send_error(error)
        except OSError as error:  # failures of the container have other types
            logger.info("the client closed the connection: %s", error)
        logger.info("%s after %.2f s", self.path, time.monotonic() - began)

    def _handle(self) -> None:
        body = self._body()
        route = ROUTE.fullmatch(self.path.partition("?")[0])
        operations = {
            "invocations": self._invoke,
            "invocations-response-stream": self._stream,
            openai.OPERATION: self._chat,
        }
        if route is None or route["operation"] not in operations:
            message = f"{self.path} is none of {', '.join(operations)} of /endpoints/NAME/"
            raise EndpointError(404, "UnknownOperationException", message)
        _check_attributes(self.headers.get(ATTRIBUTES, ""), self._limits)
        variant = self.headers.get("X-Amzn-SageMaker-Target-Variant", VARIANT)
        if variant != VARIANT:
            message = f"Variant {variant} of {unquote(route['name'])} not found: it has {VARIANT}."
            raise EndpointError(400, "ValidationError", message)
        operations[route["operation"]](unquote(route["name"]), body)

    @property
    def _limits(self) -> Limits:
        return self.server.facade.limits

    def _body(self) -> bytes:
        text = self.headers.get("Content-Length", "")
        if not text.isdigit():
            raise EndpointError(411, "ValidationError", "the request has no Content-Length")
        length = int(text)
        if length > self._limits.request_bytes:
            while length > 0 and (part := self.rfile.read(min(length, PART_BYTES))):
                length -= len(part)  # a client reads the response only after it has sent all
            message = f"HTTP content length exceeded {self._limits.request_bytes} bytes."
            raise EndpointError(413, "", message)
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionResetError(f"{len(body)} of the request's {length} bytes came")
        return body

    def _request_headers(self) -> dict[str, str]:
        """Return the request's headers that are forwarded to the container."""
        return {
            name: value
            for name, value in self.headers.items()
            if name.lower() in REQUEST_HEADERS or name.lower().startswith(PREFIX)
        }

    def _invoke(self, name: str, body: bytes) -> None:
        limits = self._limits
        with self.server.facade.invoke(name, limits.reply_seconds) as invocation:
            reply = bytearray()
            try:
                response = invocation.send(body, self._request_headers())
                for part in invocation.parts(response):
                    reply += part
                    if len(reply) > limits.reply_bytes:
                        what = f"the reply is larger than {limits.reply_bytes} bytes"
                        raise _model_error(name, 0, what)
            except (TimedOutError, BrokenError, StoppingError) as error:
                raise _failed(name, error) from error
            _check_status(name, response.status, reply)
            headers = self._reply_headers(name, response)
        self.send_response(200)
        content_type = response.headers.get("Content-Type")
        if content_type:
            headers["Content-Type"] = content_type
        self._send_headers(headers | {"Content-Length": str(len(reply))})
        self.wfile.write(reply)

    def _stream(self, name: str, body: bytes) -> None:
        headers = self._request_headers()
        accept = headers.pop(STREAM_ACCEPT, None)
        if accept is not None:
            headers["Accept"] = accept
        with self.server.facade.invoke(name, self._limits.stream_seconds) as invocation:
            try:
                response = invocation.send(body, headers)
                if not 200 <= response.status < 300:
                    _check_status(name, response.status, b"".join(invocation.parts(response)))
                reply_headers = self._reply_headers(name, response)
            except (TimedOutError, BrokenError, StoppingError) as error:
                raise _failed(name, error) from error
            self.send_response(200)
            content_type = response.headers.get("Content-Type")
            if content_type:
                reply_headers[STREAM_CONTENT_TYPE] = content_type
            chunked = {"Content-Type": MEDIA_TYPE, "Transfer-Encoding": "chunked"}
            self._send_headers(reply_headers | chunked)
            try:
                for part in invocation.parts(response):
                    self._send_chunk(payload_part(part))
            except TimedOutError:
                code = {"ErrorCode": "ModelInvocationTimeExceeded"}
                self._send_chunk(exception("ModelStreamError", {"Message": TIMED_OUT} | code))
            except BrokenError:
                code = {"ErrorCode": "StreamBroken"}
                self._send_chunk(exception("ModelStreamError", {"Message": PROCESS_EXITED} | code))
            except StoppingError:
                self._send_chunk(exception("InternalStreamFailure", {"Message": STOPPING}))
            self._send_chunk(b"")

    def _chat(self, name: str, body: bytes) -> None:
        """Forward a request of OpenAI's clients, and the reply as it is, part by part."""
        fault = openai.token_fault(self.headers.get("Authorization"))
        if fault:
            raise EndpointError(403, "AccessDeniedException", fault)
        headers = self._request_headers()
        with self.server.facade.invoke(name, self._limits.stream_seconds) as invocation:
            try:
                response = invocation.send(body, headers, openai.CONTAINER_PATH)
            except (TimedOutError, BrokenError, StoppingError) as error:
                raise _failed(name, error) from error
            self.send_response(response.status)
            passed = {"Transfer-Encoding": "chunked"}
            if content_type := response.headers.get("Content-Type"):
                passed["Content-Type"] = content_type
            self._send_headers(passed)
            with suppress(TimedOutError, BrokenError, StoppingError):  # the end is missing then
                for part in invocation.parts(response):
                    self._send_chunk(part)
                self._send_chunk(b"")

    def _reply_headers(self, name: str, response: http.client.HTTPResponse) -> dict[str, str]:
        """Return the reply's headers that are forwarded to the client. Raises EndpointError."""
        passed = {n: v for n in REPLY_HEADERS if (v := response.headers.get(n)) is not None}
        try:
            _check_attributes(passed.get(ATTRIBUTES, ""), self._limits)
        except EndpointError as error:
            raise _model_error(name, response.status, str(error)) from error
        return passed | {"x-Amzn-Invoked-Production-Variant": VARIANT}

    def _send_error(self, error: EndpointError) -> None:
        self.send_response(error.status)
        body = json.dumps(error.members).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if error.name:
            headers["x-amzn-ErrorType"] = error.name
        with suppress(OSError):  # the client has closed the connection
            self._send_headers(headers)
            self.wfile.write(body)

    def _send_headers(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.send_header("Connection", "close")
        self.end_headers()

    def _send_chunk(self, chunk: bytes) -> None:
        """Send one chunk of the body in HTTP's framing; an empty one ends the body."""
        self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

    def log_message(self, format: str, *values: object) -> None:
        logger.debug(format, *values)


def _check_attributes(attributes: str, limits: Limits) -> None:
    longest = limits.attribute_characters
    if len(attributes) > longest or not re.fullmatch(r"[ -~]*", attributes):
        what = f"custom attributes must be at most {longest} visible ASCII characters"
        message = f"{what}, got {len(attributes)}: {attributes[:40]!r}"
        raise EndpointError(400, "ValidationError", message)


def _check_status(name: str, status: int, body: bytes | bytearray) -> None:
    if not 200 <= status < 300:
        raise _model_error(name, status, body.decode("utf-8", "replace"))


def _failed(name: str, error: Exception) -> EndpointError:
    if isinstance(error, StoppingError):
        return EndpointError(503, "ServiceUnavailable", STOPPING)
    return _model_error(name, 0, TIMED_OUT if isinstance(error, TimedOutError) else PROCESS_EXITED)


def _model_error(name: str, status: int, message: str) -> EndpointError:
    """Return a container's error in the platform's form; status 0 stands for no response."""
    group = f"/aws/sagemaker/Endpoints/{name}"
    whose = "client" if 400 <= status < 500 else "server"
    received = f'Received {whose} error ({status}) from primary with message "{message}".'
    return EndpointError(
        424,
        "ModelError",
        f"{received} See {group} in account {ACCOUNT} for more information.",
        OriginalStatusCode=status,
        OriginalMessage=message,
        LogStreamArn=f"arn:aws:logs:local:{ACCOUNT}:log-group:{group}",
    )
