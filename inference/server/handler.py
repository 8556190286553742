"""A parsed request through the queue to its reply: the waiting, the streams, the lines.

Knows nothing of Flask, but that somebody waits: `Waiter.gone` says when nobody does any more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, TypeAdapter

from dalle.errors import UserError
from dalle.preprocess.images import ImageFormat
from inference.api.content_types import (
    JSON,
    JSON_LINES,
    JSON_LINES_NAMES,
    OFFERED_WITHOUT_PICTURE,
    negotiate,
)
from inference.api.rendering import (
    Candidate,
    ClassifyResult,
    CompleteResult,
    GenerateResult,
    Preview,
    Result,
    check_reply_size,
    render_best,
    render_candidate,
    render_error,
    render_json,
    render_preview,
    render_ranking,
    stage_timings,
)
from inference.api.replies import ErrorLine, ErrorReply, Prediction
from inference.api.schema import GenerateRequest, Limits, Request
from inference.engine.control import Cancelled, DeadlineExceeded
from inference.engine.engine_core import Scheduler
from inference.engine.request import Failed, Job
from inference.engine.request_queue import Busy
from inference.server.body_process import Shrinker
from inference.server.metrics import Metrics

LINES_AHEAD = 2  # of a JSON-lines body: the next line is drawn while the last one is encoded
_GRACE_SECONDS = 3.0  # how long the model may overrun a deadline before its answer is given up
_LOOK_SECONDS = 0.5  # how often a waiting thread looks whether its client is still there

_PREDICTIONS = TypeAdapter(Sequence[Prediction])
_IMAGE_FORMATS: dict[str, ImageFormat] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply. body: whole, or an iterator of parts; close it to give its work up."""

    body: bytes | Iterator[bytes]
    media_type: str
    headers: dict[str, str]


class Waiter:
    """One HTTP request's way through the scheduler.

    arrival: when it arrived, on `time.monotonic()`'s scale; deadlines count from there.
    gone: whether the client has closed the connection.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        shrinker: Shrinker,
        limits: Limits,
        metrics: Metrics,
        *,
        arrival: float,
        gone: Callable[[], bool],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._scheduler = scheduler
        self._shrinker = shrinker
        self._limits = limits
        self._metrics = metrics
        self._arrival = arrival
        self._gone = gone
        self._on_error = on_error
        self._next_look = 0.0

    def parse(self, body: bytes, content_type: str | None) -> Request:
        """One request. Raises what `Shrinker.parse` and `Scheduler.engine` raise."""
        engine = self._scheduler.engine()
        return self._shrinker.parse(
            body,
            content_type,
            limits=self._limits,
            prime_size=engine.image_size,
            clip_size=engine.clip_size,
        )

    def answer_one(self, request: Request, accept: str | None) -> Answer:
        """The reply to one request, in the type that the Accept header wishes most of those that
        this kind of request can be answered in.

        Raises whatever `Scheduler` and `Engine` raise, and `UserError` 406 where there is no such
        type. Nothing is submitted after a refusal.
        """
        if isinstance(request, GenerateRequest):
            accept = negotiate(accept)
        else:
            what = "a request without a caption to draw"
            accept = negotiate(accept, OFFERED_WITHOUT_PICTURE, what=what)
        job = self._submit(request, accept, wait=False)
        try:
            if isinstance(request, GenerateRequest) and accept in JSON_LINES_NAMES:
                # The first event is waited for, so that a failure still has its own status.
                first = self._next_event(job)
                return Answer(self._stream(job, request, first), accept, {})
            result = self._result(job)
        except BaseException:
            job.cancel()
            raise
        if isinstance(result, GenerateResult) and accept in _IMAGE_FORMATS:
            began = time.monotonic()
            file, headers = render_best(result, _IMAGE_FORMATS[accept])
            encode_seconds = time.monotonic() - began
            timings = stage_timings(result, job.queue_seconds, encode_seconds)
            self._metrics.count_generation(result, timings)
            return Answer(file, accept, headers)
        body = self._render(result, request, job)
        if accept in JSON_LINES_NAMES:
            return Answer(body + b"\n", accept, {})
        return Answer(body, JSON, {})

    def answer_lines(self, lines: Sequence[bytes], accept: str | None) -> Answer:
        """One reply line for each request line, in order.

        Every line's deadline counts from the arrival of the whole body, because the platform, too,
        gives the whole invocation one time: a line whose turn comes too late is answered with
        deadline_exceeded in its place. Only an Accept of pictures alone, a full queue or a server
        that is not ready refuses the whole.
        """
        accept = negotiate(accept, OFFERED_WITHOUT_PICTURE, what="a body of lines")
        media_type = accept if accept in JSON_LINES_NAMES else JSON_LINES
        first = self._start_line(lines[0], wait=False)
        return Answer(self._lines(first, lines[1:]), media_type, {})

    def _lines(self, first: _Line, rest: Sequence[bytes]) -> Iterator[bytes]:
        started = deque([first])
        try:
            for line in rest:
                while len(started) >= LINES_AHEAD:
                    yield self._finish_line(started.popleft())
                started.append(self._start_line(line, wait=True))
            while started:
                yield self._finish_line(started.popleft())
        except Cancelled:
            return  # nobody reads the rest
        finally:
            for each in started:
                if each.job is not None:
                    each.job.cancel()

    def _start_line(self, line: bytes, *, wait: bool) -> _Line:
        try:
            request = self.parse(line.strip(), JSON)
            return _Line(request, self._submit(request, JSON, wait=wait), None)
        except Exception as error:
            # Before anything was answered the whole request can still be refused; but that there
            # is too much to do for this line's own deadline says nothing of the other lines.
            if not wait and isinstance(error, Busy) and error.code != "too_busy":
                raise
            return _Line(None, None, self._error(error))

    def _finish_line(self, line: _Line) -> bytes:
        if line.request is None or line.job is None:
            assert line.error is not None
            return _dump(line.error) + b"\n"
        try:
            return self._render(self._result(line.job), line.request, line.job) + b"\n"
        except Cancelled:
            raise
        except Exception as error:
            return _dump(self._error(error)) + b"\n"
        finally:
            line.job.cancel()

    def _stream(
        self, job: Job, request: GenerateRequest, event: Preview | Candidate | Result
    ) -> Iterator[bytes]:
        encode_seconds = 0.0
        uncounted = 0
        try:
            while isinstance(event, Preview | Candidate):
                began = time.monotonic()
                if isinstance(event, Preview):
                    line = _dump(render_preview(event, request.format)) + b"\n"
                else:
                    uncounted += 1
                    line = _dump(render_candidate(event, request.format)) + b"\n"
                encode_seconds += time.monotonic() - began
                yield line
                event = self._next_event(job)
            assert isinstance(event, GenerateResult)
            ranking = render_ranking(
                event, queue_seconds=job.queue_seconds, encode_seconds=encode_seconds
            )
            self._metrics.count_generation(event, ranking.timings)
            uncounted = 0
            yield _dump(ranking) + b"\n"
        except GeneratorExit:  # whoever sends the lines could not
            self._on_error(Cancelled("the client closed the stream"))
            raise
        except Cancelled as error:
            self._on_error(error)
        except Exception as error:
            detail = self._error(error).error
            yield _dump(ErrorLine(error=detail)) + b"\n"
        finally:
            self._metrics.count_candidates(uncounted)
            job.cancel()

    def _submit(self, request: Request, accept: str, *, wait: bool) -> Job:
        engine = self._scheduler.engine()
        if isinstance(request, GenerateRequest) and request.preview_rows is not None:
            _check_streamed(accept)
        if isinstance(request, GenerateRequest) and accept == JSON and engine.image_size:
            check_reply_size(request, engine.image_size, self._limits)
        work = engine.prepare(request)
        seconds = request.deadline_seconds or self._limits.deadline_seconds
        return self._scheduler.submit(
            work, arrival=self._arrival, deadline=self._arrival + seconds, wait=wait
        )

    def _result(self, job: Job) -> Result:
        while isinstance(event := self._next_event(job), Preview | Candidate):
            pass
        return event

    def _next_event(self, job: Job) -> Preview | Candidate | Result:
        while (event := job.next_event(_LOOK_SECONDS)) is None:
            self._look(job)
        if isinstance(event, Preview | Candidate):  # they may come faster than anything times out
            self._look(job)
        if isinstance(event, Failed):
            raise event.error
        return event

    def _look(self, job: Job) -> None:
        """Give the job up when its client has gone or its deadline is long past."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        if self._gone():
            job.cancel()
            raise Cancelled("the client closed the connection")
        if job.control.seconds_left() < -_GRACE_SECONDS:
            job.cancel()
            raise DeadlineExceeded(
                "the deadline passed and the model did not stop in time", field="deadline_seconds"
            )

    def _render(self, result: Result, request: Request, job: Job) -> bytes:
        if isinstance(result, ClassifyResult):
            return _PREDICTIONS.dump_json(result.predictions)
        if isinstance(result, CompleteResult):
            return _dump(result.reply)
        assert isinstance(request, GenerateRequest)
        reply = render_json(result, request, queue_seconds=job.queue_seconds)
        self._metrics.count_generation(result, reply.timings)
        return _dump(reply)

    def _error(self, error: Exception) -> ErrorReply:
        self._on_error(error)
        return ErrorReply(error=render_error(error)[1])


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a body that was started: a request with its job, or the error in their place."""

    request: Request | None
    job: Job | None
    error: ErrorReply | None


def _check_streamed(accept: str) -> None:
    if accept not in JSON_LINES_NAMES:
        raise UserError(
            f"preview_rows is for streams: ask with Accept: {JSON_LINES}, got {accept}; lines of "
            "one body have no previews",
            field="preview_rows",
            status=422,
            code="invalid_request",
        )


def _dump(model: BaseModel) -> bytes:
    return model.model_dump_json().encode()
