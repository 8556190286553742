"""One invocation: a body to requests, requests to the engine core, results to the reply.

    body -> parse_request -> Engine.prepare -> EngineCore.submit -> events -> Answer

Knows nothing of Flask.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, TypeAdapter

from dalle.errors import DalleError, UserError
from dalle.preprocess.images import ImageFormat
from inference.api.parsing import (
    JSON,
    JSON_LINES,
    JSON_LINES_NAMES,
    OFFERED_WITHOUT_IMAGE,
    Accept,
    BodyKind,
    parse_request,
    split_lines,
)
from inference.api.rendering import (
    CUSTOM_ATTRIBUTES,
    Candidate,
    ClassifyResult,
    GenerateResult,
    JsonLines,
    Preview,
    Result,
    StreamForm,
    check_reply_size,
    render_best,
    render_error,
    render_json,
    stage_timings,
)
from inference.api.replies import CompleteReply, ErrorReply, Prediction
from inference.api.schema import REQUEST_KINDS, GenerateRequest, Limits, Request
from inference.engine.engine_core import Engine, EngineCore
from inference.engine.error_log import log_unexpected
from inference.engine.request import Cancelled, DeadlineExceeded, EngineRequest, Failed
from inference.engine.request_queue import Busy
from inference.openai import schema as openai
from inference.server.bodies import LARGE_BYTES, BodyReader
from inference.server.metrics import Metrics

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 3.0  # by which the model may miss a deadline before its result is given up
_CHECK_SECONDS = 0.5  # between two checks whether the client is still connected

_HEADER_FIELDS = ("Accept", "Content-Encoding", "Content-Type", CUSTOM_ATTRIBUTES)
_KNOWN_FIELDS = {*_HEADER_FIELDS}.union(
    *(kind.model_fields for kind in (*REQUEST_KINDS.values(), *openai.KINDS))
)
_PREDICTIONS = TypeAdapter(Sequence[Prediction])
_IMAGE_FORMATS: dict[str, ImageFormat] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply. body: whole, or an iterator of parts, whose `close` cancels the rest."""

    body: bytes | Iterator[bytes]
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Handler:
    """Handler of one HTTP request.

    engine: the loaded one, which prepares requests.
    arrival: when the request arrived, on `time.monotonic()`'s scale; deadlines count from there.
    has_left: whether the client has closed the connection.
    last_line_break: whether the reply to a body of lines ends with one.
    """

    engine_core: EngineCore
    engine: Engine
    bodies: BodyReader
    limits: Limits
    metrics: Metrics
    accept: Accept
    arrival: float
    has_left: Callable[[], bool]
    last_line_break: bool = True
    _next_check: float = field(default=0.0, init=False)
    _num_refused: int = field(default=0, init=False)  # lines of a body of lines

    def answer(self, body: bytes, kind: BodyKind) -> Answer:
        """Return the reply to one request, or one reply line for each line of a body.

        Raises what `parse_request`, `Engine.prepare` and `EngineCore.submit` raise, `UserError` 406
        where no type in the Accept header suits the request, and the request's own error.
        """
        if kind is BodyKind.JSON_LINES:
            return self._answer_lines(split_lines(body))
        return self._answer_one(self._parse(body, kind))

    def _parse(self, body: bytes, kind: BodyKind) -> Request:
        if len(body) <= LARGE_BYTES:
            request = parse_request(body, kind, limits=self.limits)
            return self._with_small_images(request)
        return self._read_body(body, kind)

    def _with_small_images(self, request: Request) -> Request:
        """Return a request whose large images are scaled down."""
        return self._read_body(b"", request=request) if request.has_images else request

    def _read_body(
        self, body: bytes, kind: BodyKind = BodyKind.JSON, *, request: Request | None = None
    ) -> Request:
        return self.bodies.read(
            body,
            kind,
            request=request,
            limits=self.limits,
            prime_size=self.engine.image_size,
            clip_square=self.engine.clip_square,
            check=self._check_reading,
        )

    def _check_reading(self, deadline_seconds: float | None) -> None:
        """Give up a request that is still being read: no client any more, or no time left."""
        if self.has_left():
            raise Cancelled("the client closed the connection")
        seconds = deadline_seconds or self.limits.deadline_seconds
        if time.monotonic() > self.arrival + seconds:
            raise DeadlineExceeded(
                f"the deadline of {seconds:g} seconds passed while the body was read",
                field="deadline_seconds",
            )

    def _answer_one(self, request: Request) -> Answer:
        if isinstance(request, GenerateRequest):
            media_type = self.accept.best()
        else:
            what = "a request without a caption"
            media_type = self.accept.best(OFFERED_WITHOUT_IMAGE, what=what)
        prepared = self._submit(request, media_type, wait=False)
        try:
            if isinstance(request, GenerateRequest) and media_type in JSON_LINES_NAMES:
                # The first event is waited for, so that an early failure still sets the status.
                first = self._next_event(prepared)
                stream = self._stream(prepared, JsonLines(request.format), first)
                return Answer(stream, media_type)
            result = self._result(prepared)
        except BaseException:
            prepared.cancel()
            raise
        if isinstance(result, GenerateResult) and media_type in _IMAGE_FORMATS:
            file, headers, timings = render_best(
                result,
                _IMAGE_FORMATS[media_type],
                queue_seconds=prepared.queue_seconds,
                warnings=prepared.warnings,
            )
            self.metrics.count_generation(result, timings)
            return Answer(file, media_type, headers)
        body = self._render(result, request, prepared)
        if media_type in JSON_LINES_NAMES:
            return Answer(body + b"\n", media_type)
        return Answer(body, JSON)

    def _answer_lines(self, lines: Sequence[bytes]) -> Answer:
        """Return one reply line for each request line, in order.

        Every line's deadline counts from the arrival of the whole body, because the platform
        limits the whole invocation: a line that is begun too late is answered with
        deadline_exceeded. Only an Accept of images alone, a full queue or a server that is not
        ready refuses the whole body.
        """
        media_type = self.accept.best(OFFERED_WITHOUT_IMAGE, what="a body of lines")
        first = self._start_line(lines[0], wait=False)
        return Answer(
            self._lines(first, lines[1:]),
            media_type if media_type in JSON_LINES_NAMES else JSON_LINES,
        )

    def _lines(self, first: _Line | bytes, rest: Sequence[bytes]) -> Iterator[bytes]:
        """Yield the reply lines. Each line is generated while the one before it is encoded."""
        before = line = first
        try:
            for text in rest:
                line = self._start_line(text, wait=True)
                yield self._finish_line(before)
                before = line
            last = self._finish_line(before)
            yield last if self.last_line_break else last.removesuffix(b"\n")
        except Cancelled:
            return  # the client has gone
        finally:
            if self._num_refused:
                logger.info("refused: %d of %d lines", self._num_refused, 1 + len(rest))
            for each in (before, line):
                if isinstance(each, _Line):
                    each.prepared.cancel()

    def _start_line(self, line: bytes, *, wait: bool) -> _Line | bytes:
        """Submit a line; return it, or its reply where it is refused."""
        try:
            request = self._parse(line.strip(), BodyKind.JSON)
            self._check_reading(request.deadline_seconds)  # before any image is decoded
            return _Line(request, self._submit(request, JSON, wait=wait))
        except Cancelled:
            raise
        except Exception as error:
            # The first line's error can still be the status of the whole reply, unless it is
            # about this line's deadline alone.
            if not wait and isinstance(error, Busy) and error.code != "too_busy":
                raise
            return self._error_line(error)

    def _finish_line(self, line: _Line | bytes) -> bytes:
        """Wait for a started line and return its reply."""
        if isinstance(line, bytes):
            return line
        try:
            return self._render(self._result(line.prepared), line.request, line.prepared) + b"\n"
        except Cancelled:
            raise
        except Exception as error:
            return self._error_line(error)

    def _error_line(self, error: Exception) -> bytes:
        """Return the reply to a line that is refused; the log has one entry for all of them."""
        self._num_refused += 1
        if not isinstance(error, DalleError):
            log_error(error)
        return _dump(ErrorReply(error=render_error(error)[1])) + b"\n"

    def _stream(
        self, prepared: EngineRequest, form: StreamForm, event: Preview | Candidate | Result
    ) -> Iterator[bytes]:
        encode_seconds = 0.0
        uncounted = 0
        part: bytes | None
        try:
            if form.start:
                yield form.start
            while isinstance(event, Preview | Candidate):
                began = time.monotonic()
                if isinstance(event, Preview):
                    part = form.preview(event)
                else:
                    uncounted += 1
                    part = form.candidate(event)
                encode_seconds += time.monotonic() - began
                if part:
                    yield part
                event = self._next_event(prepared)
            assert isinstance(event, GenerateResult)
            began = time.monotonic()
            parts = iter(
                form.end(
                    event,
                    queue_seconds=prepared.queue_seconds,
                    encode_seconds=encode_seconds,
                    warnings=prepared.warnings,
                )
            )
            following = next(parts, None)
            while (part := following) is not None:
                following = next(parts, None)
                encode_seconds += time.monotonic() - began
                if following is None:  # counted before the client has read the last part
                    timings = stage_timings(event, prepared.queue_seconds, encode_seconds)
                    self.metrics.count_generation(event, timings)
                    uncounted = 0
                yield part
                began = time.monotonic()
        except GeneratorExit:  # the server could not send a part
            log_error(Cancelled("the client closed the stream"))
            raise
        except Cancelled as error:
            log_error(error)
        except Exception as error:
            log_error(error)
            yield form.error(error)
        finally:
            self.metrics.count_candidates(uncounted)
            prepared.cancel()

    def _submit(self, request: Request, media_type: str, *, wait: bool) -> EngineRequest:
        if isinstance(request, GenerateRequest):
            if request.preview_rows is not None and media_type not in JSON_LINES_NAMES:
                raise UserError(
                    f"preview_rows is for streams: ask with Accept: {JSON_LINES}, got "
                    f"{media_type}; lines of one body have no previews",
                    field="preview_rows",
                    status=422,
                    code="invalid_request",
                )
            if media_type == JSON and self.engine.image_size:
                check_reply_size(request, self.engine.image_size, self.limits)
        return self._enqueue(request, wait=wait)

    def _enqueue(self, request: Request, *, wait: bool) -> EngineRequest:
        """Prepare a request and put it into the queue."""
        prepared = self._prepare(request)
        self.engine_core.submit(prepared, wait=wait)
        return prepared

    def _prepare(self, request: Request) -> EngineRequest:
        seconds = request.deadline_seconds or self.limits.deadline_seconds
        return self.engine.prepare(request, arrival=self.arrival, deadline=self.arrival + seconds)

    def _result(self, prepared: EngineRequest) -> Result:
        while isinstance(event := self._next_event(prepared), Preview | Candidate):
            pass
        return event

    def _next_event(self, prepared: EngineRequest) -> Preview | Candidate | Result:
        while (event := prepared.next_event(_CHECK_SECONDS)) is None:
            self._check(prepared)
        if isinstance(event, Preview | Candidate):  # these may come too fast for any time-out
            self._check(prepared)
        if isinstance(event, Failed):
            raise event.error
        return event

    def _check(self, prepared: EngineRequest) -> None:
        """Cancel the request when its client has gone or its deadline is long past."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_SECONDS
        if self.has_left():
            prepared.cancel()
            raise Cancelled("the client closed the connection")
        if prepared.seconds_left() < -_GRACE_SECONDS:
            prepared.cancel()
            raise DeadlineExceeded(
                "the deadline passed and the model did not stop in time", field="deadline_seconds"
            )

    def _render(self, result: Result, request: Request, prepared: EngineRequest) -> bytes:
        if isinstance(result, ClassifyResult):
            return _PREDICTIONS.dump_json(result.predictions)
        if isinstance(result, CompleteReply):
            return _dump(result)
        assert isinstance(request, GenerateRequest)
        reply = render_json(
            result, request, queue_seconds=prepared.queue_seconds, warnings=prepared.warnings
        )
        self.metrics.count_generation(result, reply.timings)
        return _dump(reply)


@dataclass(frozen=True, slots=True)
class _Line:
    """A submitted line of a JSON-lines body."""

    request: Request
    prepared: EngineRequest


def log_error(error: Exception) -> None:
    """Log a refusal or cancellation in one line, any other error with its traceback.

    The message of a `UserError` quotes the request, that of an unexpected error may, and so does a
    field that is unknown: none of them is in the log above DEBUG.
    """
    if isinstance(error, Cancelled):
        logger.info("cancelled: %s", error)
    elif isinstance(error, UserError):
        name = (error.field or "").partition("[")[0]
        field = error.field if name in _KNOWN_FIELDS else "unknown" if name else None
        logger.info("refused: status=%d; code=%s; field=%s", error.status, error.code, field)
        logger.debug("%s", error)
    elif isinstance(error, DalleError):
        logger.info("refused: status=%d; code=%s; %s", error.status, error.code, error)
    else:
        log_unexpected(logger, "internal error", error)


def _dump(model: BaseModel) -> bytes:
    return model.model_dump_json().encode()
