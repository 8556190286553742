"""Captions to ids and back, for the three kinds of tokenizer."""

import functools
import json
import string

import clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle.errors import ArtefactError, CaptionTooLong, HyperparameterError
from dalle.preprocess.tokenizer import FILE_NAME, UNKNOWN, CaptionTokenizer
from dalle.types import SMALLEST_BPE_VOCABULARY
from training import rainbow

CAPTIONS = ["a big red star", "a small blue circle", "a rotated green star on a yellow square"]
KINDS = ["word", "bpe", "clip"]

# Left out: "<|startoftext|>" and "<|endoftext|>", which a caption here cannot spell.
HARD_STRINGS = [
    "Hello, World!  it's 12345 o'clock",
    "café naïve Ünïcode",
    "cafe\u0301 in two code points",
    "日本語 テスト 中文",
    "emoji 😀👍🏽 flags 🇩🇪",
    "tabs\tand\nnewlines\r\n  x ",
    "x_y__z--!!??...",
    "½ ² ³ Ⅷ ٣ 1,000.50$ 7%",
    "I'LL we'RE You'Ve 's'd 'S 'T",
    "non\u00a0breaking\u2009thin\u3000ideographic",
    "İstanbul ẞ Ὀδυσσεύς",
    "हिन्दी क्षत्रिय",
    "!",
    "",
    "   ",
    string.punctuation,
    "&lt;b&gt;Tom &amp;amp; Jerry&#39;s&nbsp;&nbsp;house&lt;/b&gt;",
    "“curly” ‘quotes’ it’s",
    "a ﬁne ﬂag, ＷＩＤＥ letters！",
    "schÃ¶n mojibake âœ”",
    "\x1b[31mred\x1b[0m soft\u00adhyphen zero\u200bwidth \ufeff",
    "ΟΔΥΣΣΕΥΣ",
    "an iota ⎹\u0345 below a bar",
    "the long 'ſ and ß",
]


@functools.cache
def train(kind: str, **fields: object) -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, kind=kind, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_inverts_encode(kind):
    tokenizer = train(kind)
    text_tokens = tokenizer.encode(CAPTIONS)
    assert text_tokens.dtype == torch.int64
    assert text_tokens.shape == (3, tokenizer.text_length)
    assert tokenizer.decode(text_tokens) == CAPTIONS
    assert (text_tokens >= 0).all()
    assert (text_tokens < tokenizer.vocab_size).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_length_is_the_longest_captions_unless_given(kind):
    tokenizer = train(kind)
    lengths = (tokenizer.encode(CAPTIONS) != 0).sum(dim=1)
    assert lengths.max() == tokenizer.text_length
    assert train(kind, text_length=30).encode(CAPTIONS).shape == (3, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_0_and_only_behind_the_last_word(kind):
    for row in train(kind, text_length=30).encode(CAPTIONS):
        count = int((row != 0).sum())
        assert 0 < count < 30
        assert (row[count:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_ends_at_its_first_padding(kind):
    tokenizer = train(kind)
    text_tokens = tokenizer.encode(["a big red star"])
    count = int((text_tokens != 0).sum())
    text_tokens = torch.nn.functional.pad(text_tokens[:, :count], (0, 3))
    text_tokens[0, -1] = text_tokens[0, 0]
    assert tokenizer.decode(text_tokens) == ["a big red star"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_that_is_too_long_is_named_with_its_length_and_the_limit(kind):
    tokenizer = train(kind, text_length=4)
    with pytest.raises(CaptionTooLong, match=r"at most 4 tokens.*got 5: 'a a a a a'") as caught:
        tokenizer.encode(["a a", "a a a a a"])
    assert (caught.value.status, caught.value.field) == (422, "caption")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*HARD_STRINGS, "zebra" * 20, "日本" * 20])
@pytest.mark.parametrize("text_length", [4, 9])
def test_the_beginning_that_fits_into_the_text_length_is_encoded(kind, text, text_length):
    tokenizer = train(kind, text_length=text_length)
    fitting = tokenizer.fitting(text)
    assert text.startswith(fitting)
    tokenizer.encode([fitting])


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_cut_between_words(kind):
    tokenizer = train(kind, text_length=4)
    assert tokenizer.fitting("a a a a a") == "a a a a"
    assert tokenizer.fitting("a red star") == "a red star"
    assert tokenizer.fitting("a a a\na a") == "a a a\na"
    assert tokenizer.fitting("a a a a\ta") == "a a a a"


@pytest.mark.parametrize("kind", KINDS)
def test_case_is_ignored(kind):
    tokenizer = train(kind)
    assert (tokenizer.encode(["A BIG Red star"]) == tokenizer.encode(["a big red star"])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_caption_is_all_padding(kind):
    text_tokens = train(kind).encode([""])
    assert (text_tokens == 0).all()
    assert train(kind).decode(text_tokens) == [""]


@pytest.mark.parametrize("kind", KINDS)
def test_no_captions_give_no_rows(kind):
    assert train(kind).encode([]).shape[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_cannot_spell_padding(kind):
    text_tokens = train(kind, text_length=20).encode(["red [PAD] star"])
    count = int((text_tokens != 0).sum())
    assert (text_tokens[0, :count] != 0).all()
    assert count >= 3


def test_words_that_training_never_saw_share_one_id():
    tokenizer = train("word")
    known, first, second = tokenizer.encode(["a a star", "a zebra star", "a lion star"])
    assert (first == second).all()
    assert first[1] == 1
    assert (known[[0, 2]] == first[[0, 2]]).all()


def test_words_that_a_list_lacks_are_named_once_as_they_are_written():
    tokenizer = train("word")
    assert tokenizer.unknown_words("a Zebra\tor ZEBRA, a zebra STAR [UNK]") == [
        *("Zebra", "or", "ZEBRA", ",", "zebra", "[", "UNK", "]"),
    ]
    assert tokenizer.unknown_words("a STAR") == []
    assert {"a", "star"} <= set(tokenizer.words)
    assert "[UNK]" not in tokenizer.words


@pytest.mark.parametrize("kind", ["bpe", "clip"])
def test_byte_pairs_know_every_word(kind):
    tokenizer = train(kind)
    assert tokenizer.words is None
    assert tokenizer.unknown_words("a zebra 日本") == []


def test_byte_pairs_can_write_words_that_training_never_saw():
    tokenizer = train("bpe", text_length=40)
    assert tokenizer.decode(tokenizer.encode(["zebra’s 日本 😀"])) == ["zebra’s 日本 😀"]


@pytest.mark.slow
def test_every_word_of_the_rainbow_has_an_id_of_its_own():
    captions = [sample.caption for sample in rainbow.samples()]
    tokenizer = CaptionTokenizer.train(captions, kind="word")
    words = {word for caption in captions for word in caption.split()}
    assert tokenizer.vocab_size == len(words) + 2
    text_tokens = tokenizer.encode(captions)
    assert tokenizer.text_length == 7
    assert not (text_tokens == 1).any()
    assert len(text_tokens.unique(dim=0)) == len(captions)


def test_the_vocabulary_is_no_larger_than_vocab_size():
    assert train("word", vocab_size=5).vocab_size == 5
    assert train("bpe", vocab_size=270).vocab_size == 270


def test_byte_pairs_are_refused_a_vocabulary_below_their_alphabet():
    smallest = SMALLEST_BPE_VOCABULARY
    assert train("bpe", vocab_size=smallest).vocab_size == smallest
    with pytest.raises(HyperparameterError, match=r"at least 258.*got 257"):
        train("bpe", vocab_size=smallest - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "other",
    [
        "a  big red star",
        " a big\nred star\n",
        "a\tbig\r\nred\u00a0star",
        "a\u2003big\u3000red\u2028star",
    ],
)
def test_every_run_of_blanks_is_one_blank(kind, other):
    tokenizer = train(kind, text_length=20)
    assert (tokenizer.encode([other]) == tokenizer.encode(["a big red star"])).all()


@pytest.mark.parametrize("kind", ["word", "bpe"])  # CLIP's repairs odd characters in its own way
@pytest.mark.parametrize("other", ["a\x0bbig\x1fred\x0c\x85star", "a\x1cbig red\u2029star"])
def test_odd_line_breaks_and_separators_are_blanks(kind, other):
    tokenizer = train(kind, text_length=20)
    assert (tokenizer.encode([other]) == tokenizer.encode(["a big red star"])).all()


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize(
    "other", ["\ufeffa big red star", "a big\u200b r\u00aded\x07 \u202astar\0"]
)
def test_characters_without_a_trace_make_no_tokens(kind, other):
    tokenizer = train(kind, text_length=20)
    assert (tokenizer.encode([other]) == tokenizer.encode(["a big red star"])).all()


def test_joiners_count_as_they_decide_how_their_neighbours_look():
    family, people = "\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469"
    tokenizer = train("bpe", text_length=40)
    assert (tokenizer.encode([family]) != tokenizer.encode([people])).any()


def test_blanks_in_the_training_captions_change_no_tokenizer():
    usual = train("bpe", text_length=20)
    other = [caption.replace(" ", " \t\n") for caption in CAPTIONS]
    again = CaptionTokenizer.train(other, kind="bpe", text_length=20)
    assert again.identity() == usual.identity()


def test_a_tokenizer_of_an_earlier_version_reads_captions_as_it_did(tmp_path):
    train("bpe", text_length=20).save(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    content["normalizer"]["normalizers"] = content["normalizer"]["normalizers"][:2]
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    tokenizer = CaptionTokenizer.load(tmp_path)
    assert (tokenizer.encode(["a  star"]) != tokenizer.encode(["a star"])).any()


@pytest.mark.parametrize("text", HARD_STRINGS)
def test_clip_ids_are_openais_moved_up_by_one(text):
    start, *ids = clip.tokenize(text)[0].tolist()
    assert start == 49406
    expected = [index + 1 for index in ids[: ids.index(49407)]]
    (row,) = train("clip", text_length=75).encode([text])
    assert row[row != 0].tolist() == expected


def test_clip_counts_the_longest_caption_as_it_reads_it():
    tokenizer = CaptionTokenizer.train(["&lt; &amp;"], kind="clip")
    assert tokenizer.text_length == 2  # "<" and "&"


def test_clips_exclamation_mark_is_no_padding():
    (row,) = train("clip", text_length=5).encode(["! !"])
    assert (row != 0).sum() == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_one(kind, tmp_path):
    tokenizer = train(kind, text_length=40)
    tokenizer.save(tmp_path)
    loaded = CaptionTokenizer.load(tmp_path)
    captions = [*CAPTIONS, "zebra’s [PAD] 日本 😀 &lt;&gt;"]
    assert (loaded.encode(captions) == tokenizer.encode(captions)).all()
    assert loaded.decode(loaded.encode(captions)) == tokenizer.decode(tokenizer.encode(captions))
    assert (loaded.vocab_size, loaded.text_length) == (tokenizer.vocab_size, 40)
    assert loaded.identity() == tokenizer.identity()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_captions_in_another_order_make_the_same_tokenizer_and_others_another(kind):
    usual = train(kind, text_length=40).identity()
    again = CaptionTokenizer.train(CAPTIONS[::-1], kind=kind, text_length=40).identity()
    assert again == usual
    assert train(kind, text_length=41).identity() != usual
    others = CaptionTokenizer.train(["a cyan moon moon"], kind=kind, text_length=40)
    assert (others.identity() == usual) == (kind == "clip")  # which learns nothing


@pytest.mark.parametrize("content", [None, "", "[1]", '{"text_length": 3}', '{"model": 1}'])
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ArtefactError, match=r"tokenizer\.json is not a caption tokenizer"):
        CaptionTokenizer.load(tmp_path)


def test_a_tokenizer_of_another_format_is_named(tmp_path):
    train("word").save(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    content["model"]["type"] = "Imaginary"
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="is not a caption tokenizer"):
        CaptionTokenizer.load(tmp_path)


OF_ALL_HOSTS = [
    "a Red square",
    "a red circle, a red star",
    "ein grüner Stern.",
    "a red square",
    "don't! 3 birds & 12 stars\tagain",
    "İstanbul, naïve café",
]


@pytest.mark.parametrize("kind", ["word", "bpe", "clip"])
@pytest.mark.parametrize("vocab_size", [12, 290, 400])
def test_word_counts_of_parts_train_the_tokenizer_of_the_whole(kind, vocab_size):
    vocab_size = max(vocab_size, SMALLEST_BPE_VOCABULARY) if kind == "bpe" else vocab_size
    options = {"kind": kind, "vocab_size": vocab_size, "text_length": 32}
    parts = [
        CaptionTokenizer.count_words(part, kind) for part in (OF_ALL_HOSTS[:2], OF_ALL_HOSTS[2:])
    ]
    learned = CaptionTokenizer.of_words(parts[1] + parts[0], **options)
    whole = CaptionTokenizer.train(OF_ALL_HOSTS, **options)
    assert learned.identity() == whole.identity()
    assert torch.equal(learned.encode(OF_ALL_HOSTS), whole.encode(OF_ALL_HOSTS))
    assert learned.decode(learned.encode(["a red star"])) == whole.decode(
        whole.encode(["a red star"])
    )


def test_a_panic_of_the_library_is_an_error_that_a_request_can_have():
    """Its own class derives from BaseException, and would end the thread of all requests."""
    library = Tokenizer(models.WordLevel({UNKNOWN: 1, "a": 2}, unk_token=UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    content = json.loads(library.to_str())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 1,
        "strategy": "LongestFirst",
        "stride": 5,
    }
    tokenizer = CaptionTokenizer(Tokenizer.from_str(json.dumps(content)), text_length=4)
    with pytest.raises(RuntimeError, match="the tokenizers library failed: `stride` must be"):
        tokenizer.encode(["a a a"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst",
                         "stride": 5}}, "truncation and padding must be null"),
        ({"text_length": 10**9}, "text_length must be from 1 to 65536, got 1000000000"),
        ({"text_length": 0}, "text_length must be from 1 to 65536, got 0"),
    ],
)  # fmt: skip
def test_a_file_whose_settings_no_tokenizer_of_ours_has_is_refused(change, says, tmp_path):
    CaptionTokenizer.train(["a cat"]).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtefactError, match=f"is not a caption tokenizer: .*{says}"):
        CaptionTokenizer.load(tmp_path)
