"""Replies in the form of OpenAI's API: the models of their JSON, events, and the OpenAPI document.

What this project says of every generation (seed, scores, timings) stands beside OpenAI's own
fields, which its clients keep.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from inference.api.replies import Generated, RankedCandidate, Reply
from inference.api.schema import Format

EventType = Literal[
    "image_generation.partial_image",
    "image_generation.completed",
    "image_edit.partial_image",
    "image_edit.completed",
]


class ImageData(RankedCandidate):
    """One picture of a reply."""

    b64_json: str = Field(description="Base64 file in the output_format.")


class InputTokens(Reply):
    """Tokens of the input, by kind."""

    text_tokens: int = Field(description="Text tokens of the caption.", ge=0)
    image_tokens: int = Field(description="Image tokens that were kept from a picture.", ge=0)


class ImagesUsage(Reply):
    """Tokens of the request and of the pictures in the reply."""

    input_tokens: int = Field(description="Tokens of the input.", ge=0)
    input_tokens_details: InputTokens = Field(description="The same by kind.")
    output_tokens: int = Field(
        description="Image tokens of the pictures that are returned, not of all candidates.", ge=0
    )
    total_tokens: int = Field(description="Both together.", ge=0)


class ImagesReply(Generated):
    """The best pictures, best first."""

    created: int = Field(description="Unix time in seconds.")
    data: list[ImageData] = Field(description="n pictures, or all that were finished in time.")
    background: Literal["opaque"] = Field(default="opaque", description="opaque.")
    output_format: Format = Field(description="File format of the pictures.")
    size: str = Field(description="Width x height, as in 32x32.")
    usage: ImagesUsage = Field(description="Numbers of tokens.")


class _ImageEvent(Reply):
    type: EventType = Field(description="Kind of the event.")
    b64_json: str = Field(description="Base64 file in the output_format.")
    created_at: int = Field(description="Unix time in seconds.")
    size: str = Field(description="Width x height, as in 32x32.")
    quality: Literal["auto"] = Field(default="auto", description="auto.")
    background: Literal["opaque"] = Field(default="opaque", description="opaque.")
    output_format: Format = Field(description="File format of the picture.")


class PartialImageEvent(_ImageEvent):
    """An unfinished picture in a stream: candidate 0, grey below the rows that are sampled."""

    partial_image_index: int = Field(description="From 0.", ge=0)


class CompletedEvent(_ImageEvent):
    """A finished picture in a stream: n of them, best first, end it."""

    usage: ImagesUsage = Field(description="Numbers of tokens of this picture.")
    rank: int = Field(description="1 is the best.", ge=1)
    candidate: int = Field(description="The candidate's number, from 0.", ge=0)
    clip_score: float | None = Field(description="Cosine by CLIP, -1 to 1; null without a CLIP.")
    log_likelihood: float = Field(description="Of its image tokens, in nats, at most 0.")
    seed: int = Field(description="The seed used.", ge=0)
    warnings: list[str] = Field(description="What the model could not read, as in a plain reply.")


class ModelInfo(Reply):
    """The model of this server."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = Field(default="model", description="model.")
    created: int = Field(description="When its training ended, as Unix time; 0: unknown.", ge=0)
    owned_by: str = Field(description="Who trained it: you.")


class ModelList(Reply):
    """The models of this server, of which there is one."""

    object: Literal["list"] = Field(default="list", description="list.")
    data: list[ModelInfo] = Field(description="One model.")


class OpenAIErrorDetail(Reply):
    """What went wrong and how to put it right, in the form of OpenAI's API."""

    message: str = Field(description="The fault and its remedy, in a sentence.")
    type: str = Field(
        description="invalid_request_error, rate_limit_error (429) or server_error (5xx)."
    )
    param: str | None = Field(description="The request field or header at fault, or null.")
    code: str = Field(description="A stable identifier, such as caption_too_long.")


class OpenAIErrorReply(Reply):
    """The body of every error reply of the routes below /v1; in a stream, its last event."""

    error: OpenAIErrorDetail = Field(description="The error.")


class OpenAIErrorEvent(OpenAIErrorReply):
    """The last event of a stream of pictures that broke off."""

    type: Literal["error"] = Field(default="error", description="Kind of the event.")
