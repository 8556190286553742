"""Results of the model in the form of OpenAI's API.

    GenerateResult -> GenerateReply -> ImagesReply | server-sent events

Knows nothing of torch or Flask.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dalle.errors import UserError
from inference.api.rendering import (
    Candidate,
    GenerateResult,
    Preview,
    render_error,
    render_images,
    render_preview,
)
from inference.api.replies import ErrorDetail, GenerateReply, Reply
from inference.api.schema import GenerateRequest
from inference.openai.replies import (
    CompletedEvent,
    ImageData,
    ImagesReply,
    ImagesUsage,
    InputTokens,
    ModelInfo,
    ModelList,
    OpenAIErrorDetail,
    OpenAIErrorEvent,
    OpenAIErrorReply,
    PartialImageEvent,
)
from inference.openai.requests import EDITS, Call, in_their_words
from inference.openai.schema import MODEL

if TYPE_CHECKING:  # it imports torch
    from dalle.model_card import ModelCard

EVENT_STREAM = "text/event-stream"

_SCORES = ("rank", "candidate", "clip_score", "log_likelihood", "copies")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers that replies state. image_size: side in pixels; grid_size: side of the token grid;
    text_tokens: of the caption."""

    image_size: int
    grid_size: int
    text_tokens: int

    @property
    def size(self) -> str:
        """Width x height, as in 32x32."""
        return f"{self.image_size}x{self.image_size}"

    def usage(self, request: GenerateRequest, num_images: int) -> ImagesUsage:
        """Return the tokens of a request and of so many of its pictures."""
        kept = request.prime_rows * self.grid_size
        input_tokens = self.text_tokens + kept
        output_tokens = num_images * self.grid_size**2
        return ImagesUsage(
            input_tokens=input_tokens,
            input_tokens_details=InputTokens(text_tokens=self.text_tokens, image_tokens=kept),
            output_tokens=output_tokens,
            total_tokens=input_tokens + output_tokens,
        )


def images_reply(call: Call, reply: GenerateReply, sizes: Sizes) -> ImagesReply:
    """Return the reply with the best pictures."""
    return ImagesReply(
        **facts(reply),
        created=int(time.time()),
        data=[
            ImageData(b64_json=each.image, **each.model_dump(exclude={"image"}))
            for each in reply.images
        ],
        output_format=call.request.format,
        size=sizes.size,
        usage=sizes.usage(call.request, len(reply.images)),
    )


class ImagesStream:
    """Server-sent events of OpenAI's images routes."""

    start = b""

    def __init__(self, call: Call, sizes: Sizes, route: str) -> None:
        self._call, self._sizes, self._route = call, sizes, route
        self._kind = "image_edit" if route == EDITS else "image_generation"
        self._num_partial = 0

    def preview(self, preview: Preview) -> bytes:
        """Return the event of an unfinished candidate; of others than the first there is none."""
        if preview.number or self._num_partial >= self._call.fields.partial_images:
            return b""
        image = render_preview(preview, self._call.request.format).image
        event = PartialImageEvent(
            partial_image_index=self._num_partial, **self._common("partial_image", image)
        )
        self._num_partial += 1
        return _event(event, event.type)

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
        """Yield the event of each of the best pictures."""
        for each in render_images(result, self._call.request):
            event = CompletedEvent(
                usage=self._sizes.usage(self._call.request, 1),
                seed=result.seed,
                sampling=result.sampling,
                warnings=[*warnings],
                **{name: getattr(each, name) for name in _SCORES},
                **self._common("completed", each.image),
            )
            yield _event(event, event.type)

    def error(self, error: Exception) -> bytes:
        """Return the event that ends a stream which broke off."""
        _, reply = error_reply(*render_error(error), self._route)
        return _event(OpenAIErrorEvent(error=reply.error), "error")

    def _common(self, what: str, image: str) -> dict[str, Any]:
        return {
            "type": f"{self._kind}.{what}",
            "b64_json": image,
            "created_at": int(time.time()),
            "size": self._sizes.size,
            "output_format": self._call.request.format,
        }


def error_reply(status: int, detail: ErrorDetail, route: str) -> tuple[int, OpenAIErrorReply]:
    """Return status and body of an error in OpenAI's form.

    Faults of a field are a 400 there, which its clients raise as BadRequestError.
    """
    status = 400 if status == 422 else status
    kind = "rate_limit_error" if status == 429 else "invalid_request_error"
    message, field = in_their_words(detail.message, detail.field, route)
    return status, OpenAIErrorReply(
        error=OpenAIErrorDetail(
            message=message,
            type="server_error" if status >= 500 else kind,
            param=field,
            code=detail.code,
        )
    )


def model_list(card: ModelCard) -> ModelList:
    """Return the list of models. card: of the one that the server has."""
    times = [_unix_seconds(each.finished_at) for each in card.components]
    model = ModelInfo(id=MODEL, created=max(times, default=0), owned_by="you")
    return ModelList(data=[model])


def _unix_seconds(time: str) -> int:
    """Return the seconds from 1970 to an ISO 8601 time with its zone; 0 for any other text."""
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return 0
    return 0 if moment.tzinfo is None else max(0, int(moment.timestamp()))


def model_info(card: ModelCard, name: str) -> ModelInfo:
    """Return the model of a name. Raises `UserError` 404 for another than the server has."""
    (model,) = model_list(card).data
    if name != model.id:
        raise UserError(
            f"the model {name[:100]!r} does not exist: this server has {model.id!r}",
            field="model",
            status=404,
            code="model_not_found",
        )
    return model


def facts(reply: GenerateReply) -> dict[str, Any]:
    """Return what a reply says of its generation besides the pictures."""
    return {name: getattr(reply, name) for name in GenerateReply.model_fields if name != "images"}


def _event(data: Reply, name: str) -> bytes:
    """Return one server-sent event."""
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n".encode()
