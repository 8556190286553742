"""One request of OpenAI's clients: the same way through the engine as an invocation's.

    body -> Call -> EngineCore.submit -> events -> Answer in OpenAI's form

Knows nothing of Flask.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from inference.api.parsing import JSON
from inference.api.rendering import GenerateResult, StreamForm, check_reply_size, render_json
from inference.api.schema import GenerateRequest, Request
from inference.engine.request import EngineRequest, PreparedGeneration
from inference.openai.chat import ChatCall, naming_what_was_sent, read_chat
from inference.openai.chat_rendering import ChatStream, chat_reply
from inference.openai.edits import read_edit
from inference.openai.rendering import EVENT_STREAM, ImagesStream, Sizes, images_reply
from inference.openai.requests import CHAT, EDITS, Call, read_generation
from inference.server.bodies import LARGE_BYTES
from inference.server.handler import Answer, Handler


class OpenAIHandler(Handler):
    """Handler of one HTTP request in OpenAI's form. Its Accept header decides nothing."""

    def answer_call(
        self, route: str, take_body: Callable[[], bytes], content_type: str | None
    ) -> Answer:
        """Return the reply to a request of one of `openai.requests.ROUTES`.

        take_body: hands the body over, so that nothing holds it while pictures are made.
        content_type: the header. Raises what `read_generation`, `read_edit`, `read_chat`,
        `Engine.prepare` and `EngineCore.submit` raise, and the request's own error.
        """
        call = self._read(route, take_body(), content_type)
        request = self._with_small_images(call.request)
        assert isinstance(request, GenerateRequest)
        call = replace(call, request=request)
        if not call.fields.stream and self.engine.image_size:
            remedy = "for output_format jpeg or webp, or for a stream"
            with naming_what_was_sent(call.fields) if isinstance(call, ChatCall) else nullcontext():
                check_reply_size(request, self.engine.image_size, self.limits, remedy=remedy)
        prepared = self._enqueue(request, wait=False)
        try:
            sizes = self._sizes(prepared)
            if call.fields.stream:
                # The first event is waited for, so that an early failure still sets the status.
                first = self._next_event(prepared)
                form: StreamForm = (
                    ChatStream(call, sizes)
                    if isinstance(call, ChatCall)
                    else ImagesStream(call, sizes, route)
                )
                return Answer(self._stream(prepared, form, first), EVENT_STREAM)
            result = self._result(prepared)
        except BaseException:
            prepared.cancel()
            raise
        assert isinstance(result, GenerateResult)
        reply = render_json(
            result, request, queue_seconds=prepared.queue_seconds, warnings=prepared.warnings
        )
        self.metrics.count_generation(result, reply.timings)
        if isinstance(call, ChatCall):
            return Answer(chat_reply(call, reply, sizes).model_dump_json().encode(), JSON)
        return Answer(images_reply(call, reply, sizes).model_dump_json().encode(), JSON)

    def _read(self, route: str, body: bytes, content_type: str | None) -> Call | ChatCall:
        image_size, grid_size = self.engine.image_size, self.engine.card.grid_size
        if route == CHAT:
            if len(body) > LARGE_BYTES:  # a history that holds pictures
                body = self.bodies.without_history(body, check=self._check_reading)
            return read_chat(body, limits=self.limits)
        if route == EDITS:
            return read_edit(
                body,
                content_type,
                limits=self.limits,
                image_size=image_size,
                grid_size=grid_size,
            )
        return read_generation(body, limits=self.limits, image_size=image_size, grid_size=grid_size)

    def _prepare(self, request: Request) -> EngineRequest:
        prepared = super()._prepare(request)
        if isinstance(prepared, PreparedGeneration):
            prepared.num_previewed = 1  # `ImagesStream` sends no others
        return prepared

    def _sizes(self, prepared: EngineRequest) -> Sizes:
        return Sizes(
            self.engine.image_size or 0,
            self.engine.card.grid_size or 0,
            text_tokens=prepared.num_text_tokens,
        )
