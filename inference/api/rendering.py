"""Results of the model, and their forms in a reply. Knows nothing of torch or Flask.

    GenerateResult -> GenerateReply | file and headers of the best image | lines of a stream

Images are encoded in the request's thread, so that the device goes on with the next request.
Letters: H height, W width.
"""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pydantic import BaseModel

from dalle.errors import DalleError, UserError
from dalle.preprocess.images import ImageFormat, Pixels, encode_image
from inference.api.replies import (
    CandidateLine,
    CompleteReply,
    ErrorDetail,
    ErrorLine,
    GenerateReply,
    Prediction,
    PreviewLine,
    RankedBy,
    RankedCandidate,
    RankedImage,
    RankedLine,
    RankingLine,
    Sampling,
    Timings,
)
from inference.api.schema import GenerateRequest, Limits

CUSTOM_ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"  # the only header that an endpoint keeps

# At worst, which is noise: PNG is a little over its raw size; the others were measured at the
# quality that `encode_image` uses (256 x 256 pixels: 2.04 and 0.89).
_WORST_BYTES_PER_PIXEL: Mapping[ImageFormat, float] = {"png": 3.02, "jpeg": 2.1, "webp": 1.0}
_HEADER_BYTES = 1_000


Sign = Callable[[bytes, ImageFormat, int, int], bytes]
"""File, its format, seed and candidate -> the file with a signed manifest."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What the files of one request's images say of their origin.

    xmp: packet with `{seed}` and `{candidate}` in the places of these numbers. sign: for finished
    images; None: unsigned.
    """

    xmp: str
    sign: Sign | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One finished image.

    clip_score: cosine, None without a CLIP; merit: what it is ranked by, the greatest first;
    pixels: uint8 [H, W, 3]; mark: None for a file that says nothing of its origin; first: number of
    the first finished candidate with the same image tokens, None where it is this one.
    """

    number: int
    log_likelihood: float
    clip_score: float | None
    merit: float
    pixels: Pixels = field(repr=False)
    mark: Mark | None = field(default=None, repr=False)
    first: int | None = None

    @property
    def group(self) -> int:
        """Number that candidates with the same image tokens have in common."""
        return self.number if self.first is None else self.first

    def again(self, number: int) -> Candidate:
        """Return another candidate with the same image tokens."""
        return replace(self, number=number, first=self.group)


@dataclass(frozen=True, slots=True)
class Preview:
    """One unfinished image. pixels: uint8 [H, W, 3], grey below the first `rows` of the grid."""

    number: int
    rows: int
    pixels: Pixels = field(repr=False)
    mark: Mark | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """All finished candidates of a request, best first, at least one."""

    ranked: Sequence[Candidate]
    ranked_by: RankedBy
    seed: int
    num_candidates: int
    sample_seconds: float
    decode_seconds: float
    rank_seconds: float
    positions_per_step: float = 1.0
    """Positions of a candidate that a step sampled, in the mean."""
    sampling: Sampling = Sampling()

    @property
    def is_cut_short(self) -> bool:
        """Whether a deadline came before the last candidate."""
        return len(self.ranked) < self.num_candidates


@dataclass(frozen=True, slots=True)
class ClassifyResult:
    """One prediction for each image, in the request's order."""

    predictions: Sequence[Prediction]


Result = GenerateResult | ClassifyResult | CompleteReply


class StreamForm(Protocol):
    """Form of a streamed reply: events to bytes. Nothing is sent for those that are empty.

    start: what comes before the first event.
    """

    start: bytes

    def preview(self, preview: Preview) -> bytes:
        """Return the part for an unfinished candidate."""
        ...

    def candidate(self, candidate: Candidate) -> bytes:
        """Return the part for a finished candidate."""
        ...

    def end(
        self,
        result: GenerateResult,
        *,
        queue_seconds: float,
        encode_seconds: float,
        warnings: Sequence[str],
    ) -> Iterable[bytes]:
        """Return the last parts, at least one, each made when it is taken.

        encode_seconds: what the parts before took.
        """
        ...

    def error(self, error: Exception) -> bytes:
        """Return the last part of a stream that broke off."""
        ...


class JsonLines:
    """The stream of POST /invocations: a JSON object a line. format: of the images."""

    start = b""

    def __init__(self, format: ImageFormat) -> None:
        self._format = format

    def preview(self, preview: Preview) -> bytes:
        return _line(render_preview(preview, self._format))

    def candidate(self, candidate: Candidate) -> bytes:
        return _line(render_candidate(candidate, self._format))

    def end(
        self,
        result: GenerateResult,
        *,
        queue_seconds: float,
        encode_seconds: float,
        warnings: Sequence[str],
    ) -> Iterable[bytes]:
        ranking = render_ranking(
            result,
            queue_seconds=queue_seconds,
            encode_seconds=encode_seconds,
            warnings=warnings,
        )
        return [_line(ranking)]

    def error(self, error: Exception) -> bytes:
        return _line(ErrorLine(error=render_error(error)[1]))


def rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates by merit, the best first; equal ones by their numbers."""
    return sorted(candidates, key=lambda each: (-each.merit, each.number))


def best(ranked: Sequence[Candidate], number: int, *, distinct: bool) -> list[Candidate]:
    """Return the first candidates of a ranking; with distinct, those of different images."""
    if not distinct:
        return [*ranked[:number]]
    firsts: dict[int, Candidate] = {}
    for each in ranked:
        firsts.setdefault(each.group, each)
    return [*firsts.values()][:number]


def check_reply_size(
    request: GenerateRequest,
    image_size: int,
    limits: Limits,
    *,
    remedy: str = "for format jpeg or webp, or for Accept: application/jsonlines",
) -> None:
    """Refuse a request whose JSON reply could become larger than the limit, before any work.

    image_size: side of the square images in pixels. remedy: what to ask for besides fewer images.
    Raises `UserError` 422.
    """
    header = _HEADER_BYTES + limits.mark_bytes
    worst = _WORST_BYTES_PER_PIXEL[request.format] * image_size**2 + header
    encoded = int(worst * 4 / 3)
    fitting = limits.max_reply_bytes // encoded
    if request.num_images > fitting:
        raise UserError(
            f"num_images must be at most {fitting} for {image_size} x {image_size} "
            f"{request.format} images, got {request.num_images}: the reply could exceed "
            f"{limits.max_reply_bytes:,} bytes; ask for fewer, {remedy}",
            field="num_images",
            status=422,
            code="reply_too_large",
        )


def render_json(
    result: GenerateResult,
    request: GenerateRequest,
    *,
    queue_seconds: float,
    warnings: Sequence[str] = (),
) -> GenerateReply:
    """Return the best `num_images` candidates with their images."""
    began = time.monotonic()
    images = list(render_images(result, request))
    timings = stage_timings(result, queue_seconds, time.monotonic() - began)
    return GenerateReply(images=images, timings=timings, **_summary(result, warnings))


def render_images(result: GenerateResult, request: GenerateRequest) -> Iterator[RankedImage]:
    """Yield the best `num_images` candidates, each encoded when it is taken."""
    shown = best(result.ranked, request.num_images, distinct=request.distinct)
    for place, candidate in zip(_ranking(result, shown), shown, strict=True):
        yield RankedImage(**dict(place), image=_base64(candidate, request.format))


def render_best(
    result: GenerateResult,
    format: ImageFormat,
    *,
    queue_seconds: float = 0.0,
    warnings: Sequence[str] = (),
) -> tuple[bytes, dict[str, str], Timings]:
    """Return the file of the best image, headers with its scores, and the timings."""
    began = time.monotonic()
    first = result.ranked[0]
    file = _file(first, format)
    timings = stage_timings(result, queue_seconds, time.monotonic() - began)
    facts = {
        "seed": f"{result.seed}",
        "candidate": f"{first.number}",
        "clip_score": "" if first.clip_score is None else f"{first.clip_score:.6f}",
        "log_likelihood": f"{first.log_likelihood:.6f}",
        "ranked_by": result.ranked_by,
        **{name: str(value) for name, value in result.sampling if value is not None},
        "num_candidates": f"{result.num_candidates}",
        "completed_candidates": f"{len(result.ranked)}",
    }
    facts = {name: value for name, value in facts.items() if value}
    headers = {f"X-Dalle-{name.replace('_', '-').title()}": facts[name] for name in facts}
    headers[CUSTOM_ATTRIBUTES] = ";".join(f"{name}={facts[name]}" for name in facts)
    if warnings:
        headers["X-Dalle-Warnings"] = json.dumps(warnings)  # ASCII in one line, whatever they quote
    return file, headers, timings


def render_preview(preview: Preview, format: ImageFormat) -> PreviewLine:
    """Return an unfinished candidate as a line of a stream."""
    return PreviewLine(candidate=preview.number, rows=preview.rows, image=_base64(preview, format))


def render_candidate(candidate: Candidate, format: ImageFormat) -> CandidateLine:
    """Return a finished candidate as a line of a stream."""
    return CandidateLine(
        candidate=candidate.number,
        clip_score=candidate.clip_score,
        log_likelihood=candidate.log_likelihood,
        image=_base64(candidate, format),
    )


def render_ranking(
    result: GenerateResult,
    *,
    queue_seconds: float,
    encode_seconds: float,
    warnings: Sequence[str] = (),
) -> RankingLine:
    """Return the last line of a stream: the ranking, without images."""
    timings = stage_timings(result, queue_seconds, encode_seconds)
    firsts: dict[int, int] = {}  # group -> number of its best candidate
    ranking = []
    for place, each in zip(_ranking(result, result.ranked), result.ranked, strict=True):
        first = firsts.setdefault(each.group, each.number)
        ranking.append(RankedLine(**dict(place), same_as=None if first == each.number else first))
    return RankingLine(ranking=ranking, timings=timings, **_summary(result, warnings))


def _ranking(result: GenerateResult, shown: Sequence[Candidate]) -> list[RankedCandidate]:
    """Return the places of some candidates of a result, best first, counted among them."""
    copies = Counter(each.group for each in result.ranked)
    return [
        RankedCandidate(
            rank=rank_number,
            candidate=candidate.number,
            clip_score=candidate.clip_score,
            log_likelihood=candidate.log_likelihood,
            copies=copies[candidate.group],
        )
        for rank_number, candidate in enumerate(shown, start=1)
    ]


def _summary(result: GenerateResult, warnings: Sequence[str]) -> dict[str, Any]:
    """Return what a JSON reply and the last line of a stream have in common, but the timings."""
    return {
        "seed": result.seed,
        "num_candidates": result.num_candidates,
        "completed_candidates": len(result.ranked),
        "ranked_by": result.ranked_by,
        "sampling": result.sampling,
        "warnings": list(warnings),
    }


def render_error(error: Exception) -> tuple[int, ErrorDetail]:
    """Return status and body of an error; an internal one shows no details."""
    if isinstance(error, DalleError):
        return error.status, ErrorDetail(code=error.code, message=str(error), field=error.field)
    return 500, ErrorDetail(
        code="internal_error",
        message="something went wrong on the server; its log has the details",
        field=None,
    )


def stage_timings(result: GenerateResult, queue_seconds: float, encode_seconds: float) -> Timings:
    """Return the seconds that one generation spent in each stage."""
    return Timings(
        queue_seconds=queue_seconds,
        sample_seconds=result.sample_seconds,
        decode_seconds=result.decode_seconds,
        rank_seconds=result.rank_seconds,
        encode_seconds=encode_seconds,
        positions_per_step=result.positions_per_step,
    )


def _base64(image: Candidate | Preview, format: ImageFormat) -> str:
    return base64.b64encode(_file(image, format)).decode("ascii")


def _file(image: Candidate | Preview, format: ImageFormat) -> bytes:
    """Return the file of an image, with its mark."""
    mark = image.mark
    if mark is None:
        return encode_image(image.pixels, format)
    xmp = mark.xmp.format(seed=mark.seed, candidate=image.number)
    file = encode_image(image.pixels, format, xmp=xmp)
    if mark.sign is not None and isinstance(image, Candidate):
        return mark.sign(file, format, mark.seed, image.number)
    return file


def _line(model: BaseModel) -> bytes:
    return model.model_dump_json().encode() + b"\n"
