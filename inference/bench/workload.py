"""The requests of a benchmark: the same captions with the same seeds in every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle.errors import UserError
from inference.api.schema import Format, GenerateRequest

DEFAULT_CAPTIONS = (
    "big filled orange star",
    "small violet circle rotated twice",
    "smaller shaded indigo rectangle",
    "big halftone green crescent rotated twice",
    "bigger filled cyan circle rotated counterclockwise",
    "small filled shaded rainbow rectangle rotated clockwise",
    "smaller red circle",
    "big filled shaded yellow hexagon rotated twice",
)
"""Captions of the demo's synthetic images; any model answers them."""

MAX_SEED = 2**32


class Workload(BaseModel):
    """The requests: request k has caption k modulo their number, and seed + k."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    captions: list[str] = Field(min_length=1)
    num_candidates: int = 16
    num_images: int = 4
    format: Format = "png"
    guidance_scale: float = 1.0
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    def request(self, number: int) -> bytes:
        """Return request `number` (0 or more) as JSON."""
        return json.dumps(self._fields(number), ensure_ascii=False).encode()

    def check(self) -> None:
        """Raise UserError for the first request that no server would accept.

        The limits of a particular server are not known here.
        """
        for number, caption in enumerate(self.captions):
            try:
                GenerateRequest.model_validate(self._fields(number))
            except ValidationError as error:
                wrong = "; ".join(
                    f"{'.'.join(map(str, each['loc'])) or 'the request'}: {each['msg']}"
                    for each in error.errors()
                )
                raise UserError(f"caption {number + 1}, {caption[:60]!r}: {wrong}") from error

    def _fields(self, number: int) -> dict[str, Any]:
        fields = self.model_dump(exclude={"captions"})
        fields["caption"] = self.captions[number % len(self.captions)]
        fields["seed"] = self.seed + number
        fields["distinct"] = False  # all are returned: their number is what is priced
        return fields

    def describe(self) -> str:
        """Return the workload in one line."""
        guided = f", guidance {self.guidance_scale:g}" if self.guidance_scale != 1 else ""
        return (
            f"{len(self.captions)} captions, {self.num_candidates} candidates each, the best "
            f"{self.num_images} returned as {self.format}{guided}, seeds from {self.seed}"
        )


def read_captions(path: Path | None, captions: Sequence[str] | None) -> list[str]:
    """Return the captions of a file (one a line), then those given; without any the defaults.

    Raises UserError when the file cannot be read or is empty.
    """
    found: list[str] = []
    if path is not None:
        try:
            found = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"the captions file {path} cannot be read: {error}", field="--captions"
            ) from error
        found = [line for line in found if line]
        if not found:
            raise UserError(f"{path} holds no captions; write one a line", field="--captions")
    return [*found, *(captions or ())] or list(DEFAULT_CAPTIONS)
