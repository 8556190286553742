"""Requests of POST /invocations, field by field. `parsing` reads them.

Knows nothing of torch, Flask or the platform, so that `infra` can build requests. The OpenAPI
document and the tables of inference/REFERENCE.md are generated from these descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from dalle.preprocess.captions import NUL, is_visible

MAX_SEED = 2**53 - 1  # the largest integer that every JSON parser keeps exactly
MAX_DEADLINE_SECONDS = 3600.0  # the platform's limit for asynchronous and batch invocations
MAX_CAPTION_CHARACTERS = 2_000
_NUM_CANDIDATES = 16  # by default
_NUM_IMAGES = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one server; `serve --help` names the variables that change them."""

    max_candidates: int = 512
    max_images: int = 32
    max_request_bytes: int = 25_000_000  # the platform's own limit for a real-time endpoint
    max_reply_bytes: int = 5_000_000  # below the 6 MB at which older clients stop
    deadline_seconds: float = 55.0  # by default; the platform ends a real-time invocation at 60
    mark_bytes: int = 0  # that an image file may have for what it says of its origin


DEFAULT_LIMITS = Limits()


def _without_nul(text: str) -> str:
    if NUL in text:
        raise PydanticCustomError("nul", "must hold no NUL character, as UTF-16 read as UTF-8 does")
    return text


def _visible(text: str) -> str:
    if not is_visible(text):
        raise PydanticCustomError("invisible", "must hold a character that can be seen")
    return text


# The length makes pydantic check the characters too: half a surrogate pair, which JSON can carry
# and no tokenizer can read, is refused.
Text = Annotated[str, Field(max_length=MAX_CAPTION_CHARACTERS), AfterValidator(_without_nul)]
Caption = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_CAPTION_CHARACTERS),
    AfterValidator(_without_nul),
    AfterValidator(_visible),
]
# A class is returned as it was written, so it is not stripped; but it must not be blank.
Class = Annotated[
    str,
    Field(min_length=1, max_length=MAX_CAPTION_CHARACTERS, pattern=r"\S"),
    AfterValidator(_without_nul),
    AfterValidator(_visible),
]
Format = Literal["png", "jpeg", "webp"]
Deadline = Annotated[
    float | None,
    Field(
        gt=0.0,
        le=MAX_DEADLINE_SECONDS,
        description="Give up after this time, counted from the request's arrival. Above 0, at "
        "most 3600; null: the server's default.",
    ),
]


class _Request(BaseModel):
    # strict: "3" is not 3, and true is not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @property
    def has_images(self) -> bool:
        """Whether the request brings image files."""
        return False


class GenerateRequest(_Request):
    """Generate candidates for a caption, rank them, and return the best."""

    caption: Caption = Field(
        description="What the images should show. 1 to 2,000 characters without the blanks "
        "around them, and no more text tokens than the model reads, unless truncate is true."
    )
    num_candidates: int = Field(
        default=_NUM_CANDIDATES,
        ge=1,
        description="Number of images generated for the caption before ranking. At least 1, at "
        "most the server's limit. Default 16, or the server's limit where it is lower.",
    )
    num_images: int = Field(
        default=_NUM_IMAGES,
        ge=1,
        description="Number of candidates returned, best first. At least 1, at most "
        "num_candidates and the server's limit; a stream sends all of them, an image reply the "
        "best one. Default 4, or num_candidates or the server's limit where that is lower.",
    )
    distinct: bool = Field(
        default=True,
        description="Return different images only: of candidates with the same image tokens one is "
        "returned, and its copies says how many there are, so that there may be fewer images than "
        "num_images. false: each by itself. A stream sends every candidate.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0.0,
        le=10.0,
        description="Divides the logits; 0 always takes the likeliest token, so that all "
        "candidates are alike. 0 to 10. Default: the model's own, which the reply gives, or 1.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Sample from the k likeliest image tokens only. At least 1; null: from all. "
        "Default: the model's own, or null.",
    )
    top_p: float | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="Sample from the smallest set of image tokens whose probabilities reach p. "
        "Above 0, at most 1; null: from all. Default: the model's own, or null.",
    )
    guidance_scale: float = Field(
        default=1.0,
        ge=0.0,
        le=100.0,
        description="How strongly the image follows the caption: "
        "unconditional + scale x (conditional - unconditional). 0 to 100; 1 is off and costs half. "
        "Default: the model's own, or 1.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Candidate k of a seed is always the same image. 0 to 2**53 - 1; null: a "
        "random one, which the reply gives.",
    )
    format: Format = Field(
        default="png",
        description="File format of the images in the reply: png, jpeg or webp; an image type in "
        "Accept overrides it.",
    )
    prime_image: str | None = Field(
        default=None,
        min_length=1,
        description="A base64 image file (PNG, JPEG, WebP, GIF or BMP, at most 40 megapixels, or "
        "250 of a JPEG that is twice the model's size or larger), cut to its centre square and "
        "scaled to the model's size. Every candidate keeps its top rows as the dVAE reproduces "
        "them: the image tokens are kept, not the pixels. Needs prime_rows. Null: none.",
    )
    prime_rows: int = Field(
        default=0,
        ge=0,
        description="Number of rows of the image-token grid that are kept from prime_image; the "
        "rest is generated. A row is as high as the image divided by the grid. 0 to one fewer "
        "than the grid has; above 0 it needs prime_image.",
    )
    preview_rows: int | None = Field(
        default=None,
        ge=1,
        description="In a stream, send a preview of each candidate after every so many rows of the "
        "image-token grid; a client that reads too slowly gets fewer previews. Each costs about "
        "as much as decoding the finished image. At least 1; null: none.",
    )
    deadline_seconds: float | None = Field(
        default=None,
        gt=0.0,
        le=MAX_DEADLINE_SECONDS,
        description="Answer with the best so far after this time, counted from the request's "
        "arrival; lines of one body arrive together. Above 0, at most 3600; null: the server's "
        "default (55, for batch jobs 590).",
    )
    truncate: bool = Field(
        default=False,
        description="Cut a caption that has more text tokens than the model reads after its last "
        "whole word that fits, and say so in the reply's warnings. false: refuse it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: Any, info: ValidationInfo) -> Any:
        """Fill in the defaults that depend on the server's limits and on one another."""
        if not isinstance(fields, Mapping):
            return fields
        candidates, images = _NUM_CANDIDATES, _NUM_IMAGES
        if info.context is not None:
            limits: Limits = info.context["limits"]
            candidates = min(candidates, limits.max_candidates)
            images = min(images, limits.max_images)
        candidates = fields.get("num_candidates", candidates)
        if type(candidates) is int and candidates >= 1:  # else that field has an error
            images = min(images, candidates)
        return {"num_candidates": candidates, "num_images": images, **fields}

    @property
    def has_images(self) -> bool:
        return self.prime_image is not None

    @field_validator("num_candidates", "num_images")
    @classmethod
    def _check_server_limits(cls, value: int, info: ValidationInfo) -> int:
        if info.context is not None:
            limits: Limits = info.context["limits"]
            of_candidates = info.field_name == "num_candidates"
            limit = limits.max_candidates if of_candidates else limits.max_images
            if value > limit:
                raise PydanticCustomError("limit", "must be 1 to {limit}", {"limit": limit})
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.num_images > self.num_candidates:
            raise PydanticCustomError(
                "num_images",
                "num_images must be 1 to num_candidates, which is {candidates}, got {images}",
                {"candidates": self.num_candidates, "images": self.num_images},
            )
        if (self.prime_image is None) != (self.prime_rows == 0):
            raise PydanticCustomError(
                "prime_rows",
                "prime_image and prime_rows go together: give both, prime_rows 1 or more, or "
                "neither; got prime_rows {rows} {with_or_without} prime_image",
                {
                    "rows": self.prime_rows,
                    "with_or_without": "without" if self.prime_image is None else "with",
                },
            )
        return self


class ClassifyRequest(_Request):
    """Rank captions for each image by CLIP, with the request of svpino/clip-container."""

    images: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1,
        max_length=64,
        description="Base64 image files (PNG, JPEG, WebP, GIF or BMP, limited as prime_image), "
        "1 to 64; the centre square of each is used. Addresses are not fetched.",
    )
    classes: list[Class] = Field(
        min_length=1,
        max_length=1_000,
        description="Captions to choose from, 1 to 1,000, none blank, each compared "
        "exactly as written.",
    )
    top: int = Field(
        default=3,
        ge=1,
        le=1_000,
        description="Number of classes returned for each image, likeliest first; all of them when "
        "there are fewer. 1 to 1,000.",
    )
    deadline_seconds: Deadline = None

    @property
    def has_images(self) -> bool:
        return True


class CompleteRequest(_Request):
    """Continue a caption with the transformer."""

    complete: Text = Field(
        description="The beginning of a caption; may be empty. 0 to 2,000 characters.",
    )
    num_completions: int = Field(
        default=4, ge=1, le=64, description="Number of captions sampled. 1 to 64."
    )
    temperature: float = Field(
        default=1.0,
        ge=0.0,
        le=10.0,
        description="As for images; 0 gives the likeliest. 0 to 10. Default 1.",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="The same seed gives the same captions. 0 to 2**53 - 1; null: a random one, "
        "which the reply gives.",
    )
    deadline_seconds: Deadline = None


Request = GenerateRequest | ClassifyRequest | CompleteRequest

# Each kind of request has one key that no other kind has.
REQUEST_KINDS: Mapping[str, type[Request]] = {
    "caption": GenerateRequest,
    "images": ClassifyRequest,
    "complete": CompleteRequest,
}
