"""An endpoint's reply as image files named by rank, and as a table."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dalle.errors import AwsError
from inference.api.replies import GenerateReply, RankedCandidate, Sampling
from infra.aws.output import Output, write_file


@dataclass(frozen=True)
class SavedImage:
    """One image file.

    state: `written`, or `unchanged` when it had the same content before. copies: number of finished
    candidates with the same image tokens.
    """

    file: str
    rank: int
    clip_score: float | None
    log_likelihood: float
    state: str = ""
    copies: int = 1

    @classmethod
    def of(cls, ranked: RankedCandidate, file: str, state: str = "") -> SavedImage:
        """Return the file of a candidate."""
        scores = (ranked.rank, ranked.clip_score, ranked.log_likelihood)
        return cls(file, *scores, state, ranked.copies)


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


def sampled(sampling: Sampling) -> str:
    """Return the settings of a reply in words."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}" for name, value in sampling if value is not None
    )


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
    saved = []
    for each in reply.images:
        path = out / f"{prefix}rank-{each.rank}.{format_}"
        state = write(path, decode(each.image))
        saved.append(SavedImage.of(each, str(path), state))
    return saved


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
    rows = [
        (
            str(each.rank),
            "-" if each.clip_score is None else f"{each.clip_score:.3f}",
            f"{each.log_likelihood:.2f}",
            str(each.copies),
            each.file,
            each.state,
        )
        for each in images
    ]
    output.table(("rank", "CLIP score", "log likelihood", "copies", "file", ""), rows)


def show_warnings(output: Output, warnings: Sequence[str]) -> None:
    """Print what the model could not read of a caption, a line each."""
    for warning in warnings:
        output.line(f"warning: {warning}")
