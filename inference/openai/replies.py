"""Replies in the form of OpenAI's API: the models of their JSON, events, and the OpenAPI document.

What this project says of every generation (seed, scores, timings) stands beside OpenAI's own
fields, which its clients keep.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from inference.api.replies import Generated, RankedCandidate, Reply, Sampling
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
    data: list[ImageData] = Field(
        description="n pictures, or fewer at a deadline, or of alike ones with distinct."
    )
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
    copies: int = Field(
        default=1, description="Number of finished candidates with the same image tokens.", ge=1
    )
    seed: int = Field(description="The seed used.", ge=0)
    sampling: Sampling = Field(description="The settings used, as in a plain reply.")
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


class ImageUrl(Reply):
    """Where a picture is: in the address itself."""

    url: str = Field(description="data:image/png;base64,… in the output_format.")


class ImagePart(RankedCandidate):
    """One picture in the content of a message."""

    type: Literal["image_url"] = Field(default="image_url", description="image_url.")
    index: int = Field(description="Its place in the content, from 0.", ge=0)
    image_url: ImageUrl = Field(description="The picture.")


class ChatMessage(Reply):
    """The model's message: pictures."""

    role: Literal["assistant"] = Field(default="assistant", description="assistant.")
    content: list[ImagePart] = Field(description="Pictures, best first.")


class ChatChoice(Reply):
    """One of n answers."""

    index: int = Field(description="From 0, the best.", ge=0)
    message: ChatMessage = Field(description="The model's message.")
    finish_reason: Literal["stop"] = Field(default="stop", description="stop.")


class ChatUsage(Reply):
    """Tokens of the caption and of the pictures in the reply."""

    prompt_tokens: int = Field(description="Text tokens of the caption.", ge=0)
    completion_tokens: int = Field(
        description="Image tokens of the pictures that are returned, not of all candidates.", ge=0
    )
    total_tokens: int = Field(description="Both together.", ge=0)


class ChatCompletion(Generated):
    """The reply of a chat."""

    id: str = Field(description="Its own, of no use elsewhere.")
    object: Literal["chat.completion"] = Field(
        default="chat.completion", description="chat.completion."
    )
    created: int = Field(description="Unix time in seconds.")
    model: str = Field(description="The model of the server.")
    choices: list[ChatChoice] = Field(
        description="n of them, or fewer at a deadline, or of alike ones with distinct."
    )
    usage: ChatUsage = Field(description="Numbers of tokens.")


class ChatDelta(Reply):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = Field(default=None, description="In the first chunk.")
    content: list[ImagePart] | None = Field(default=None, description="One picture.")


class ChunkChoice(Reply):
    """What a chunk adds to one of n answers."""

    index: int = Field(description="From 0, the best.", ge=0)
    delta: ChatDelta = Field(description="What is added.")
    finish_reason: Literal["stop"] | None = Field(default=None, description="stop in the last.")


class ChatChunk(Reply):
    """A part of the reply of a chat in a stream, which ends with [DONE]."""

    id: str = Field(description="The same in all chunks of a reply.")
    object: Literal["chat.completion.chunk"] = Field(
        default="chat.completion.chunk", description="chat.completion.chunk."
    )
    created: int = Field(description="Unix time in seconds.")
    model: str = Field(description="The model of the server.")
    choices: list[ChunkChoice] = Field(description="One; none where the chunk has the usage.")
    usage: ChatUsage | None = Field(
        default=None, description="In the last chunk, with stream_options.include_usage."
    )
    seed: int | None = Field(default=None, description="In the last chunk of each choice.")
    sampling: Sampling | None = Field(
        default=None, description="The settings used; in the last chunk of each choice."
    )
    warnings: list[str] | None = Field(
        default=None, description="What the model could not read; in the last chunk of each choice."
    )
