"""The WSGI application: routes, headers, bodies and errors. It and `playground` import Flask.

GET  /ping                   503 loading or stopping, 200 ready, 500 dead
POST /invocations            headers -> engine is ready -> body -> Handler.answer
POST /v1/…, GET /v1/models   the same in the form of OpenAI's API; also by route=/v1/… in the header
                             X-Amzn-SageMaker-Custom-Attributes of an invocation
GET  /execution-parameters   for batch transform
GET  /metrics                Prometheus text
GET  /openapi.json           the schema
GET  /                       with DALLE_PLAYGROUND=1, a page to try the model
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from flask import Flask, Response, g, jsonify, request
from pydantic import BaseModel
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge

from dalle.errors import UserError
from inference.api import parsing
from inference.api.parsing import Accept, body_kind
from inference.api.rendering import CUSTOM_ATTRIBUTES, render_error
from inference.api.replies import ErrorDetail, ErrorReply
from inference.api.schema import Limits
from inference.engine.engine_core import EngineCore, State
from inference.engine.request import DeadlineExceeded
from inference.engine.request_queue import Busy
from inference.openai import openapi
from inference.openai.rendering import error_reply, model_info, model_list
from inference.openai.requests import MODELS, ROUTES, check_route
from inference.server.bodies import BodyReader
from inference.server.handler import Answer, Handler, log_error
from inference.server.metrics import Metrics
from inference.server.openai.handler import OpenAIHandler
from inference.server.playground import playground
from inference.settings import MEGABYTE, Settings

logger = logging.getLogger(__name__)

_PING_STATUS = {State.LOADING: 503, State.READY: 200, State.STOPPING: 503, State.DEAD: 500}
_MAX_ATTRIBUTES = 1024  # characters, the platform's limit
# One of several attributes; AWS's own containers are told their route in the same way.
_ROUTE = re.compile(r"(?:^|[\s,;])route=(/[^\s,;]*)")

AnyHandler = TypeVar("AnyHandler", bound=Handler)


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
        engine = engine_core.loaded_engine
        if engine is None:
            return document
        return openapi.with_defaults(document, engine.card.sampling_defaults)

    @app.post("/invocations")
    def invocations() -> Response:
        route = _begin()
        if route is not None:
            return openai(route)
        kind = body_kind(request.headers.get("Content-Type"))
        accept = Accept.parse(request.headers.get("Accept"))
        accept.best()  # refused before the body is read where no type at all is acceptable
        return answer(Handler, accept, lambda handler, take_body: handler.answer(take_body(), kind))

    def openai_by_path() -> Response:
        _begin()
        return openai(request.path)

    for path in ROUTES:
        app.add_url_rule(path, path, openai_by_path, methods=["POST"])

    @app.get(MODELS)
    def models() -> Response:
        return _json(model_list(engine_core.engine().card))

    @app.get(f"{MODELS}/<path:name>")
    def model(name: str) -> Response:
        return _json(model_info(engine_core.engine().card, name))

    def openai(route: str) -> Response:
        """Answer a request of a route below /v1, however it came."""
        g.openai_route = route
        if route == MODELS:
            return models()
        content_type = request.headers.get("Content-Type")
        check_route(route, content_type)
        return answer(
            OpenAIHandler,
            Accept.parse(None),
            lambda handler, take_body: handler.answer_call(route, take_body, content_type),
        )

    def answer(
        kind: type[AnyHandler],
        accept: Accept,
        work: Callable[[AnyHandler, Callable[[], bytes]], Answer],
    ) -> Response:
        """Answer by a handler of a kind, once the body has arrived, which `work` takes once."""
        connection = request.environ.get("gunicorn.socket")
        if request.content_encoding not in (None, "", "identity"):
            raise UserError(
                f"Content-Encoding {request.content_encoding!r} is not read; send the body plain",
                field="Content-Encoding",
                status=415,
                code="unsupported_media_type",
            )
        engine = engine_core.engine()
        places.check()
        take_body = [_read_body(settings.limits)].pop
        handler = kind(
            engine_core,
            engine,
            bodies,
            settings.limits,
            metrics,
            accept=accept,
            arrival=g.arrival,
            has_left=(lambda: False) if connection is None else connection.has_left,
            last_line_break=settings.last_line_break,
        )
        places.take()
        try:
            reply = work(handler, take_body)
        except BaseException:
            places.give_back()
            raise
        response = Response(reply.body, mimetype=reply.media_type, headers=reply.headers)
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
    def too_large(error: RequestEntityTooLarge) -> Response:
        return any_error(parsing.too_large(settings.limits))

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        code = (error.name or "error").lower().replace(" ", "_")
        detail = ErrorDetail(
            code=code, message=f"{request.method} {request.path}: {error.name}", field=None
        )
        response = _error_response(error.code or 500, detail)
        if isinstance(error, MethodNotAllowed) and error.valid_methods:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return response

    @app.errorhandler(Exception)
    def any_error(error: Exception) -> Response:
        log_error(error)
        response = _error_response(*render_error(error))
        if isinstance(error, Busy) and error.retry_after is not None:
            response.headers["Retry-After"] = str(error.retry_after)
        if isinstance(error, DeadlineExceeded):  # OpenAI's clients would repeat it twice
            response.headers["x-should-retry"] = "false"
        return response

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


def _begin() -> str | None:
    """Note the arrival of a request, and return the route that its attributes name, if any.

    Headers, then state, then body, then work: each check costs less than the next.
    """
    connection = request.environ.get("gunicorn.socket")
    g.arrival = time.monotonic() if connection is None else connection.arrival
    _check_attributes()
    found = _ROUTE.search(request.headers.get(CUSTOM_ATTRIBUTES, ""))
    return found[1] if found and found[1] != "/invocations" else None


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


def _json(reply: BaseModel, status: int = 200) -> Response:
    return Response(reply.model_dump_json(), status, mimetype="application/json")


def _error_response(status: int, detail: ErrorDetail) -> Response:
    """Return an error in the form of the route: OpenAI's below /v1."""
    route = g.get("openai_route", request.path)
    reply: BaseModel = ErrorReply(error=detail)
    if route.startswith("/v1/"):
        status, reply = error_reply(status, detail, route)
    return _json(reply, status)
