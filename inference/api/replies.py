"""Replies of POST /invocations: the models of their JSON and of the OpenAPI document.

Knows nothing of torch, Flask or the platform, so that clients can read replies with it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from inference.api.schema import MAX_SEED

RankedBy = Literal["clip", "log_likelihood", "clip_and_log_likelihood"]


class Reply(BaseModel):
    """Base of all replies."""

    model_config = ConfigDict(frozen=True)


class RankedCandidate(Reply):
    """A candidate's rank and scores, without its image."""

    rank: int = Field(description="1 is the best.", ge=1)
    candidate: int = Field(description="The candidate's number, from 0.", ge=0)
    clip_score: float | None = Field(
        description="Cosine of image and caption by CLIP, -1 to 1; null without a CLIP."
    )
    log_likelihood: float = Field(
        description="Of the candidate's image tokens by the transformer, in nats, at most 0."
    )
    copies: int = Field(
        default=1,
        description="Number of finished candidates with the same image tokens, with this one.",
        ge=1,
    )


class RankedImage(RankedCandidate):
    """One returned image."""

    image: str = Field(description="Base64 file in the requested format.")


class Timings(Reply):
    """Seconds of each stage, and how many positions a decoding step sampled."""

    queue_seconds: float = Field(description="From arrival until the model began.", ge=0)
    sample_seconds: float = Field(description="Sampling image tokens.", ge=0)
    decode_seconds: float = Field(description="Image tokens to pixels, by the dVAE.", ge=0)
    rank_seconds: float = Field(description="Scoring and ordering.", ge=0)
    encode_seconds: float = Field(description="Pixels to image files.", ge=0)
    positions_per_step: float = Field(
        default=1.0,
        description="Positions of a candidate that a decoding step sampled, in the mean.",
        ge=1,
    )


class Sampling(Reply):
    """How the image tokens of a request were sampled."""

    temperature: float = Field(default=1.0, description="As in the request.", ge=0)
    top_k: int | None = Field(default=None, description="As in the request; null: from all.", ge=1)
    top_p: float | None = Field(
        default=None, description="As in the request; null: from all.", gt=0, le=1
    )
    guidance_scale: float = Field(default=1.0, description="As in the request; 1 is off.", ge=0)


class Generated(Reply):
    """What every reply to a caption says of its generation."""

    seed: int = Field(description="The seed used, 0 to 2**53 - 1.", ge=0, le=MAX_SEED)
    num_candidates: int = Field(description="Number of candidates requested.", ge=1)
    completed_candidates: int = Field(
        description="Number finished before the deadline, 1 to num_candidates.", ge=1
    )
    ranked_by: RankedBy = Field(
        description="What the candidates are ordered by: clip, the clip_score; log_likelihood "
        "where the artefact has no CLIP; clip_and_log_likelihood, CLIP's logit and the "
        "log-likelihood together, where CLIP was trained with a likelihood_weight."
    )
    sampling: Sampling = Field(
        default=Sampling(),
        description="The settings used: the request's own, and the model's where it gave none. "
        "With them and the seed a request gives the same images again.",
    )
    warnings: list[str] = Field(
        default=[],
        description="What the model could not read: words that are not in its word list, and the "
        "rest of a caption that was cut. Empty where it read the whole caption.",
    )
    timings: Timings = Field(description="Duration of each stage.")


class GenerateReply(Generated):
    """The best candidates, best first."""

    images: list[RankedImage] = Field(
        description="num_images of them, or all different ones that were finished."
    )


class PreviewLine(Reply):
    """A line of a streamed reply: one unfinished candidate."""

    event: Literal["preview"] = Field(default="preview", description="Kind of the line.")
    candidate: int = Field(description="The candidate's number, from 0.", ge=0)
    rows: int = Field(
        description="Number of rows of the image-token grid that are sampled; the others are grey.",
        ge=1,
    )
    image: str = Field(description="Base64 file in the requested format.")


class CandidateLine(Reply):
    """A line of a streamed reply: one finished candidate."""

    event: Literal["candidate"] = Field(default="candidate", description="Kind of the line.")
    candidate: int = Field(description="The candidate's number, from 0.", ge=0)
    clip_score: float | None = Field(description="Cosine by CLIP, -1 to 1; null without a CLIP.")
    log_likelihood: float = Field(description="Of its image tokens, in nats, at most 0.")
    image: str = Field(description="Base64 file in the requested format.")


class RankedLine(RankedCandidate):
    """A candidate's place in a stream's ranking."""

    same_as: int | None = Field(
        default=None,
        description="Number of the best candidate with the same image tokens; null for that one.",
        ge=0,
    )


class RankingLine(Generated):
    """The last line of a streamed reply: all finished candidates in order."""

    event: Literal["ranking"] = Field(default="ranking", description="Kind of the line.")
    ranking: list[RankedLine] = Field(description="Every finished candidate, best first.")


class Completion(Reply):
    """One continued caption."""

    caption: str = Field(description="The whole caption, with its beginning.")
    log_likelihood: float = Field(description="Of the continuation, in nats, at most 0.")


class CompleteReply(Reply):
    """Continued captions."""

    captions: list[Completion] = Field(description="num_completions captions, likeliest first.")
    seed: int = Field(description="The seed used, 0 to 2**53 - 1.", ge=0, le=MAX_SEED)


Prediction = tuple[list[int], list[str], list[float]]
"""For one image: indices into the request's classes, those classes, their probabilities."""


class ErrorDetail(Reply):
    """What went wrong and how to put it right."""

    code: str = Field(description="A stable identifier, such as caption_too_long.")
    message: str = Field(description="The fault and its remedy, in a sentence.")
    field: str | None = Field(description="The request field or header at fault, or null.")


class ErrorReply(Reply):
    """The body of every error reply; in JSON lines, the line in place of a reply."""

    error: ErrorDetail = Field(description="The error.")


class ErrorLine(ErrorReply):
    """The last line of a streamed reply that broke off."""

    event: Literal["error"] = Field(default="error", description="Kind of the line.")
