"""Which files make up a pair is one rule in a folder, a tar shard and a stream of shards."""

import json
import unicodedata
from functools import partial

import pytest

from dalle.platform.environment import Channel
from dalle.preprocess.images import encode_image
from infra.local.pipes import Pipe, objects
from tests.training.pairs import SIZE, picture, tar_of
from training.data.__main__ import main
from training.data.pipe.channel import open_pipe
from training.data.skips import Match, SkipReason
from training.data.sources.channel import open_channel
from training.distributed.process_group import SINGLE_PROCESS
from training.stopping import NEVER

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
PLAIN = [("plain.png", 9), ("plain.txt", "plain")]


def opened(root, layout, members, caption_key=None):
    """A channel of `PLAIN` and of members: (name, number of a picture or text)."""
    content = [
        (name, value.encode() if isinstance(value, str) else encode_image(picture(value), "png"))
        for name, value in [*PLAIN, *members]
    ]
    options = {"image_size": SIZE, "max_bad_share": 1.0, "caption_key": caption_key}
    if layout == "folder":
        for name, data in content:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return open_channel(root, **options)
    tar_of(root / "shards" / "a.tar", content)
    if layout == "shard":
        return open_channel(root / "shards", **options)
    with Pipe(root / "train", partial(objects, root / "shards")):
        channel = Channel("train", root / "train", "Pipe")
        return open_pipe(channel, ranks=SINGLE_PROCESS, stop=NEVER, **options)


def found(dataset):
    """The pairs but `PLAIN`, as {number of the picture: captions}, and the counts of the rest."""
    pairs = {
        int(dataset.image(index)[0, 0, 0]): dataset.captions(index)
        for index in range(len(dataset))
        if dataset.captions(index) != ("plain",)
    }
    return pairs, dict(dataset.skips.counts)


@pytest.fixture(params=["folder", "shard", "stream"])
def layout(request):
    return request.param


@pytest.mark.parametrize("stem", ["photo v1.5 a", "22.05", "a.b/12.04 shot", "x..y", "v1.jpg"])
def test_names_with_dots_pair_and_none_gets_the_caption_of_another(tmp_path, layout, stem):
    members = [
        (f"{name}{suffix}", value if suffix == ".png" else f"picture {value}")
        for name, value in ((stem, 1), (f"{stem}2", 2))
        for suffix in (".png", ".txt")
    ]
    dataset = opened(tmp_path, layout, members)
    assert found(dataset) == ({1: ("picture 1",), 2: ("picture 2",)}, {})


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("photo v1.5 a.png", 1), SkipReason.IMAGE_WITHOUT_CAPTION),
        (("photo v1.5 a.txt", "one"), SkipReason.CAPTION_WITHOUT_IMAGE),
        (("plain.mask.png", 1), SkipReason.FURTHER),
        (("plain.en.txt", "one"), SkipReason.FURTHER),
        (("more/plain.mask.png", 1), SkipReason.IMAGE_WITHOUT_CAPTION),
        ((".plain.png", 1), SkipReason.IGNORED),
        (("plain.cls", "1"), SkipReason.IGNORED),
    ],
)
def test_a_file_with_dots_that_pairs_with_none_is_counted_by_name(tmp_path, layout, member, reason):
    dataset = opened(tmp_path, layout, [member])
    assert found(dataset) == ({}, {reason: 1})
    assert dataset.skips.examples[reason][0].endswith(member[0])


def test_files_of_one_first_part_are_not_taken_for_a_pair(tmp_path, layout):
    dataset = opened(tmp_path, layout, [("v1.5 a.png", 1), ("v1.6 b.txt", "another")])
    counts = {SkipReason.IMAGE_WITHOUT_CAPTION: 1, SkipReason.CAPTION_WITHOUT_IMAGE: 1}
    assert found(dataset) == ({}, counts)


@pytest.mark.parametrize("layout", ["shard", "stream"])
@pytest.mark.parametrize("prefix", ["", "./", "a//", "a/./"])
def test_of_members_of_one_name_the_last_are_used_together_and_the_others_counted(
    tmp_path, layout, prefix
):
    name = f"{prefix.rstrip('./')}/1".lstrip("/")
    members = [(f"{name}.png", 1), (f"{name}.txt", "first"), ("2.png", 2), ("2.txt", "two")]
    members += [(f"{prefix}1.png", 3), (f"{prefix}1.txt", "second")]
    dataset = opened(tmp_path, layout, members)
    assert found(dataset) == ({2: ("two",), 3: ("second",)}, {SkipReason.REPLACED: 2})
    assert dataset.skips.num_bad == 2


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints/1", ".Trash/2/1", "a/.cache/1", "./.hidden/1", "a/._1"]
)
def test_what_lies_in_hidden_folders_is_no_pair(tmp_path, layout, name):
    dataset = opened(tmp_path, layout, [(f"{name}.png", 1), (f"{name}.txt", "one")])
    pairs, counts = found(dataset)
    assert pairs == {}
    assert set(counts) == {SkipReason.IGNORED}


def test_a_shard_of_the_current_folder_holds_its_pairs(tmp_path, layout):
    dataset = opened(tmp_path, layout, [("./1.png", 1), ("./1.txt", "one")])
    assert found(dataset) == ({1: ("one",)}, {})


@pytest.mark.parametrize(("image", "text"), [(NFC, NFD), (NFD, NFC)])
def test_names_that_look_the_same_pair_in_whatever_unicode_form(tmp_path, layout, image, text):
    dataset = opened(tmp_path, layout, [(f"{image}/{image}.png", 1), (f"{text}/{text}.txt", "one")])
    assert found(dataset) == ({1: ("one",)}, {})


def test_pairs_of_two_unicode_forms_of_one_name_are_not_mixed(tmp_path, layout):
    members = [(f"{NFC}.png", 1), (f"{NFC}.txt", "one"), (f"{NFD}.png", 2), (f"{NFD}.txt", "two")]
    assert found(opened(tmp_path, layout, members)) == ({1: ("one",), 2: ("two",)}, {})


def test_a_second_caption_file_of_another_unicode_form_is_counted(tmp_path, layout):
    members = [(f"{NFC}.png", 1), (f"{NFC}.txt", "one"), (f"{NFD}.txt", "two")]
    counts = {SkipReason.SECOND_CAPTION: 1}
    assert found(opened(tmp_path, layout, members)) == ({1: ("one",)}, counts)


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize(
    ("members", "reason", "left"),
    [
        ([("1.png", 1), ("1.TXT", "old"), ("1.txt", "one")], SkipReason.SECOND_CAPTION, "1.TXT"),
        ([("1.png", 1), ("1.Txt", "one"), ("1.tXT", "old")], SkipReason.SECOND_CAPTION, "1.tXT"),
        ([("1.PNG", 2), ("1.png", 1), ("1.txt", "one")], SkipReason.SECOND_IMAGE, "1.PNG"),
        ([("1.webp", 2), ("1.jpg", 1), ("1.txt", "one")], SkipReason.SECOND_IMAGE, "1.webp"),
    ],
)
def test_of_two_files_for_one_place_the_usual_one_is_used_and_the_other_counted(
    tmp_path, layout, members, reason, left, is_reversed
):
    dataset = opened(tmp_path, layout, members[::-1] if is_reversed else members)
    assert found(dataset) == ({1: ("one",)}, {reason: 1})
    assert dataset.skips.examples[reason][0].endswith(left)


@pytest.mark.parametrize("layout", ["shard", "stream"])
@pytest.mark.parametrize(("caption_key", "expected"), [(None, "text"), ("caption", "json")])
def test_json_beside_text_is_no_second_caption_file(tmp_path, layout, caption_key, expected):
    members = [("1.png", 1), ("1.json", '{"caption": "json"}'), ("1.txt", "text")]
    dataset = opened(tmp_path, layout, members, caption_key)
    assert found(dataset)[0] == {1: (expected,)}
    assert SkipReason.SECOND_CAPTION not in dataset.skips.counts


def test_doctor_says_how_unusual_names_were_paired(tmp_path, capsys):
    members = [(f"{NFC}.png", 1), (f"{NFD}.txt", "one"), ("a.b.png", 2), ("a.b.txt", "two")]
    opened(tmp_path, "folder", members)
    assert main(["doctor", str(tmp_path), "--json"]) == 0
    (channel,) = json.loads(capsys.readouterr().out)["channels"]
    assert channel["num_pairs"] == 3
    assert channel["matches"] == {Match.UNICODE: 1, Match.LAST_DOT: 1}
    main(["doctor", str(tmp_path)])
    assert Match.UNICODE in capsys.readouterr().out
