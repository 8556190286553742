"""Tokenizer files of DALLE-pytorch's users -> a `CaptionTokenizer` with exactly their ids."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, processors

from dalle.errors import ForeignFileError
from dalle.models.legacy.config import LegacyTransformerConfig
from dalle.platform.json_file import read_json
from dalle.preprocess.tokenizer import MAX_FILE_BYTES, CaptionTokenizer, clip_tokenizer
from training.job.legacy.config.choices import NotToldError
from training.job.legacy.config.sizes import KNOWN_VOCABULARIES
from training.job.legacy.config.versions import VersionRange

CLIP = "clip"
"""In place of a file: the byte pairs of OpenAI's CLIP, DALLE-pytorch's SimpleTokenizer."""
CLIP_VOCABULARY = 49408
_START, _END = "<|startoftext|>", "<|endoftext|>"


def needed_tokenizer(vocabulary: int, *, is_kobiso: bool = False) -> str:
    """Describe the tokenizer that a model needs."""
    if vocabulary == CLIP_VOCABULARY:
        return "the byte pairs of OpenAI's CLIP (--tokenizer clip)"
    known = KNOWN_VOCABULARIES.get(vocabulary)
    few = "at most " if is_kobiso else ""
    return (
        f"a tokenizer.json of Hugging Face's tokenizers with {few}{vocabulary:,} entries, the one "
        f"that it was trained with{f': {known}' if known else ''} (--tokenizer FILE)"
    )


def ends_captions(versions: VersionRange) -> bool:
    """Return whether SimpleTokenizer ended captions by a mark, as it did from 0.8.1 to 0.9.0 only.

    Raises NotToldError where the versions leave it open.
    """
    told = versions.is_within("0.8.1", "0.9.0")
    if told is None:
        raise NotToldError(
            f"the file does not tell whether its captions end with {_END}, as those of the byte "
            "pairs of OpenAI's CLIP do in DALLE-pytorch 0.8.1 to 0.9.0: say the version that "
            "trained it by --dalle-pytorch-version"
        )
    return told


def load_tokenizer(
    source: str | None,
    config: LegacyTransformerConfig,
    versions: VersionRange,
    *,
    is_kobiso: bool,
) -> CaptionTokenizer:
    """Return the tokenizer of a model. source: a path, or `clip`; None: clip where it fits.

    is_kobiso: captions are framed by its two marks, and the file may have fewer entries than the
    model. Raises ForeignFileError for a file that is none, or of another size; NotToldError.
    """
    vocabulary, needed = config.text_vocab_size, needed_tokenizer(config.text_vocab_size)
    if source is None and vocabulary != CLIP_VOCABULARY:
        raise ForeignFileError(
            f"the tokenizer is in no file of DALLE-pytorch's, and the model needs {needed}"
        )
    if source in (None, CLIP):
        tokenizer, name = clip_tokenizer(is_padded=False), CLIP
    else:
        assert source is not None
        path = Path(source)
        tokenizer, name = _read(path, frames=is_kobiso), path.name
    size = tokenizer.get_vocab_size()
    fits = size <= vocabulary if is_kobiso and name != CLIP else size == vocabulary
    if not fits:
        raise ForeignFileError(
            f"the tokenizer {name} has {size:,} entries, and the model needs {needed}"
        )
    if (greatest := max(tokenizer.get_vocab().values(), default=0)) >= vocabulary:
        raise ForeignFileError(
            f"the tokenizer {name} has the id {greatest:,}, and the model's ids end at "
            f"{vocabulary - 1:,}; it needs {needed}"
        )
    if name == CLIP and ends_captions(versions):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {_END}", special_tokens=[(_END, tokenizer.token_to_id(_END))]
        )
    return CaptionTokenizer(tokenizer, config.text_length, cleans_as_clip=name == CLIP)


def _read(path: Path, *, frames: bool) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(read_json(path, MAX_FILE_BYTES)))
    except OSError as error:
        raise ForeignFileError(f"{path.name} cannot be read: {error.strerror}") from error
    # The library raises a bare Exception, or a panic that is none, for a file it cannot read.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        first = str(error).partition("\n")[0][:200]
        raise ForeignFileError(
            f"{path.name} is not a tokenizer.json of Hugging Face's tokenizers: {first}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if not frames:
        # What the package puts in place of the file's own: it adds no marks.
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return tokenizer
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in (_START, _END)]
    if any(number is None for _, number in marks):
        raise ForeignFileError(
            f"{path.name} lacks {_START} or {_END}, between which kobiso's release puts captions"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=marks
    )
    return tokenizer
