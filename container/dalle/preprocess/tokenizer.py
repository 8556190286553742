"""Captions <-> text tokens, by the `tokenizers` library; one `tokenizer.json` holds it all."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dalle.errors import ArtefactError, CaptionTooLong
from dalle.preprocess.openai_clip import clip_module
from dalle.types import TokenizerKind

PADDING = "[PAD]"  # id 0: fills a caption up to the text length, and so also ends it
UNKNOWN = "[UNK]"  # id 1: a word that no training caption had (kind "word" only)
FILE_NAME = "tokenizer.json"
WORDS_TOGETHER = 4096


class CaptionTokenizer:
    """Captions as `text_length` ids each.

    kind "word" has an id for every word of the training captions: the best choice for a small,
    closed vocabulary. "bpe" learns byte-pair merges and can write anything. "clip" is OpenAI's
    CLIP byte-pair encoding, 49,408 entries, which need no training.
    """

    def __init__(
        self, tokenizer: Tokenizer, text_length: int, *, cleans_as_clip: bool = False
    ) -> None:
        """cleans_as_clip: captions are mended first as OpenAI's CLIP mends them."""
        self._tokenizer = tokenizer
        self._cleans_as_clip = cleans_as_clip
        # A caption that spells "[PAD]" means those letters, not our padding.
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

        vocab_size: the most ids to give out. text_length: tokens per caption; the longest
        caption's unless given.
        """
        captions = list(captions)
        cleans_as_clip = kind == "clip"
        match kind:
            case "word":
                tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
                tokenizer.normalizer = _lower()
                tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
                tokenizer.train_from_iterator(captions, _trainer(kind, vocab_size))
            case "bpe":
                tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
                tokenizer.normalizer = _lower()
                tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
                tokenizer.decoder = decoders.ByteLevel()
                tokenizer.train_from_iterator(captions, _trainer(kind, vocab_size))
            case "clip":
                tokenizer = _clip_tokenizer()
        trained = cls(tokenizer, text_length or 1, cleans_as_clip=cleans_as_clip)
        if text_length is None:
            trained.text_length = max((len(ids) for ids in trained._ids(captions)), default=1) or 1
        return trained

    @classmethod
    def count_words(cls, captions: Iterable[str], kind: TokenizerKind) -> Counter[str]:
        """How often each word occurs, as `train` parts captions into words; none for "clip".

        Such counts of several parts of a data set add up to those of the whole: see `of_words`.
        """
        match kind:
            case "word":
                parting: pre_tokenizers.PreTokenizer = pre_tokenizers.Whitespace()
            case "bpe":
                parting = pre_tokenizers.ByteLevel(add_prefix_space=True)
            case "clip":
                return Counter()
        lower = _lower()
        counts: Counter[str] = Counter()
        for caption, times in Counter(captions).items():
            for word, _ in parting.pre_tokenize_str(lower.normalize_str(caption)):
                counts[word] += times
        return counts

    @classmethod
    def of_words(
        cls, counts: Mapping[str, int], *, kind: TokenizerKind, vocab_size: int, text_length: int
    ) -> CaptionTokenizer:
        """What `train` learns from captions whose words are these, see `count_words`."""
        untrained = cls.train([], kind=kind, vocab_size=vocab_size, text_length=text_length)
        if kind == "clip":
            return untrained
        # The same training, of words that are parted already: none holds a line break.
        words = Tokenizer(untrained._tokenizer.model)
        words.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
        words.train_from_iterator(_lines(counts), _trainer(kind, vocab_size))
        untrained._tokenizer.model = words.model
        return untrained

    @property
    def vocab_size(self) -> int:
        """Number of ids, padding included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> text tokens [B, text_length] int64, 0 behind the last word.

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

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Of any length, without padding."""
        cleaned = map(_clip_cleaned, captions) if self._cleans_as_clip else captions
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(cleaned))]

    def decode(self, text_tokens: Tensor) -> list[str]:
        """Text tokens [B, .] -> captions; each ends at its first padding."""
        captions = []
        for ids in text_tokens.tolist():
            end = ids.index(0) if 0 in ids else len(ids)
            captions.append(self._tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
        return captions

    def identity(self) -> str:
        """sha256 of everything that decides which ids a caption has."""
        content = f"{self.text_length} {self._cleans_as_clip} {self._tokenizer.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`: the library's own file with our two settings beside its own."""
        content = json.loads(self._tokenizer.to_str())
        content["text_length"] = self.text_length
        content["cleans_as_clip"] = self._cleans_as_clip
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (directory / FILE_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> CaptionTokenizer:
        """Read what `save` wrote; ArtefactError when it is something else."""
        path = directory / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            text_length = int(content.pop("text_length"))
            cleans_as_clip = bool(content.pop("cleans_as_clip", False))
            tokenizer = Tokenizer.from_str(json.dumps(content))
            return cls(tokenizer, text_length, cleans_as_clip=cleans_as_clip)
        # The library raises bare Exception for a file it cannot read.
        except Exception as error:
            raise ArtefactError(f"{path} is not a caption tokenizer: {error}") from error


def _trainer(
    kind: Literal["word", "bpe"], vocab_size: int
) -> trainers.WordLevelTrainer | trainers.BpeTrainer:
    special = [PADDING, UNKNOWN]
    if kind == "word":
        return trainers.WordLevelTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False
        )
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _lines(counts: Mapping[str, int]) -> Iterator[str]:
    """Each word so many times, some thousands of them in a text."""
    for word, count in counts.items():
        for first in range(0, count, WORDS_TOGETHER):
            yield "\n".join([word] * min(WORDS_TOGETHER, count - first))


def _lower() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def _clip_cleaned(caption: str) -> str:
    """What OpenAI's tokenizer makes of a caption first: broken Unicode, curly quotes and ligatures
    mended (by ftfy), HTML entities resolved, one blank for many, lower case."""
    original = clip_module("simple_tokenizer")
    cleaned: str = original.whitespace_clean(original.basic_clean(caption)).lower()
    return cleaned


def _clip_tokenizer() -> Tokenizer:
    """OpenAI's byte-pair encoding with every id moved up by one: id 0 is padding here.

    The original has no padding of its own; its id 0 is "!" (openai/CLIP, simple_tokenizer.py).
    """
    original = clip_module("simple_tokenizer").SimpleTokenizer()
    vocabulary = {PADDING: 0} | {token: index + 1 for token, index in original.encoder.items()}
    merges = list(original.bpe_ranks)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", fuse_unk=False)
    )
    # The original ignores case, and then none of its classes has U+0345: it leaves that one out.
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\u0345]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Undoes the byte alphabet, and the mark that ends a word becomes a space.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return tokenizer
