"""Captions of more text tokens than the models read: what is done about them, before any image.

fail: the job ends, with the file, the caption and the remedies. cut: the beginning that fits stays.
skip: the caption is left out, and the pair with its last one. Both are counted and named.
"""

from __future__ import annotations

from typing import Literal

from dalle.errors import CaptionTooLong, DataError
from dalle.preprocess.clip_tokenizer import ClipTokenizer
from dalle.preprocess.tokenizer import CaptionTokenizer
from training.data.pairs import Dataset
from training.data.skips import SkipReason, printable
from training.data.sources.index import Pairs
from training.stopping import Stop, unless_stopped


def fit_captions(
    pairs: Pairs, tokenizer: CaptionTokenizer, how: Literal["cut", "skip"], stop: Stop
) -> None:
    """Cut or leave out the captions of a channel that are too long, and count each.

    Raises DataError when no pair is left; Stopped.
    """
    reason = SkipReason.CUT_CAPTION if how == "cut" else SkipReason.LONG_CAPTION
    changed = []
    for index in unless_stopped(range(len(pairs)), stop):
        captions = []
        for caption in pairs.captions(index):
            fitting = tokenizer.fitting(caption)
            if fitting != caption:
                name = pairs.name(index)
                detail = f"{name}: {reason}, {tokenizer.text_length} tokens: {caption[:80]!r}"
                pairs.skips.add(reason, name, detail)
            if fitting == caption or (how == "cut" and fitting):
                captions.append(fitting)
        changed.append(tuple(captions))
    if not any(changed):
        raise DataError(
            f"{pairs.channel}: every caption is longer than text_length={tokenizer.text_length}; "
            "raise text_length, or set long_captions=cut"
        )
    pairs.replace_captions(changed)


def too_long(
    dataset: Dataset,
    index: int,
    error: CaptionTooLong,
    tokenizer: CaptionTokenizer,
    is_kept: bool = False,
) -> CaptionTooLong:
    """Return the error of a pair's caption with the pair's name and the remedies.

    is_kept: whether the tokenizer is an earlier model's, whose text length stays.
    """
    if isinstance(tokenizer, ClipTokenizer):
        remedy = "the CLIP that is trained on reads no more; shorten"
    elif is_kept:
        remedy = "the model of the channel reads no more; shorten"
    else:
        remedy = "raise text_length, shorten"
    return CaptionTooLong(
        f"{dataset.channel}/{printable(dataset.name(index))}: {error}; {remedy} "
        "the caption, or set long_captions to cut or skip"
    )
