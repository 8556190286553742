"""Every common layout of captioned images is read: the same pairs, and what is wrong is counted."""

import codecs
import io
import json
import logging
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dalle.errors import DataError
from dalle.preprocess.images import encode_image
from tests.training.data import layouts
from tests.training.data.layouts import PAIRS, PNG, contents, opened
from tests.training.pairs import SIZE, put
from training.data.skips import SkipReason
from training.data.sources import coco as coco_module
from training.data.tools.sharding import write_shards


@pytest.fixture
def table(tmp_path):
    """A function: text of a table, its name -> a channel with images 000.png to 011.png."""

    def make(text, name="metadata.csv"):
        layouts.images(tmp_path, PAIRS)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(data)
        return tmp_path

    return make


@pytest.mark.parametrize("layout", layouts.write)
def test_the_same_pairs_come_out_of_every_layout(layout, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    layouts.write[layout](tmp_path, PAIRS)
    dataset = opened(tmp_path)
    assert contents(dataset) == [(n, captions) for n, (_, _, captions) in enumerate(PAIRS)]
    assert dataset.skips.num_bad == 0
    assert f"train: layout: {dataset.layout}" in caplog.text


@pytest.mark.parametrize("layout", layouts.write)
def test_a_caption_that_cannot_be_seen_is_counted_in_every_layout(layout, tmp_path, caplog):
    pairs = [*PAIRS[:4], ("unseen", PAIRS[5][1], ("\u200b\ufeff\u2060",))]
    layouts.write[layout](tmp_path, pairs)
    dataset = opened(tmp_path)
    assert len(dataset) == 4
    assert dataset.skips.counts[SkipReason.EMPTY_CAPTION] == 1
    assert "U+200B" in caplog.text


@pytest.mark.parametrize("layout", layouts.write)
def test_blanks_in_captions_are_joined_in_every_layout(layout, tmp_path):
    pairs = [(name, image, ("a \t red\u00a0star ",)) for name, image, _ in PAIRS[:2]]
    layouts.write[layout](tmp_path, pairs)
    assert opened(tmp_path).captions(0) == ("a red star",)


@pytest.mark.parametrize("layout", layouts.write)
def test_a_caption_with_nul_bytes_is_counted_and_named_in_every_layout(layout, tmp_path):
    pairs = [*PAIRS[:4], ("utf16", PAIRS[5][1], ("a star".encode("utf-16-le").decode(),))]
    layouts.write[layout](tmp_path, pairs)
    dataset = opened(tmp_path)
    assert len(dataset) == 4
    assert dataset.skips.counts[SkipReason.NUL_IN_CAPTION] == 1


@pytest.mark.parametrize("layout", layouts.write)
def test_an_opened_layout_survives_a_fork_and_names_its_pairs_apart(layout, tmp_path):
    layouts.write[layout](tmp_path, PAIRS)
    dataset = opened(tmp_path)
    assert len({dataset.name(index) for index in range(len(dataset))}) == len(PAIRS)
    assert all(dataset.num_bytes(index) > 0 for index in range(len(dataset)))
    assert len(dataset.fingerprint) == 64


@pytest.mark.parametrize("layout", layouts.write)
def test_every_layout_becomes_shards_of_the_same_pairs(layout, tmp_path):
    layouts.write[layout](tmp_path / "channel", PAIRS)
    write_shards(opened(tmp_path / "channel"), tmp_path / "shards", megabytes=1)
    found = contents(opened(tmp_path / "shards"))
    assert sorted(found) == [(n, captions) for n, (_, _, captions) in enumerate(PAIRS)]


def test_rows_without_names_become_files_with_the_suffix_of_their_format(tmp_path):
    gif = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE)).save(gif, "GIF")
    rows = {"image": [PAIRS[0][1], gif.getvalue()], "text": ["a", "b"]}
    (tmp_path / "channel").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "channel" / "a.parquet")
    write_shards(opened(tmp_path / "channel"), tmp_path / "shards", megabytes=1)
    (shard,) = (tmp_path / "shards").iterdir()
    with tarfile.open(shard) as archive:
        names = archive.getnames()
    assert sorted(names) == [f"a.parquet/00000{n}.{s}" for n in (0, 1) for s in ("png", "txt")]


def test_metadata_lies_in_any_folder_and_names_files_below_it(tmp_path):
    for folder, pairs in (("cats", PAIRS[:5]), ("dogs/small", PAIRS[5:])):
        layouts.metadata_jsonl(tmp_path / folder, pairs)
    assert len(opened(tmp_path)) == 12


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("file_name,prompt\n000.png,a\n", {}, ("a",)),
        ("file_name;text\n000.png;a, b\n", {}, ("a, b",)),
        ('file_name,text\n000.png,"a ""b""\nc"\n', {}, ('a "b" c',)),
        ("file_name,text,title\n000.png,a,b\n", {"caption_key": "title"}, ("b",)),
        ("file_name,legend\n000.png,a\n", {}, ("a",)),
        ("image,id,was\n000.png,7,a\n", {}, ("a",)),
        ("./000.png,a\n", {}, ("a",)),
        ("\ufefffile_name,text\r\n000.png,a\r\n", {}, ("a",)),
        ("file_name,text\r000.png,a\r001.png,b\r", {}, ("a",)),
        ('file_name,text\r000.png,"a\rb"\r', {}, ("a b",)),
        ("file_name,text\r\n000.png,ä\r\n".encode("utf-16"), {}, ("ä",)),
        (codecs.BOM_UTF16_BE + "file_name,text\n000.png,a\n".encode("utf-16-be"), {}, ("a",)),
        ("file_name,text\n000.png," + "long " * 40_000, {}, ("long " * 39_999 + "long",)),
    ],
)
def test_columns_are_found_by_name_or_by_what_they_hold(table, text, options, expected):
    assert opened(table(text), **options).captions(0) == expected


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("file_name,text,title\n000.png,a,b\n", {}, "caption_key to one of 'text', 'title'"),
        ("file_name,a,b\n000.png,x,y\n", {}, "caption_key to one of 'a', 'b'"),
        ("file_name,text\n000.png,a\n", {"caption_key": "alt"}, "no column 'alt'.*could be 'text'"),
        ("who,what\nyou,a\n", {}, "no column of image files; it has 'who', 'what'"),
        ("file_name,size\n000.png,3\n", {}, "no column that may hold captions"),
        ('file_name,text\n000.png,"a\n001.png,b\n', {}, "quotation mark may be missing"),
        ("file_name,text\n000.png,\xe4\n".encode("latin-1"), {}, "line 2 is not UTF-8 from .* 9 "),
        ("file_name,text\n000.png,a".encode("utf-16") + b"b", {}, "is not UTF-16"),
        ('file_name,text\n000.png,"' + "a\n" * (1 << 20), {}, "quotation mark may be missing"),
        (
            b"file_name,text\n000.png," + b"a" * (2 << 20),
            {},
            "line 2 has more than 1,048,576 bytes",
        ),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_what_would_be_right(
    table, text, options, says
):
    with pytest.raises(DataError, match=f"(?s)train/metadata.csv.*{says}"):
        opened(table(text), **options)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("https://x.test/000.png", SkipReason.ADDRESS),
        ("s3://bucket/000.png", SkipReason.ADDRESS),
        ("/etc/passwd", SkipReason.OUTSIDE_PATH),
        ("../other/000.png", SkipReason.OUTSIDE_PATH),
        ("a/../../000.png", SkipReason.OUTSIDE_PATH),
        ("C:\\000.png", SkipReason.OUTSIDE_PATH),
        ("999.png", SkipReason.CAPTION_WITHOUT_IMAGE),
        ("", SkipReason.NO_IMAGE),
    ],
)
def test_a_path_that_is_no_image_of_the_channel_is_counted_by_its_reason(table, path, reason):
    dataset = opened(table(f"file_name,text\n000.png,a\n{path},b\n"))
    assert dataset.skips.counts[reason] == 1
    assert contents(dataset) == [(0, ("a",))]
    assert dataset.skips.counts[SkipReason.UNLISTED] == 11
    assert dataset.skips.num_bad == 1  # images that a table leaves out are no mistake


def test_rows_that_cannot_be_read_are_counted_and_the_others_used(table):
    lines = [
        '{"file_name": "000.png", "text": "a"}',
        "{not JSON",
        "[1]",
        '{"file_name": "001.png", "text": "' + "x" * (1 << 20) + '"}',
        '{"file_name": "002.png", "text": ["b", "c"]}',
        '{"file_name": "003.png", "text": 4}',
        '{"file_name": "004.png"}',
    ]
    dataset = opened(table("\n".join(lines), "metadata.jsonl"))
    assert contents(dataset) == [(0, ("a",)), (2, ("b", "c"))]
    counts = dataset.skips.counts
    assert counts[SkipReason.BAD_ROW] == 2
    assert counts[SkipReason.GIANT_ROW] == 1
    assert counts[SkipReason.EMPTY_CAPTION] == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_lines_end_and_are_encoded_as_any_program_writes_them(table, encoding, end):
    rows = [{"file_name": f"00{n}.png", "text": f"größer {n}"} for n in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    dataset = opened(table(text.encode(encoding), "metadata.jsonl"))
    assert contents(dataset) == [(n, (f"größer {n}",)) for n in range(3)]


def test_a_wrong_byte_in_json_lines_costs_its_row_alone(table):
    rows = [b'{"file_name": "00%d.png", "text": "a"}' % n for n in range(2)]
    dataset = opened(table(rows[0] + b"\n" + rows[1][:-2] + b'\xe4"}\n', "metadata.jsonl"))
    assert contents(dataset) == [(0, ("a",))]
    assert dataset.skips.counts[SkipReason.BAD_ROW] == 1


def test_a_row_with_too_many_cells_is_counted_by_its_line(table, caplog):
    dataset = opened(table("file_name,text\n000.png,a\n001.png,b,c\n002.png,d\n"))
    assert contents(dataset) == [(0, ("a",)), (2, ("d",))]
    assert "metadata.csv:3: 3 columns, where the first row has 2" in caplog.text


def test_a_list_in_sagemakers_form_is_read(table):
    text = "".join(f"{n}\tpicture {n}\t{n:03}.png\n" for n in range(12))
    dataset = opened(table(text, "train.lst"))
    assert [dataset.captions(n) for n in range(12)] == [(f"picture {n}",) for n in range(12)]


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ({"metadata.jsonl": "{}"}, "metadata.csv, metadata.jsonl"),
        ({"a.tar": ""}, "tar shards or other files, this one has a.tar, 000.png"),
    ],
)
def test_two_layouts_at_once_are_refused_by_name(table, beside, says):
    folder = table("file_name,text\n000.png,a\n")
    for name, text in beside.items():
        (folder / name).write_text(text)
    with pytest.raises(DataError, match=says):
        opened(folder)


def test_two_lists_are_refused_by_name(table):
    (table("000.png,a\n", "train.csv") / "val.csv").write_text("001.png,b\n")
    with pytest.raises(DataError, match=r"one table of captions, this one has train.csv, val.csv"):
        opened(table("000.png,a\n", "train.csv"))


@pytest.mark.parametrize("name", ["notes.csv", "metadata.csv"])
def test_text_files_count_before_a_table_and_metadata_that_is_not_read_is_told(
    tmp_path, caplog, name
):
    layouts.text_files(tmp_path, PAIRS)
    (tmp_path / name).write_text("000.png,a\n")
    assert opened(tmp_path).layout == "image-text folder"
    assert ("metadata.csv is not read" in caplog.text) == (name == "metadata.csv")


def test_a_coco_annotation_without_its_image_is_counted(tmp_path):
    layouts.coco(tmp_path, PAIRS)
    file = tmp_path / "annotations" / "captions_train2017.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "gone.png"
    content["annotations"] += [{"image_id": 99, "caption": "nobody's"}, "no object"]
    file.write_text(json.dumps(content))
    (tmp_path / "annotations" / "instances_train2017.json").write_text('{"images": []}')
    dataset = opened(tmp_path)
    assert len(dataset) == 11
    assert dataset.skips.counts[SkipReason.CAPTION_WITHOUT_IMAGE] == 2
    assert dataset.skips.counts[SkipReason.BAD_ROW] == 1
    assert dataset.skips.counts[SkipReason.UNLISTED] == 1


def test_two_files_of_one_name_are_not_guessed_between(tmp_path, caplog):
    layouts.coco(tmp_path, PAIRS)
    put(tmp_path / "val2017", "000", encode_image(np.zeros((SIZE, SIZE, 3), np.uint8), "png"))
    dataset = opened(tmp_path)
    assert len(dataset) == 11
    assert "2 files of the channel are called 000.png" in caplog.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file_name,text,text\n000.png,a,b\n", "2 columns called 'text'"),
        ("file_name,file_name,text\n000.png,1,b\n", "2 columns called 'file_name'"),
    ],
)
def test_two_columns_of_one_name_are_refused(table, text, says):
    with pytest.raises(DataError, match=f"train/metadata.csv has {says}"):
        opened(table(text))


@pytest.mark.parametrize(
    "text",
    [
        "\n \nfile_name,text\n000.png,a\n",
        "file_name,legend\n001.png,\n000.png,a\n",
        "file_name,legend\n001.png,42\n000.png,a\n",
        "picture,legend\ngone.png,b\n000.png,a\n",
    ],
)
def test_columns_are_found_though_the_first_row_does_not_show_them(table, text):
    assert ("a",) in [captions for _, captions in contents(opened(table(text)))]


def test_a_path_finds_its_file_in_whatever_unicode_form(tmp_path):
    put(tmp_path, "caf\u00e9", PNG)
    (tmp_path / "metadata.csv").write_text("file_name,text\ncafe\u0301.png,a\n")
    assert contents(opened(tmp_path)) == [(7, ("a",))]


def test_coco_images_of_one_number_are_counted_and_odd_values_skipped(tmp_path):
    layouts.coco(tmp_path, PAIRS)
    file = tmp_path / "annotations" / "captions_train2017.json"
    content = json.loads(file.read_text())
    content["images"] += [{"id": 3, "file_name": "004.png"}, {"id": [1]}, {"file_name": None}]
    content["annotations"] += [{"image_id": 1, "caption": odd} for odd in (5, None, {}, [[]])]
    file.write_text(json.dumps(content))
    dataset = opened(tmp_path)
    assert contents(dataset) == [(n, captions) for n, (_, _, captions) in enumerate(PAIRS)]
    assert dataset.skips.counts[SkipReason.BAD_ROW] == 3
    assert dataset.skips.counts[SkipReason.EMPTY_CAPTION] == 4


def test_a_json_file_of_too_many_objects_is_not_parsed(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(coco_module, "MAX_OBJECTS", 20)
    layouts.coco(tmp_path, PAIRS)
    with pytest.raises(DataError, match="no image-caption pair"):
        opened(tmp_path)
    assert "captions_train2017.json is not read: it has more than" in caplog.text
