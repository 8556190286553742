"""Captions <-> text tokens by the `tokenizers` library, saved as one `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dalle.errors import ArtefactError, CaptionTooLong, HyperparameterError
from dalle.platform.json_file import read_json
from dalle.preprocess.captions import BLANKS, TRACELESS
from dalle.preprocess.openai_clip import clip_module, openai_tokenizer
from dalle.types import SMALLEST_BPE_VOCABULARY, TokenizerKind

PADDING = "[PAD]"  # id 0: fills a caption up to the text length; the first one ends it
UNKNOWN = "[UNK]"  # id 1: a word of no training caption (kind "word" only)
FILE_NAME = "tokenizer.json"
WORDS_PER_TEXT = 4096
MAX_FILE_BYTES = 256 << 20  # of a file; the largest vocabularies take some 50 MB
MAX_TEXT_LENGTH = 65_536


class CaptionTokenizer:
    """Tokenizer of captions, `text_length` ids each. Case and the kind of blanks do not matter.

    Kind "word" has an id for every word of the training captions and suits a small, closed
    vocabulary. "bpe" learns byte-pair merges and encodes any text. "clip" is the byte-pair encoding
    of OpenAI's CLIP, 49,408 entries without training.
    """

    def __init__(
        self, tokenizer: Tokenizer, text_length: int, *, cleans_as_clip: bool = False
    ) -> None:
        """cleans_as_clip: whether captions are cleaned first as OpenAI's CLIP cleans them."""
        self._tokenizer = tokenizer
        self._cleans_as_clip = cleans_as_clip
        # A caption that spells "[PAD]" means these letters, not padding.
        tokenizer.encode_special_tokens = True
        self.text_length = text_length

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        *,
        kind: TokenizerKind = "word",
        vocab_size: int = 16384,
        text_length: int | None = None,
    ) -> CaptionTokenizer:
        """Learn the vocabulary from captions.

        vocab_size: upper limit of the number of ids. text_length: tokens per caption, by default
        those of the longest caption. Raises HyperparameterError for a vocab_size below the
        alphabet.
        """
        if kind == "bpe" and vocab_size < SMALLEST_BPE_VOCABULARY:
            raise HyperparameterError(
                f"tokenizer_vocab_size must be at least {SMALLEST_BPE_VOCABULARY} with "
                f"tokenizer_kind=bpe, got {vocab_size}"
            )
        captions = list(captions)
        if kind == "clip":
            tokenizer = clip_tokenizer()
        else:
            tokenizer = _untrained(kind)
            tokenizer.train_from_iterator(captions, _trainer(kind, vocab_size))
        trained = cls(tokenizer, text_length or 1, cleans_as_clip=kind == "clip")
        if text_length is None:
            trained.text_length = max((len(ids) for ids in trained._ids(captions)), default=1) or 1
        return trained

    @classmethod
    def count_words(cls, captions: Iterable[str], kind: TokenizerKind) -> Counter[str]:
        """Count the words that `train` splits captions into; none for "clip".

        The counts of a data set's parts add up to those of the whole, see `of_words`.
        """
        counts: Counter[str] = Counter()
        if kind != "clip":
            untrained = _untrained(kind)
            normalise = untrained.normalizer.normalize_str
            split = untrained.pre_tokenizer.pre_tokenize_str
            for caption, times in Counter(captions).items():
                for word, _ in split(normalise(caption)):
                    counts[word] += times
        return counts

    @classmethod
    def of_words(
        cls, counts: Mapping[str, int], *, kind: TokenizerKind, vocab_size: int, text_length: int
    ) -> CaptionTokenizer:
        """Return the tokenizer that `train` learns from captions with these words."""
        untrained = cls.train([], kind=kind, vocab_size=vocab_size, text_length=text_length)
        if kind == "clip":
            return untrained
        # The same training on words that are split already: none has a line break.
        words = Tokenizer(untrained._tokenizer.model)
        words.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
        words.train_from_iterator(_lines(counts), _trainer(kind, vocab_size))
        untrained._tokenizer.model = words.model
        return untrained

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def words(self) -> tuple[str, ...] | None:
        """Words that it knows, in order of the alphabet; None where it reads any text."""
        if not isinstance(self._tokenizer.model, models.WordLevel):
            return None
        return tuple(sorted(self._tokenizer.get_vocab().keys() - {PADDING, UNKNOWN}))

    def unknown_words(self, caption: str) -> list[str]:
        """Return the words of a caption that a word list lacks, each once, as they are written."""
        if self.words is None:
            return []
        encoding = self._tokenizer.encode(caption)
        unknown = self._tokenizer.token_to_id(UNKNOWN)
        places = zip(encoding.ids, encoding.offsets, strict=True)
        return list(dict.fromkeys(caption[a:b] for id, (a, b) in places if id == unknown))

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> text tokens [B, text_length] int64, 0 after the last word.

        Raises CaptionTooLong for the first caption that does not fit.
        """
        text_tokens = torch.zeros(len(captions), self.text_length, dtype=torch.int64)
        for row, ids in enumerate(self._ids(captions)):
            count = len(ids)
            if count > self.text_length:
                raise CaptionTooLong(
                    f"caption must be at most {self.text_length} tokens long, got {count}: "
                    f"{captions[row][:80]!r}",
                    field="caption",
                )
            text_tokens[row, :count] = torch.tensor(ids, dtype=torch.int64)
        return text_tokens

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of text tokens of each caption, however many they are."""
        return [len(ids) for ids in self._ids(captions)]

    def fitting(self, caption: str) -> str:
        """Return the longest beginning of a caption that fits into the text length."""
        (ids,) = self._ids([caption])
        if len(ids) <= self.text_length:
            return caption
        low, high = 0, len(caption)  # the first fits, the second does not
        while high - low > 1:
            middle = (low + high) // 2
            (ids,) = self._ids([caption[:middle]])
            low, high = (middle, high) if len(ids) <= self.text_length else (low, middle)
        begin = caption[:low]
        if begin.strip() and not (caption[low].isspace() or begin[-1].isspace()):
            begin = begin.rsplit(None, 1)[0] if len(begin.split()) > 1 else begin
        return begin.rstrip()

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the ids of each caption, of any number and without padding."""
        cleaned = map(_clip_cleaned, captions) if self._cleans_as_clip else captions
        with _panics_are_errors():
            return [encoding.ids for encoding in self._tokenizer.encode_batch(list(cleaned))]

    def decode(self, text_tokens: Tensor) -> list[str]:
        """Text tokens [B, .] -> captions, each up to its first padding."""
        captions = []
        for ids in text_tokens.tolist():
            end = ids.index(0) if 0 in ids else len(ids)
            captions.append(self._tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
        return captions

    def identity(self) -> str:
        """Return the sha256 of everything that decides the ids of a caption."""
        content = f"{self.text_length} {self._cleans_as_clip} {self._tokenizer.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`: the file of the library with two settings added."""
        content = json.loads(self._tokenizer.to_str())
        content["text_length"] = self.text_length
        content["cleans_as_clip"] = self._cleans_as_clip
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (directory / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> CaptionTokenizer:
        """Read the file of `save`. Raises ArtefactError when it is something else."""
        path = directory / FILE_NAME
        try:
            content = read_json(path, MAX_FILE_BYTES)
            text_length = int(content.pop("text_length"))
            if not 1 <= text_length <= MAX_TEXT_LENGTH:
                raise ValueError(
                    f"text_length must be from 1 to {MAX_TEXT_LENGTH}, got {text_length}"
                )
            cleans_as_clip = bool(content.pop("cleans_as_clip", False))
            with _panics_are_errors():
                tokenizer = Tokenizer.from_str(json.dumps(content))
            if content.get("truncation") or content.get("padding"):
                raise ValueError("truncation and padding must be null: captions are never cut")
            return cls(tokenizer, text_length, cleans_as_clip=cleans_as_clip)
        # The library raises a bare Exception for a file that it cannot read.
        except Exception as error:
            raise ArtefactError(f"{path} is not a caption tokenizer: {error}") from error


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Raise RuntimeError for a panic of the library, whose own class is no Exception.

    Such a panic would end the thread that every request waits for.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizers library failed: {error}") from error


def _untrained(kind: Literal["word", "bpe"]) -> Tokenizer:
    if kind == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    # Saved with the tokenizer, so that one of an earlier version reads captions as it did.
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(TRACELESS), ""),
            normalizers.Replace(Regex(BLANKS), " "),
            normalizers.Strip(),
        ]
    )
    return tokenizer


def _trainer(
    kind: Literal["word", "bpe"], vocab_size: int
) -> trainers.WordLevelTrainer | trainers.BpeTrainer:
    options: dict[str, Any] = {"special_tokens": [PADDING, UNKNOWN], "show_progress": False}
    if kind == "word":
        return trainers.WordLevelTrainer(vocab_size=vocab_size, **options)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, **options)


def _lines(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield each word `count` times, up to WORDS_PER_TEXT of them in one text."""
    for word, count in counts.items():
        for first in range(0, count, WORDS_PER_TEXT):
            yield "\n".join([word] * min(WORDS_PER_TEXT, count - first))


def _clip_cleaned(caption: str) -> str:
    """Clean a caption as OpenAI's tokenizer does: Unicode, curly quotes and ligatures repaired by
    ftfy, HTML entities resolved, runs of blanks made one, lower case."""
    original = clip_module("simple_tokenizer")
    cleaned: str = original.whitespace_clean(original.basic_clean(caption)).lower()
    return cleaned


def clip_tokenizer(*, is_padded: bool = True) -> Tokenizer:
    """Return OpenAI's byte-pair encoding with every id moved up by one, as id 0 is padding here.

    The original has no padding; its id 0 is "!" (openai/CLIP, simple_tokenizer.py).
    is_padded: False leaves the ids as they are, so that "!" is padding, as in DALLE-pytorch.
    """
    original = openai_tokenizer()
    vocabulary = {token: index + is_padded for token, index in original.encoder.items()}
    if is_padded:
        vocabulary[PADDING] = 0
    merges = list(original.bpe_ranks)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", fuse_unk=False)
    )
    # With case ignored, none of the original's classes matches U+0345, so it is excluded here.
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\u0345]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Undo the byte alphabet, and turn the end mark of a word into a space.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return tokenizer
