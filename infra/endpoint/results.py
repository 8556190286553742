"""A reply of the endpoint into picture files, named by rank, and a line for each."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dalle.errors import AwsError, UserError
from dalle.platform.disk import write_atomically
from inference.api.replies import GenerateReply, RankedCandidate
from infra.aws.output import Console


@dataclass(frozen=True)
class Picture:
    """One file that was written. state: `written`, or `unchanged` when it was there like that."""

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
    """The reply to a caption. Raises AwsError with the server's message, or for anything else."""
    try:
        return GenerateReply.model_validate_json(body)
    except ValidationError as error:
        message = error_message(body)
        if message is None:
            shown = body[:200].decode("utf-8", "replace")
            raise AwsError(f"the endpoint's reply has no pictures: {shown!r}") from error
        raise AwsError(f"the endpoint refused the request: {message}") from error


def error_message(body: bytes | str) -> str | None:
    """The message in a reply of the form {"error": {"message": …}}; None for any other."""
    try:
        found = json.loads(body)
        return str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def save_pictures(reply: GenerateReply, out: Path, format_: str, prefix: str = "") -> list[Picture]:
    """Write a file for each returned picture: OUT/PREFIXrank-1.png is the best one."""
    return [
        Picture(
            path=out / f"{prefix}rank-{ranked.rank}.{format_}",
            rank=ranked.rank,
            clip_score=ranked.clip_score,
            log_likelihood=ranked.log_likelihood,
            state=write(out / f"{prefix}rank-{ranked.rank}.{format_}", decode(ranked.image)),
        )
        for ranked in reply.images
    ]


def decode(image: str) -> bytes:
    """The file in a reply's base64. Raises AwsError."""
    try:
        return base64.b64decode(image, validate=True)
    except binascii.Error as error:
        raise AwsError(f"a picture in the endpoint's reply is not base64: {error}") from error


def write(path: Path, content: bytes) -> str:
    """Write a file unless it has that content already; returns which. Raises UserError."""
    try:
        if path.is_file() and path.read_bytes() == content:
            return "unchanged"
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return "written"


def show(console: Console, pictures: Sequence[Picture]) -> None:
    """A table of the files with their scores."""
    console.table(
        ("rank", "CLIP score", "log likelihood", "file", ""),
        [
            (str(p.rank), score(p.clip_score), f"{p.log_likelihood:.2f}", str(p.path), p.state)
            for p in pictures
        ],
    )


def show_ranking(
    console: Console, ranking: Sequence[RankedCandidate], files: Mapping[int, Path]
) -> None:
    """The order of streamed candidates; files: by candidate number."""
    console.table(
        ("rank", "CLIP score", "log likelihood", "file"),
        [
            (str(r.rank), score(r.clip_score), f"{r.log_likelihood:.2f}", str(files[r.candidate]))
            for r in ranking
        ],
    )


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
