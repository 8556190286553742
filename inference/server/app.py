"""The WSGI application: routes, headers, bodies and errors. It and `playground` import Flask.

GET  /ping                   503 loading or stopping, 200 ready, 500 dead
POST /invocations            headers -> engine is ready -> body -> Handler.answer
GET  /execution-parameters   for batch transform
GET  /metrics                Prometheus text
GET  /openapi.json           the schema
GET  /                       with DALLE_PLAYGROUND=1, a page to try the model
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge

from dalle.errors import UserError
from inference.api import openapi, parsing
from inference.api.parsing import Accept, body_kind
from inference.api.rendering import CUSTOM_ATTRIBUTES, render_error
from inference.api.replies import ErrorDetail, ErrorReply
from inference.api.schema import Limits
from inference.engine.engine_core import EngineCore, State
from inference.engine.request_queue import Busy
from inference.server.bodies import BodyReader
from inference.server.handler import Handler, log_error
from inference.server.metrics import Metrics
from inference.server.playground import playground
from inference.settings import MEGABYTE, Settings

logger = logging.getLogger(__name__)

_PING_STATUS = {State.LOADING: 503, State.READY: 200, State.STOPPING: 503, State.DEAD: 500}
_MAX_ATTRIBUTES = 1024  # characters, the platform's limit


def create_app(engine_core: EngineCore, settings: Settings) -> Flask:
    """Return the WSGI application around an engine core, which may still be loading."""
    app = Flask("inference")
    # One byte over the limit: werkzeug cuts a chunked body there without an error.
    app.config["MAX_CONTENT_LENGTH"] = settings.limits.max_request_bytes + 1
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the default provider has it
    metrics = Metrics(engine_core)
    # More requests than these are refused, so that threads remain for pings.
    places = _Places(settings.max_invocations)
    bodies = BodyReader()
    document = openapi.document(settings.limits)
    if settings.playground:
        app.register_blueprint(playground(engine_core))

    @app.get("/ping")
    def ping() -> tuple[Response, int]:
        state = engine_core.state
        body = {"status": str(state)}
        if state is State.DEAD and engine_core.cause:
            body["cause"] = engine_core.cause
        return jsonify(body), _PING_STATUS[state]

    @app.get("/execution-parameters")
    def execution_parameters() -> dict[str, Any]:
        # A request for each record has a deadline of its own; a second one keeps the device busy
        # while the reply to the first is sent.
        return {
            "MaxConcurrentTransforms": 2,
            "BatchStrategy": "SINGLE_RECORD",
            "MaxPayloadInMB": min(50, max(1, settings.limits.max_request_bytes // MEGABYTE)),
        }

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.render(), content_type=metrics.content_type)

    @app.get("/openapi.json")
    def openapi_document() -> dict[str, Any]:
        return document

    @app.post("/invocations")
    def invocations() -> Response:
        # Headers, then state, then body, then work: each check costs less than the next.
        connection = request.environ.get("gunicorn.socket")
        g.arrival = time.monotonic() if connection is None else connection.arrival
        _check_attributes()
        kind = body_kind(request.headers.get("Content-Type"))
        accept = Accept.parse(request.headers.get("Accept"))
        accept.best()  # refused before the body is read where no type at all is acceptable
        if request.content_encoding not in (None, "", "identity"):
            raise UserError(
                f"Content-Encoding {request.content_encoding!r} is not read; send the body plain",
                field="Content-Encoding",
                status=415,
                code="unsupported_media_type",
            )
        engine = engine_core.engine()
        places.check()
        body = _read_body(settings.limits)
        handler = Handler(
            engine_core,
            engine,
            bodies,
            settings.limits,
            metrics,
            accept=accept,
            arrival=g.arrival,
            has_left=(lambda: False) if connection is None else connection.has_left,
        )
        places.take()
        try:
            answer = handler.answer(body, kind)
        except BaseException:
            places.give_back()
            raise
        response = Response(answer.body, mimetype=answer.media_type, headers=answer.headers)
        response.call_on_close(places.give_back)
        return response

    @app.after_request
    def echo_attributes(response: Response) -> Response:
        attributes = request.headers.get(CUSTOM_ATTRIBUTES)
        if attributes is not None and _is_passable(attributes):
            response.headers[CUSTOM_ATTRIBUTES] = attributes
        if "arrival" in g:
            arrival, status = g.arrival, response.status_code
            response.call_on_close(lambda: finish(status, arrival))
        return response

    def finish(status: int, arrival: float) -> None:
        seconds = time.monotonic() - arrival
        metrics.count_invocation(status, seconds)
        logger.info("invocation_status=%d; invocation_seconds=%.3f;", status, seconds)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(error: RequestEntityTooLarge) -> tuple[Response, int]:
        return any_error(parsing.too_large(settings.limits))

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[Response, int]:
        status = error.code or 500
        code = (error.name or "error").lower().replace(" ", "_")
        detail = ErrorDetail(
            code=code, message=f"{request.method} {request.path}: {error.name}", field=None
        )
        response = _error_response(detail)
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return response, status

    @app.errorhandler(Exception)
    def any_error(error: Exception) -> tuple[Response, int]:
        log_error(error)
        status, detail = render_error(error)
        response = _error_response(detail)
        if isinstance(error, Busy) and error.retry_after is not None:
            response.headers["Retry-After"] = str(error.retry_after)
        return response, status

    return app


class _Places:
    """Bound on the requests that are being answered; only one whose body has arrived takes a place.

    Any thread may call the methods. `check` and `take` raise `Busy` 429 where no place is free.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Take no place, but raise where there is none: the body need not be received."""
        if self._taken >= self._most:
            raise Busy(
                f"{self._most} requests are being answered, which is the most that this server "
                "takes",
                code="queue_full",
                status=429,
                retry_after=1,
            )

    def take(self) -> None:
        """Take a place, to be given back."""
        with self._lock:
            self.check()
            self._taken += 1

    def give_back(self) -> None:
        """Free a place."""
        with self._lock:
            self._taken -= 1


def _read_body(limits: Limits) -> bytes:
    body = request.get_data(cache=False)
    if len(body) > limits.max_request_bytes:
        raise parsing.too_large(limits)
    expected = request.content_length
    if expected is not None and len(body) < expected:
        raise UserError(
            f"the body ended after {len(body):,} of {expected:,} bytes", code="malformed_body"
        )
    return body


def _check_attributes() -> None:
    attributes = request.headers.get(CUSTOM_ATTRIBUTES)
    if attributes is not None and not _is_passable(attributes):
        raise UserError(
            f"{CUSTOM_ATTRIBUTES} must be at most {_MAX_ATTRIBUTES:,} visible ASCII characters, "
            f"got {len(attributes):,} characters",
            field=CUSTOM_ATTRIBUTES,
            code="bad_custom_attributes",
        )


def _is_passable(attributes: str) -> bool:
    is_visible = attributes.isascii() and attributes.isprintable()
    return len(attributes) <= _MAX_ATTRIBUTES and is_visible


def _error_response(detail: ErrorDetail) -> Response:
    body = ErrorReply(error=detail).model_dump_json()
    return Response(body, mimetype="application/json")
