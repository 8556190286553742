"""Words of captions that a word list lacks: refused before any training, or named.

A model that is trained on keeps its tokenizer, which reads all of them as one token.
"""

from __future__ import annotations

import logging
from collections import Counter

from dalle.errors import DataError
from dalle.preprocess.tokenizer import CaptionTokenizer
from training.data.pairs import Dataset
from training.data.skips import printable
from training.stopping import Stop, unless_stopped

logger = logging.getLogger(__name__)

NAMED = 10
"""Unknown words that a message names, the most frequent ones."""


def check_words(
    pairs: Dataset, tokenizer: CaptionTokenizer, max_bad_share: float, stop: Stop
) -> None:
    """Count the captions with words that a tokenizer does not know, and log the words.

    Raises DataError when more than `max_bad_share` of the captions have one; Stopped.
    """
    if tokenizer.words is None:
        return
    words: Counter[str] = Counter()
    num_captions = num_unknown = 0
    first = ""
    for index in unless_stopped(range(len(pairs)), stop):
        for caption in pairs.captions(index):
            unknown = tokenizer.unknown_words(caption)
            num_captions += 1
            num_unknown += bool(unknown)
            words.update(unknown)
            if unknown and not first:
                first = f"{pairs.channel}/{printable(pairs.name(index))}: {caption[:80]!r}"
    if not words:
        return
    named = ", ".join(f"{word[:40]!r} ({number:,})" for word, number in words.most_common(NAMED))
    more = f" and {len(words) - NAMED:,} more" if len(words) > NAMED else ""
    found = (
        f"{num_unknown:,} of {num_captions:,} captions have words that the model's tokenizer does "
        f"not know, the first is {first}: {named}{more}"
    )
    if num_unknown > max_bad_share * num_captions:
        known = ", ".join(tokenizer.words[:NAMED])
        raise DataError(
            f"{found}. train_on keeps that tokenizer, which reads them all as one token. It knows "
            f"{len(tokenizer.words):,} words: {known} and so on; use these in the captions, or "
            "train a new model, with tokenizer_kind=bpe if it is to be trained on with other words"
        )
    logger.warning("%s; they are all read as one token", found)
