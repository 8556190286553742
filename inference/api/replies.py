"""What POST /invocations answers: the models, from which JSON and the OpenAPI document are made.

Knows nothing of torch, Flask or the platform; a client can read replies with it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from inference.api.schema import MAX_SEED

RankedBy = Literal["clip", "log_likelihood", "clip_and_log_likelihood"]


class _Reply(BaseModel):
    model_config = ConfigDict(frozen=True)


class RankedCandidate(_Reply):
    """A candidate's place in the order, without its picture."""

    rank: int = Field(description="1 is the best.", ge=1)
    candidate: int = Field(description="The candidate's number, from 0.", ge=0)
    clip_score: float | None = Field(
        description="Cosine of picture and caption by CLIP, -1 to 1; null without a CLIP."
    )
    log_likelihood: float = Field(
        description="What the transformer gives the candidate's image tokens, in nats, at most 0."
    )


class RankedImage(RankedCandidate):
    """One returned picture."""

    image: str = Field(description="Base64 file in the format that was asked for.")


class Timings(_Reply):
    """Where the time went, in seconds."""

    queue_seconds: float = Field(description="From arrival until the model began.", ge=0)
    sample_seconds: float = Field(description="Drawing image tokens.", ge=0)
    decode_seconds: float = Field(description="Image tokens to pixels, by the dVAE.", ge=0)
    rank_seconds: float = Field(description="Scoring and ordering.", ge=0)
    encode_seconds: float = Field(description="Pixels to image files.", ge=0)


class _Drawn(_Reply):
    seed: int = Field(description="The seed that was used, 0 to 2**53 - 1.", ge=0, le=MAX_SEED)
    num_candidates: int = Field(description="How many candidates were asked for.", ge=1)
    completed_candidates: int = Field(
        description="How many were finished before the deadline, 1 to num_candidates.", ge=1
    )
    ranked_by: RankedBy = Field(
        description="What the order rests on: clip, the clip_score; log_likelihood where the "
        "artefact has no CLIP; clip_and_log_likelihood, CLIP's logit and the log-likelihood "
        "together, where CLIP was trained with a likelihood_weight."
    )
    timings: Timings = Field(description="Where the time went.")


class GenerateReply(_Drawn):
    """The best candidates, best first."""

    images: list[RankedImage] = Field(description="num_images pictures, or all that were finished.")


class PreviewLine(_Reply):
    """A line of a streamed reply: one candidate that is still being drawn."""

    event: Literal["preview"] = Field(default="preview", description="Names the line's kind.")
    candidate: int = Field(description="The candidate's number, from 0.", ge=0)
    rows: int = Field(
        description="How many rows of the image-token grid are drawn; below them it is grey.", ge=1
    )
    image: str = Field(description="Base64 file in the format that was asked for.")


class CandidateLine(_Reply):
    """A line of a streamed reply: one finished candidate."""

    event: Literal["candidate"] = Field(default="candidate", description="Names the line's kind.")
    candidate: int = Field(description="The candidate's number, from 0.", ge=0)
    clip_score: float | None = Field(description="Cosine by CLIP, -1 to 1; null without a CLIP.")
    log_likelihood: float = Field(description="Of its image tokens, in nats, at most 0.")
    image: str = Field(description="Base64 file in the format that was asked for.")


class RankingLine(_Drawn):
    """The last line of a streamed reply: all finished candidates in order."""

    event: Literal["ranking"] = Field(default="ranking", description="Names the line's kind.")
    ranking: list[RankedCandidate] = Field(description="Every finished candidate, best first.")


class Completion(_Reply):
    """One continued caption."""

    caption: str = Field(description="The whole caption, beginning included.")
    log_likelihood: float = Field(description="Of the continuation, in nats, at most 0.")


class CompleteReply(_Reply):
    """Continued captions."""

    captions: list[Completion] = Field(description="num_completions captions, likeliest first.")
    seed: int = Field(description="The seed that was used, 0 to 2**53 - 1.", ge=0, le=MAX_SEED)


Prediction = tuple[list[int], list[str], list[float]]
"""For one image: indices into the request's classes, those classes, their probabilities."""


class ErrorDetail(_Reply):
    """What went wrong and what would be right."""

    code: str = Field(description="A stable word for programs, such as caption_too_long.")
    message: str = Field(description="A sentence for people.")
    field: str | None = Field(description="The request field or header at fault, where one is.")


class ErrorReply(_Reply):
    """The body of every refusal and failure; in JSON lines, the line in place of an answer."""

    error: ErrorDetail = Field(description="The error.")


class ErrorLine(ErrorReply):
    """The last line of a streamed reply that broke off."""

    event: Literal["error"] = Field(default="error", description="Names the line's kind.")
