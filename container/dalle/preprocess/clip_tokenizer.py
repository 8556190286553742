"""Captions -> the text tokens of published CLIPs, with OpenAI's start and end marks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dalle.preprocess.tokenizer import CaptionTokenizer

START, END = 49_406, 49_407
"""Ids of the marks around a caption (openai/CLIP, simple_tokenizer.py)."""
MARKS = 2


class ClipTokenizer(CaptionTokenizer):
    """OpenAI's byte-pair encoding, for training: text_length is without the marks."""

    def __init__(self, length: int) -> None:
        """length: text tokens that the model reads, marks included; at least 3."""
        plain = CaptionTokenizer.train([], kind="clip", text_length=length - MARKS)
        super().__init__(plain._tokenizer, plain.text_length, cleans_as_clip=True)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> OpenAI's ids [B, length] int64: start mark, caption, end mark, zeros.

        Raises CaptionTooLong for the first caption that does not fit; OpenAI's own code cuts it.
        """
        ids = super().encode(captions)  # one above OpenAI's, and 0 after the last
        ends = (ids != 0).sum(dim=1, keepdim=True) + 1
        marked = F.pad((ids - 1).clamp(min=0), (1, 1)).scatter(1, ends, END)
        marked[:, 0] = START
        return marked

    def identity(self) -> str:
        """Return the sha256 of everything that decides the ids of a caption."""
        return f"{super().identity()} with marks"
