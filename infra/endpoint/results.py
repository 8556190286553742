"""An endpoint's reply as image files named by rank, and as a table."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dalle.errors import AwsError
from inference.api.replies import GenerateReply, RankedCandidate
from infra.aws.output import Output, write_file


@dataclass(frozen=True)
class SavedImage:
    """One image file. state: `written`, or `unchanged` when it had the same content before."""

    path: Path
    rank: int
    clip_score: float | None
    log_likelihood: float
    state: str

    def as_json(self) -> dict[str, Any]:
        return {
            "file": str(self.path),
            "rank": self.rank,
            "clip_score": self.clip_score,
            "log_likelihood": self.log_likelihood,
            "state": self.state,
        }


def read_reply(body: bytes) -> GenerateReply:
    """Return the reply to a caption. Raises AwsError with the server's error message."""
    try:
        return GenerateReply.model_validate_json(body)
    except ValidationError as error:
        message = error_message(body)
        if message is None:
            shown = body[:200].decode("utf-8", "replace")
            raise AwsError(f"the endpoint's reply has no images: {shown!r}") from error
        raise AwsError(f"the endpoint refused the request: {message}") from error


def error_message(body: bytes | str) -> str | None:
    """Return the message of a reply {"error": {"message": …}}; None for any other reply."""
    try:
        found = json.loads(body)
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def save_images(
    reply: GenerateReply, out: Path, format_: str, prefix: str = ""
) -> list[SavedImage]:
    """Write a file for each returned image: OUT/PREFIXrank-1.png is the best one."""
    return [
        SavedImage(
            path=out / f"{prefix}rank-{ranked.rank}.{format_}",
            rank=ranked.rank,
            clip_score=ranked.clip_score,
            log_likelihood=ranked.log_likelihood,
            state=write(out / f"{prefix}rank-{ranked.rank}.{format_}", decode(ranked.image)),
        )
        for ranked in reply.images
    ]


def decode(image: str) -> bytes:
    """Return the bytes of an image in base64. Raises AwsError."""
    try:
        return base64.b64decode(image, validate=True)
    except binascii.Error as error:
        raise AwsError(f"an image in the endpoint's reply is not base64: {error}") from error


def write(path: Path, content: bytes) -> str:
    """Write a file unless it has that content already; return which. Raises UserError."""
    if path.is_file() and path.read_bytes() == content:
        return "unchanged"
    write_file(path, content)
    return "written"


def show(output: Output, images: Sequence[SavedImage]) -> None:
    """Print a table of the files with their scores."""
    output.table(
        ("rank", "CLIP score", "log likelihood", "file", ""),
        [
            (str(p.rank), score(p.clip_score), f"{p.log_likelihood:.2f}", str(p.path), p.state)
            for p in images
        ],
    )


def show_ranking(
    output: Output, ranking: Sequence[RankedCandidate], files: Mapping[int, Path]
) -> None:
    """Print the ranking of streamed candidates. files: by candidate number."""
    output.table(
        ("rank", "CLIP score", "log likelihood", "file"),
        [
            (str(r.rank), score(r.clip_score), f"{r.log_likelihood:.2f}", str(files[r.candidate]))
            for r in ranking
        ],
    )


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
