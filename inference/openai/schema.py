"""Requests of OpenAI's clients, field by field. `requests` makes this project's own of them.

Fields of OpenAI's API that mean nothing for this model are taken where that changes no picture, and
refused by name elsewhere. The tables of inference/REFERENCE.md and the OpenAPI document are
generated from these descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dalle.versions import OURS
from inference.api.schema import Caption, Format, GenerateRequest

MODEL = OURS
"""The name of the one model that a server has."""
MAX_PARTIAL_IMAGES = 3

_OWN = {"caption", "num_images", "format", "preview_rows"}
PASSED = tuple(name for name in GenerateRequest.model_fields if name not in _OWN)
"""Fields of `GenerateRequest` that every request in OpenAI's form may have besides its own."""
DEFAULTS: Mapping[str, Any] = {"distinct": False}
"""Defaults of these that are OpenAI's: n pictures are n, however alike they are."""
PASSED_BY_EDITS = tuple(name for name in PASSED if name not in ("prime_image", "prime_rows"))
"""The same of POST /v1/images/edits, where image and mask say what is kept."""
PASSED_BY_CHATS = PASSED
"""The same of POST /v1/chat/completions; seed, temperature and top_p are OpenAI's own names."""


def _b64_json(value: object) -> object:
    if value == "url":
        raise PydanticCustomError(
            "url", "must be b64_json: the server stores no picture that an address could lead to"
        )
    return value


def _empty(value: object) -> object:
    if value:
        raise PydanticCustomError("empty", "must be empty: the model answers with pictures alone")
    return value


def _zero(value: float) -> float:
    if value:
        raise PydanticCustomError("zero", "must be 0: image tokens are not penalised")
    return value


Name = Annotated[str, Field(max_length=1_000)]
ResponseFormat = Annotated[Literal["b64_json"], BeforeValidator(_b64_json)]

Empty = Annotated[Any, BeforeValidator(_empty)]
Zero = Annotated[float, AfterValidator(_zero)]


class Fields(BaseModel):
    """What requests of all kinds have. null is the default of every field, as in OpenAI's API."""

    # strict: "3" is not 3, and true is not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: Name = Field(
        default="",
        description="Any name or none: a server has one model. `GET /v1/models` gives its name.",
    )
    stream: bool = Field(
        default=False, description="Whether the reply is a stream of server-sent events."
    )
    user: Name = Field(default="", description="Taken, of no effect, and not logged.")
    safety_identifier: Name = Field(default="", description="As user.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class ImagesRequest(Fields):
    """Generate pictures for a prompt: POST /v1/images/generations."""

    prompt: Caption = Field(
        description="The caption. 1 to 2,000 characters without the blanks around them, and no "
        "more text tokens than the model reads."
    )
    n: int = Field(
        default=1,
        ge=1,
        description="Number of pictures in the reply: the best of num_candidates, best first. At "
        "least 1, at most num_candidates (which is 16 or n unless given) and the server's limit. "
        "Fewer are returned at a deadline, and of alike ones with distinct.",
    )
    size: str = Field(
        default="auto",
        max_length=100,
        description="auto, or the model's own, as in 32x32; another one is refused.",
    )
    response_format: ResponseFormat = Field(
        default="b64_json", description="b64_json; url is refused, since no picture is stored."
    )
    output_format: Format = Field(
        default="png", description="File format of the pictures: png, jpeg or webp."
    )
    output_compression: Literal[100] = Field(
        default=100, description="100; others are refused: jpeg and webp have a fixed quality."
    )
    partial_images: int = Field(
        default=0,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        description="In a stream, the number of unfinished pictures that are sent before: of "
        "candidate 0, evenly spaced, fewer where the image-token grid has few rows or the client "
        "reads slowly. 0 to 3; above 0 it needs stream.",
    )
    background: Literal["auto", "opaque"] = Field(
        default="auto", description="auto or opaque, which pictures are; transparent is refused."
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        default="auto", description="OpenAI's values are taken, of no effect: use num_candidates."
    )
    style: Literal["vivid", "natural"] = Field(
        default="natural", description="OpenAI's values are taken, of no effect."
    )
    moderation: Literal["auto", "low"] = Field(
        default="auto", description="OpenAI's values are taken, of no effect: nothing is moderated."
    )

    @field_validator("size")
    @classmethod
    def _is_own_size(cls, size: str, info: ValidationInfo) -> str:
        side = (info.context or {}).get("image_size")
        if side is not None and size not in ("auto", f"{side}x{side}"):
            raise PydanticCustomError("size", "must be auto or {own}", {"own": f"{side}x{side}"})
        return size

    @model_validator(mode="after")
    def _streams_what_is_partial(self) -> ImagesRequest:
        if self.partial_images and not self.stream:
            raise PydanticCustomError(
                "partial_images",
                "partial_images is for streams: give stream true, got partial_images {number}",
                {"number": self.partial_images},
            )
        return self


class EditRequest(ImagesRequest):
    """Continue an image below its top rows: POST /v1/images/edits, as multipart/form-data."""

    image: bytes = Field(
        description="The file of one image (PNG, JPEG, WebP, GIF or BMP), cut to its centre square "
        "and scaled to the model's size."
    )
    mask: bytes | None = Field(
        default=None,
        description="A PNG or WebP file of the image's width and height, at most 4,194,304 "
        "pixels, whose alpha channel is above 0 in the rows that are kept, from the top over the "
        "whole width, and 0 in all below. The rows end where a row of the image-token grid does. "
        "Any other mask is refused. Without a mask, the image's own alpha channel.",
    )
    input_fidelity: Literal["high", "low"] = Field(
        default="high", description="OpenAI's values are taken, of no effect."
    )


class StreamOptions(BaseModel):
    """What a stream of a chat has besides the reply."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    include_usage: bool = Field(default=False, description="Whether the numbers of tokens follow.")


class TextFormat(BaseModel):
    """The form of text in a reply, which has none. What belongs to a type is not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    type: Literal["text"] = Field(description="text.")


class ChatRequest(Fields):
    """Answer with pictures of the last user message: POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(
        description="The last one whose role is user is the caption: its content is a text, or "
        "parts of type text. All others are ignored; an image among the parts is refused."
    )
    n: int = Field(
        default=1,
        ge=1,
        description="Number of choices, each with one picture: the best of num_candidates, best "
        "first. There are fewer at a deadline, and of alike pictures with distinct.",
    )
    num_images: int = Field(
        default=1,
        ge=1,
        description="Number of pictures in the content of the only choice; n must be 1 then.",
    )
    output_format: Format = Field(
        default="png", description="File format of the pictures: png, jpeg or webp."
    )
    stream_options: StreamOptions = Field(
        default=StreamOptions(), description="include_usage sends the numbers of tokens at the end."
    )
    modalities: list[Literal["text", "image"]] = Field(
        default=["image"], description="text and image are taken; audio is refused."
    )
    max_tokens: int = Field(
        default=1, ge=1, description="Taken, of no effect: a picture has a fixed number of tokens."
    )
    max_completion_tokens: int = Field(default=1, ge=1, description="As max_tokens.")
    stop: str | list[str] = Field(default="", description="Taken, of no effect: there is no text.")
    response_format: TextFormat = Field(
        default=TextFormat(type="text"),
        description="The type text is taken, of no effect; JSON is refused.",
    )
    tools: Empty = Field(default=(), description="Empty; tools are refused.")
    functions: Empty = Field(default=(), description="As tools.")
    tool_choice: Literal["none", "auto"] = Field(
        default="none", description="none and auto are taken, of no effect."
    )
    parallel_tool_calls: bool = Field(default=True, description="Taken, of no effect.")
    frequency_penalty: Zero = Field(default=0.0, description="0; others are refused.")
    presence_penalty: Zero = Field(default=0.0, description="As frequency_penalty.")
    logit_bias: Empty = Field(default=(), description="Empty; a bias is refused.")
    logprobs: Literal[False] = Field(
        default=False, description="false; the reply has each picture's log_likelihood."
    )
    store: Literal[False] = Field(
        default=False, description="false; true is refused: nothing is stored."
    )
    metadata: dict[str, Name] = Field(default={}, description="Taken, of no effect.")
    service_tier: Name = Field(default="", description="Taken, of no effect.")
    reasoning_effort: Name = Field(default="", description="Taken, of no effect.")
    verbosity: Name = Field(default="", description="Taken, of no effect.")
    prompt_cache_key: Name = Field(default="", description="Taken, of no effect.")

    @model_validator(mode="after")
    def _has_choices_or_pictures(self) -> ChatRequest:
        if self.n > 1 and self.num_images > 1:
            raise PydanticCustomError(
                "n", "n and num_images exclude each other: give one of them, the other as 1"
            )
        return self


KINDS: tuple[type[Fields], ...] = (ImagesRequest, EditRequest, ChatRequest)
