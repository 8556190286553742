"""SageMaker's runtime on this machine: what stands between a client and the container.

An HTTP server on loopback that the unmodified boto3 client `sagemaker-runtime` calls through
AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME (or `endpoint_url`). It passes `invoke_endpoint` and
`invoke_endpoint_with_response_stream` on to `POST /invocations` of a container, and keeps the
platform's limits on the way: time, sizes, which headers pass in which direction, and how a
container's errors reach the client. It knows nothing of what is asked or answered.

Where the platform's own words are known, messages use them. Signatures are not checked.
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
from types import TracebackType
from typing import Self
from urllib.parse import unquote

from infra.local.client import PART_BYTES, BrokenError, Call, StoppingError, TimedOutError
from infra.local.event_stream import MEDIA_TYPE, exception, payload_part

logger = logging.getLogger(__name__)

VARIANT = "AllTraffic"
ACCOUNT = "000000000000"
ROUTE = re.compile(r"/endpoints/(?P<name>[^/]+)/(?P<operation>[a-z-]+)")
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
PROCESS_EXITED = "An error occurred while handling request as the model process exited."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The platform's, for a real-time endpoint.

    reply_seconds: until the whole of a plain reply has come. stream_seconds: of a streamed one.
    request_bytes, reply_bytes: of a body; a streamed reply may be of any size.
    attribute_characters: of the custom attributes, visible ASCII in both directions.
    """

    reply_seconds: float = 60.0
    stream_seconds: float = 480.0
    request_bytes: int = 25 * 2**20
    reply_bytes: int = 25 * 2**20
    attribute_characters: int = 1024


class Refusal(Exception):  # noqa: N818 - an answer, not a mistake
    """What the client gets instead of a reply: an HTTP status, the error's name, its members."""

    def __init__(self, status: int, name: str, message: str, **members: str | int) -> None:
        super().__init__(message)
        self.status = status
        self.name = name
        self.members = {"Message": message, **members}


class RuntimeFacade:
    """Endpoints by name, each a container's port on loopback; served from `with` to its end.

    url: what AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME must be. port: 0 for a free one.
    """

    def __init__(
        self, endpoints: Mapping[str, int], *, limits: Limits | None = None, port: int = 0
    ) -> None:
        self.endpoints = dict(endpoints)
        self.limits = limits or Limits()
        self._calls: set[Call] = set()
        self._change = threading.Condition()
        self._server = _Server(self, port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=[POLL_SECONDS], daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def call(self, name: str, seconds: float) -> Iterator[Call]:
        """A call to the endpoint of that name. Raises Refusal when there is none."""
        if name not in self.endpoints:
            message = f"Endpoint {name} of account {ACCOUNT} not found."
            raise Refusal(400, "ValidationError", message)
        call = Call(self.endpoints[name], seconds)
        with self._change:
            self._calls.add(call)
        try:
            yield call
        finally:
            call.close()
            with self._change:
                self._calls.discard(call)
                self._change.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        """Calls that still run are cut off; their clients are told."""
        self._server.shutdown()
        with self._change:
            for call in self._calls:
                call.stop()
            self._change.wait_for(lambda: not self._calls, STOP_SECONDS)
        self._server.server_close()
        self._thread.join(STOP_SECONDS)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that only holds a connection open must not hold us up
    request_queue_size = 128

    def __init__(self, facade: RuntimeFacade, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.facade = facade


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # of one read from or write to the client

    def do_POST(self) -> None:
        self.close_connection = True  # one request each: nothing is left open when we stop
        began = time.monotonic()
        try:
            self._answer()
        except Refusal as refusal:
            logger.info("%s: %s", refusal.name, refusal)
            self._refuse(refusal)
        except OSError as error:  # a failure of the container's has another type
            logger.info("the client went away: %s", error)
        logger.info("%s after %.2f s", self.path, time.monotonic() - began)

    def _answer(self) -> None:
        body = self._body()
        route = ROUTE.fullmatch(self.path.partition("?")[0])
        operations = {
            "invocations": self._invoke,
            "invocations-response-stream": self._stream,
        }
        if route is None or route["operation"] not in operations:
            message = f"{self.path} is none of {', '.join(operations)} of /endpoints/NAME/"
            raise Refusal(404, "UnknownOperationException", message)
        _check_attributes(self.headers.get(ATTRIBUTES, ""), self._limits)
        variant = self.headers.get("X-Amzn-SageMaker-Target-Variant", VARIANT)
        if variant != VARIANT:
            message = f"Variant {variant} of {unquote(route['name'])} not found: it has {VARIANT}."
            raise Refusal(400, "ValidationError", message)
        operations[route["operation"]](unquote(route["name"]), body)

    @property
    def _limits(self) -> Limits:
        return self.server.facade.limits

    def _body(self) -> bytes:
        text = self.headers.get("Content-Length", "")
        if not text.isdigit():
            raise Refusal(411, "ValidationError", "the request has no Content-Length")
        length = int(text)
        if length > self._limits.request_bytes:
            while length > 0 and (part := self.rfile.read(min(length, PART_BYTES))):
                length -= len(part)  # read all the same: a client reads why once it has sent all
            message = f"HTTP content length exceeded {self._limits.request_bytes} bytes."
            raise Refusal(413, "", message)
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionResetError(f"{len(body)} of the request's {length} bytes came")
        return body

    def _passed_on(self) -> dict[str, str]:
        """The request's headers that a container sees."""
        passed = {}
        for name, value in self.headers.items():
            if name.lower() in REQUEST_HEADERS or name.lower().startswith(PREFIX):
                passed[name] = value
        return passed

    def _invoke(self, name: str, body: bytes) -> None:
        limits = self._limits
        with self.server.facade.call(name, limits.reply_seconds) as call:
            reply = bytearray()
            try:
                response = call.send(body, self._passed_on())
                for part in call.parts(response):
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
        headers = self._passed_on()
        accept = headers.pop(STREAM_ACCEPT, None)
        if accept is not None:
            headers["Accept"] = accept
        with self.server.facade.call(name, self._limits.stream_seconds) as call:
            try:
                response = call.send(body, headers)
                if not 200 <= response.status < 300:
                    _check_status(name, response.status, b"".join(call.parts(response)))
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
                for part in call.parts(response):
                    self._send_chunk(payload_part(part))
            except TimedOutError:
                code = {"Message": TIMED_OUT, "ErrorCode": "ModelInvocationTimeExceeded"}
                self._send_chunk(exception("ModelStreamError", code))
            except BrokenError:
                code = {"Message": PROCESS_EXITED, "ErrorCode": "StreamBroken"}
                self._send_chunk(exception("ModelStreamError", code))
            except StoppingError:
                message = {"Message": "The endpoint is being stopped."}
                self._send_chunk(exception("InternalStreamFailure", message))
            self._send_chunk(b"")

    def _reply_headers(self, name: str, response: http.client.HTTPResponse) -> dict[str, str]:
        """The container's headers that a client sees. Raises Refusal for attributes too long."""
        passed = {n: v for n in REPLY_HEADERS if (v := response.headers.get(n)) is not None}
        try:
            _check_attributes(passed.get(ATTRIBUTES, ""), self._limits)
        except Refusal as refusal:
            raise _model_error(name, response.status, str(refusal)) from refusal
        return passed | {"x-Amzn-Invoked-Production-Variant": VARIANT}

    def _refuse(self, refusal: Refusal) -> None:
        self.send_response(refusal.status)
        body = json.dumps(refusal.members).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        if refusal.name:
            headers["x-amzn-ErrorType"] = refusal.name
        with suppress(OSError):  # nobody waits for it any more
            self._send_headers(headers)
            self.wfile.write(body)

    def _send_headers(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.send_header("Connection", "close")
        self.end_headers()

    def _send_chunk(self, chunk: bytes) -> None:
        """A chunk of the body as HTTP frames it; an empty one ends the body."""
        self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")

    def log_message(self, format: str, *values: object) -> None:
        logger.debug(format, *values)


def _check_attributes(attributes: str, limits: Limits) -> None:
    longest = limits.attribute_characters
    if len(attributes) > longest or not re.fullmatch(r"[ -~]*", attributes):
        what = f"custom attributes must be at most {longest} visible ASCII characters"
        raise Refusal(400, "ValidationError", f"{what}, got {len(attributes)}: {attributes[:40]!r}")


def _check_status(name: str, status: int, body: bytes | bytearray) -> None:
    if not 200 <= status < 300:
        raise _model_error(name, status, body.decode("utf-8", "replace"))


def _failed(name: str, error: Exception) -> Refusal:
    if isinstance(error, StoppingError):
        return Refusal(503, "ServiceUnavailable", "The endpoint is being stopped.")
    return _model_error(name, 0, TIMED_OUT if isinstance(error, TimedOutError) else PROCESS_EXITED)


def _model_error(name: str, status: int, message: str) -> Refusal:
    """A container's error as a client sees it; a status of 0 where it gave none."""
    group = f"/aws/sagemaker/Endpoints/{name}"
    whose = "client" if 400 <= status < 500 else "server"
    received = f'Received {whose} error ({status}) from primary with message "{message}".'
    return Refusal(
        424,
        "ModelError",
        f"{received} See {group} in account {ACCOUNT} for more information.",
        OriginalStatusCode=status,
        OriginalMessage=message,
        LogStreamArn=f"arn:aws:logs:local:{ACCOUNT}:log-group:{group}",
    )
