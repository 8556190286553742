"""What the owner of a file says of it, where the file itself does not."""

from __future__ import annotations

from dataclasses import dataclass

from dalle.types import ATTENTION_KINDS

THEIR_KINDS = (*ATTENTION_KINDS, "sparse")
"""The package's names of its kinds of attention."""


@dataclass(frozen=True)
class Choices:
    """What only the owner of a file can tell."""

    attention_kinds: tuple[str, ...] | None = None
    """One per layer, repeated; None where the file tells."""
    version: str | None = None
    num_heads: int | None = None
    is_stable: bool | None = None
    hides_padding: bool | None = None


class NotToldError(ValueError):
    """The file does not tell something that decides what its model computes."""
