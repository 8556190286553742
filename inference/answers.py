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
from dalle.images import ImageFormat
from inference import schema
from inference.control import Cancelled, DeadlineExceeded
from inference.media import JSON, JSON_LINES, JSON_LINES_NAMES
from inference.metrics import Metrics
from inference.render import (
    Candidate,
    ClassifyResult,
    CompleteResult,
    GenerateResult,
    Result,
    check_reply_size,
    render_best,
    render_candidate,
    render_error,
    render_json,
    render_ranking,
    stage_timings,
)
from inference.replies import ErrorLine, ErrorReply, Prediction
from inference.scheduler import Busy, Failed, Job, Scheduler
from inference.schema import (
    GenerateRequest,
    Limits,
    Request,
)

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
        limits: Limits,
        metrics: Metrics,
        *,
        arrival: float,
        gone: Callable[[], bool],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._metrics = metrics
        self._arrival = arrival
        self._gone = gone
        self._on_error = on_error
        self._next_look = 0.0

    def answer_one(self, request: Request, accept: str) -> Answer:
        """The reply to one request in the media type that was negotiated.

        Raises whatever `Scheduler` and `Engine` raise, and `UserError` 406 where the reply to this
        kind of request does not exist in that type. Nothing is submitted after a refusal.
        """
        is_drawing = isinstance(request, GenerateRequest)
        if accept in _IMAGE_FORMATS and not is_drawing:
            raise UserError(
                f"Accept {accept} is for requests with a caption; this one is answered in {JSON}",
                field="Accept",
                status=406,
                code="not_acceptable",
            )
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

    def answer_lines(self, lines: Sequence[bytes], accept: str) -> Answer:
        """One reply line for each request line, in order.

        Only a full queue or a server that is not ready refuses the whole.
        """
        if accept in _IMAGE_FORMATS:
            raise UserError(
                f"Accept {accept} is for one caption; lines are answered in {JSON_LINES}",
                field="Accept",
                status=406,
                code="not_acceptable",
            )
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
            request = schema.parse_request(line.strip(), JSON, limits=self._limits)
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
        self, job: Job, request: GenerateRequest, event: Candidate | Result
    ) -> Iterator[bytes]:
        encode_seconds = 0.0
        uncounted = 0
        try:
            while isinstance(event, Candidate):
                began = time.monotonic()
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
        except Cancelled:
            return
        except Exception as error:
            detail = self._error(error).error
            yield _dump(ErrorLine(error=detail)) + b"\n"
        finally:
            self._metrics.count_candidates(uncounted)
            job.cancel()

    def _submit(self, request: Request, accept: str, *, wait: bool) -> Job:
        engine = self._scheduler.engine()
        if isinstance(request, GenerateRequest) and accept == JSON and engine.image_size:
            check_reply_size(request, engine.image_size, self._limits)
        work = engine.prepare(request)
        seconds = request.deadline_seconds or self._limits.deadline_seconds
        return self._scheduler.submit(
            work, arrival=self._arrival, deadline=self._arrival + seconds, wait=wait
        )

    def _result(self, job: Job) -> Result:
        while isinstance(event := self._next_event(job), Candidate):
            pass
        return event

    def _next_event(self, job: Job) -> Candidate | Result:
        while (event := job.next_event(_LOOK_SECONDS)) is None:
            self._look(job)
        if isinstance(event, Candidate):  # they may come faster than anything times out
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


def _dump(model: BaseModel) -> bytes:
    return model.model_dump_json().encode()
