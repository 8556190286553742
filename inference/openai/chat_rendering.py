"""Results of the model as the reply of a chat: pictures in the content of its messages.

    GenerateResult -> GenerateReply -> ChatCompletion | ChatChunks as server-sent events

Knows nothing of torch or Flask.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence

from inference.api.rendering import (
    Candidate,
    GenerateResult,
    Preview,
    render_error,
    render_images,
)
from inference.api.replies import GenerateReply, RankedImage, Sampling
from inference.openai.chat import ChatCall
from inference.openai.rendering import Sizes, error_reply, facts
from inference.openai.replies import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    ChatUsage,
    ChunkChoice,
    ImagePart,
    ImageUrl,
    OpenAIErrorReply,
)
from inference.openai.requests import CHAT
from inference.openai.schema import MODEL


def chat_reply(call: ChatCall, reply: GenerateReply, sizes: Sizes) -> ChatCompletion:
    """Return the reply with the best pictures: one in each choice, or all in the only one."""
    return ChatCompletion(
        **facts(reply),
        id=_new_id(),
        created=int(time.time()),
        model=MODEL,
        choices=[
            ChatChoice(index=index, message=ChatMessage(content=parts))
            for index, parts in enumerate(_contents(call, reply.images))
        ],
        usage=_usage(call, sizes, len(reply.images)),
    )


class ChatStream:
    """Server-sent events of a chat: role of the first choice, pictures at the end, [DONE]."""

    def __init__(self, call: ChatCall, sizes: Sizes) -> None:
        self._call, self._sizes = call, sizes
        self._id, self._created = _new_id(), int(time.time())
        # A deadline or `distinct` may leave fewer choices: each other one begins with its picture.
        self.start = self._role(0)

    def preview(self, preview: Preview) -> bytes:
        """Return nothing: what is in a message stays there."""
        return b""

    def candidate(self, candidate: Candidate) -> bytes:
        """Return nothing: which candidates are the best is known at the end."""
        return b""

    def end(
        self,
        result: GenerateResult,
        *,
        queue_seconds: float,
        encode_seconds: float,
        warnings: Sequence[str],
    ) -> Iterator[bytes]:
        """Yield the chunks of each of the best pictures, then those of the end."""
        has_choices = self._call.fields.n > 1
        num_images = 0
        for number, image in enumerate(render_images(result, self._call.request)):
            choice, place = (number, 0) if has_choices else (0, number)
            if choice:
                yield self._role(choice)
            delta = ChatDelta(content=[_part(self._call, image, place)])
            yield self._chunk(ChunkChoice(index=choice, delta=delta))
            if has_choices:
                yield self._stop(choice, result, warnings)
            num_images += 1
        if not has_choices:
            yield self._stop(0, result, warnings)
        if self._call.fields.stream_options.include_usage:
            yield self._chunk(usage=_usage(self._call, self._sizes, num_images))
        yield _event("[DONE]")

    def error(self, error: Exception) -> bytes:
        """Return the event that ends a stream which broke off."""
        _, reply = error_reply(*render_error(error), CHAT)
        return _event(OpenAIErrorReply(error=reply.error).model_dump_json())

    def _role(self, choice: int) -> bytes:
        return self._chunk(ChunkChoice(index=choice, delta=ChatDelta(role="assistant")))

    def _stop(self, choice: int, result: GenerateResult, warnings: Sequence[str]) -> bytes:
        last = ChunkChoice(index=choice, delta=ChatDelta(), finish_reason="stop")
        return self._chunk(last, seed=result.seed, sampling=result.sampling, warnings=[*warnings])

    def _chunk(
        self,
        *choices: ChunkChoice,
        usage: ChatUsage | None = None,
        seed: int | None = None,
        sampling: Sampling | None = None,
        warnings: list[str] | None = None,
    ) -> bytes:
        chunk = ChatChunk(
            id=self._id,
            created=self._created,
            model=MODEL,
            choices=list(choices),
            usage=usage,
            seed=seed,
            sampling=sampling,
            warnings=warnings,
        )
        fields = chunk.model_dump(exclude_none=True)
        for choice in fields["choices"]:
            choice.setdefault("finish_reason", None)  # which OpenAI's API always has
        return _event(json.dumps(fields))


def _contents(call: ChatCall, images: Sequence[RankedImage]) -> list[list[ImagePart]]:
    """Return the content of each choice."""
    if call.fields.n > 1:
        return [[_part(call, image, 0)] for image in images]
    return [[_part(call, image, index) for index, image in enumerate(images)]]


def _part(call: ChatCall, image: RankedImage, index: int) -> ImagePart:
    return ImagePart(
        **image.model_dump(exclude={"image"}),
        index=index,
        image_url=ImageUrl(url=f"data:image/{call.request.format};base64,{image.image}"),
    )


def _usage(call: ChatCall, sizes: Sizes, num_images: int) -> ChatUsage:
    tokens = sizes.usage(call.request, num_images)
    return ChatUsage(
        prompt_tokens=tokens.input_tokens,
        completion_tokens=tokens.output_tokens,
        total_tokens=tokens.total_tokens,
    )


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _event(data: str) -> bytes:
    """Return one server-sent event without a name, as OpenAI's chats have them."""
    return f"data: {data}\n\n".encode()
