"""What size=auto looks at: the number of pairs, the pictures' sizes and colours, the captions."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from PIL import Image

from dalle.errors import DataError
from dalle.preprocess.images import ImageError, Pixels, decode_image, to_square
from dalle.preprocess.tokenizer import CaptionTokenizer
from dalle.types import TokenizerKind
from training.data.sources.index import Pairs
from training.memory.sizing import rules
from training.stopping import Stop, unless_stopped

SAMPLED_PICTURES = 64
SAMPLED_CAPTIONS = 50_000
UNSEEN_CAPTIONS = 1.25
"""Times the longest caption, where not all captions were looked at."""
_DECODED_SIZE = 64  # pixels, to count colours in
_LEVELS = 16  # of a channel, likewise
_NEAR = 24  # of 255: about the same colour


@dataclass(frozen=True)
class Facts:
    """A data set, as far as sizes depend on it.

    side: pixels of the shorter side of the median picture. longest_caption: in text tokens.
    text_vocab_size: of the tokenizer that was learned from the captions to count them.
    is_drawing: few flat colours on an even ground. load_seconds: to decode all pictures.
    """

    num_pairs: int
    side: int
    longest_caption: int
    text_vocab_size: int
    is_drawing: bool = False
    load_seconds: float = 0.0


def look_at(
    pairs: Pairs,
    more_captions: Iterable[str],
    *,
    num_pairs: int,
    kind: TokenizerKind,
    vocab_size: int,
    tokenizer: CaptionTokenizer | None,
    stop: Stop,
) -> Facts:
    """Look at a sample of the pictures and at the captions.

    more_captions: held-out ones. num_pairs: of all hosts. kind, vocab_size: of the tokenizer to
    come; tokenizer: one that is there. Raises DataError when no picture of the sample can be
    decoded; Stopped.
    """
    chance = np.random.default_rng(0)
    sample = chance.permutation(len(pairs))[:SAMPLED_PICTURES].tolist()
    sides, colours, borders, seconds = [], [], [], 0.0
    for index in unless_stopped(sample, stop):
        began = time.perf_counter()
        try:
            data = pairs.image_bytes(index)
            image = decode_image(data, what=pairs.name(index), min_side=_DECODED_SIZE)
        except ImageError:
            continue  # counted when the pictures are loaded
        seconds += time.perf_counter() - began
        with Image.open(io.BytesIO(data)) as header:  # as large as it is, not as it was decoded
            sides.append(min(header.size))
        pixels = to_square(image, min(_DECODED_SIZE, min(image.size)))
        colours.append(_num_colours(pixels))
        borders.append(_even_border(pixels))
    if not sides:
        raise DataError(
            f"{pairs.channel}: none of {len(sample)} pictures of a sample can be decoded"
        )
    chosen = chance.permutation(len(pairs))[:SAMPLED_CAPTIONS].tolist()
    captions = [text for index in unless_stopped(chosen, stop) for text in pairs.captions(index)]
    held_out = [*more_captions]
    if tokenizer is None:
        tokenizer = CaptionTokenizer.train(captions, kind=kind, vocab_size=vocab_size)
    longest = longest_of([*captions, *held_out], tokenizer)
    if not held_out or len(chosen) < len(pairs):
        longest = int(longest * UNSEEN_CAPTIONS)
    return Facts(
        num_pairs=num_pairs,
        side=round(median(sides)),
        longest_caption=longest,
        text_vocab_size=tokenizer.vocab_size,
        is_drawing=median(colours) <= rules.DRAWING_COLOURS
        and median(borders) >= rules.DRAWING_EVEN_BORDER,
        load_seconds=seconds / len(sides) * len(pairs),
    )


def longest_of(captions: Sequence[str], tokenizer: CaptionTokenizer) -> int:
    """Return the text tokens of the longest caption."""
    return max(tokenizer.count_tokens(captions), default=1)


def _num_colours(pixels: Pixels) -> int:
    return len(np.unique((pixels // (256 // _LEVELS)).reshape(-1, 3), axis=0))


def _even_border(pixels: Pixels) -> float:
    """Return the share of the border's pixels that have about its median colour."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).astype(int)
    return float((np.abs(border - np.median(border, axis=0)).max(axis=1) < _NEAR).mean())
