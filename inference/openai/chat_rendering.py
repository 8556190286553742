"""Results of the model as the reply of a chat: pictures in the content of its messages.

    GenerateResult -> GenerateReply -> ChatCompletion | ChatChunks as server-sent events

Knows nothing of torch or Flask.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence

from inference.api.rendering import (
    Candidate,
    GenerateResult,
    Preview,
    render_error,
    render_json,
)
from inference.api.replies import GenerateReply, RankedImage, Timings
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
    """Server-sent events of a chat: its role, pictures at the end, [DONE]."""

    def __init__(self, call: ChatCall, sizes: Sizes) -> None:
        self._call, self._sizes = call, sizes
        self._id, self._created = _new_id(), int(time.time())
        roles = (
            self._chunk(ChunkChoice(index=index, delta=ChatDelta(role="assistant")))
            for index in range(call.fields.n)
        )
        self.start = b"".join(roles)

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
    ) -> tuple[bytes, Timings]:
        """Return the chunks of the best pictures, and the time of each stage."""
        reply = render_json(
            result, self._call.request, queue_seconds=queue_seconds, warnings=warnings
        )
        chunks = []
        for index, parts in enumerate(_contents(self._call, reply.images)):
            for part in parts:
                chunks.append(
                    self._chunk(ChunkChoice(index=index, delta=ChatDelta(content=[part])))
                )
            last = ChunkChoice(index=index, delta=ChatDelta(), finish_reason="stop")
            chunks.append(self._chunk(last, seed=reply.seed, warnings=reply.warnings))
        if self._call.fields.stream_options.include_usage:
            chunks.append(self._chunk(usage=_usage(self._call, self._sizes, len(reply.images))))
        return b"".join(chunks) + _event("[DONE]"), reply.timings

    def error(self, error: Exception) -> bytes:
        """Return the event that ends a stream which broke off."""
        _, reply = error_reply(*render_error(error), CHAT)
        return _event(OpenAIErrorReply(error=reply.error).model_dump_json())

    def _chunk(
        self,
        *choices: ChunkChoice,
        usage: ChatUsage | None = None,
        seed: int | None = None,
        warnings: list[str] | None = None,
    ) -> bytes:
        chunk = ChatChunk(
            id=self._id,
            created=self._created,
            model=MODEL,
            choices=list(choices),
            usage=usage,
            seed=seed,
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
