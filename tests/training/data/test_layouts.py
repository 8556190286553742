"""Every common layout of captioned images is read: the same pairs, and what is wrong is counted."""

import codecs
import io
import json
import logging
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dalle.errors import DataError
from dalle.preprocess.images import encode_image
from tests.training.data import layouts
from tests.training.pairs import SIZE, picture, put
from training.data.batching.preload import preload_if_small
from training.data.batching.sampler import Sampler
from training.data.skips import SkipReason
from training.data.sources import coco as coco_module
from training.data.sources import parquet as parquet_module
from training.data.sources.channel import open_channel
from training.data.tools.sharding import write_shards

PAIRS = [
    (
        f"{number:03}",
        encode_image(picture(number), "png"),
        tuple(f"picture {number}{', again' * version}" for version in range(1 + number % 2)),
    )
    for number in range(12)
]


def opened(folder, **options):
    options = {"image_size": SIZE, "channel": "train", "max_bad_share": 1.0} | options
    return open_channel(folder, **options)


def contents(dataset):
    return [
        (int(dataset.image(index)[0, 0, 0]), dataset.captions(index))
        for index in range(len(dataset))
    ]


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


def test_parquet_with_plain_bytes_and_failed_rows_is_read_as_img2dataset_writes_it(tmp_path):
    rows = {
        "key": ["0", "1", "2"],
        "status": ["success", "failed_to_download", "success"],
        "caption": ["a", "b", "c"],
        "png": [PAIRS[0][1], None, PAIRS[2][1]],
    }
    pq.write_table(pa.table(rows), tmp_path / "00000.parquet")
    dataset = opened(tmp_path)
    assert contents(dataset) == [(0, ("a",)), (2, ("c",))]
    assert dataset.skips.counts[SkipReason.NO_IMAGE] == 1
    assert dataset.name(1) == "00000.parquet/000002.png"


def test_images_that_do_not_fit_into_the_cache_are_read_group_by_group(tmp_path, monkeypatch):
    layouts.parquet(tmp_path, PAIRS, row_group_size=5)
    assert opened(tmp_path).groups is None
    monkeypatch.setattr(parquet_module, "CACHED_BYTES", 1)
    dataset = opened(tmp_path)
    assert dataset.groups == (5, 5, 2)
    assert [number for number, _ in contents(dataset)] == list(range(12))


def test_a_row_group_is_read_twice_an_epoch_at_most_however_little_is_kept(tmp_path, monkeypatch):
    pairs = [(f"{n:03}", PAIRS[n % 12][1], (f"picture {n}",)) for n in range(640)]
    layouts.parquet(tmp_path, pairs, row_group_size=32)
    monkeypatch.setattr(parquet_module, "CACHED_BYTES", 1)
    dataset = opened(tmp_path)
    read, images = Counter(), parquet_module.ParquetReader._images

    def counted(reader, files, group):
        read[group] += 1
        return images(reader, files, group)

    monkeypatch.setattr(parquet_module.ParquetReader, "_images", counted)
    sampler = Sampler(num_pairs=640, batch_size=8, seed=0, groups=dataset.groups)
    for index in sampler.permutation(0).tolist():
        assert int(dataset.image(index)[0, 0, 0]) == index % 12
    assert len(read) == 20
    assert max(read.values()) <= 2


@pytest.mark.parametrize("kind", ["cut off", "no footer", "lying footer"])
def test_a_damaged_parquet_file_is_counted_by_name(tmp_path, kind):
    layouts.parquet(tmp_path, PAIRS[:6])
    whole = (tmp_path / "train-00000-of-00001.parquet").read_bytes()
    lies = whole[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1"
    damaged = {"cut off": whole[: len(whole) // 2], "no footer": b"PAR1" * 3, "lying footer": lies}
    (tmp_path / "z.parquet").write_bytes(damaged[kind])
    dataset = opened(tmp_path)
    assert len(dataset) == 6
    assert dataset.skips.counts[SkipReason.DAMAGED_SHARD] == 1
    assert "z.parquet" in dataset.skips.describe()


def test_a_giant_row_group_is_counted_and_not_read(tmp_path, monkeypatch):
    layouts.parquet(tmp_path, PAIRS, row_group_size=6)
    monkeypatch.setattr(parquet_module, "MAX_GROUP_BYTES", 10)
    with pytest.raises(DataError, match=r"no image-caption pair.*12 row over 1 MiB"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"a": [b"x"], "b": [b"y"], "text": ["c"]}, "several columns of bytes: a, b"),
        ({"image": [b"x"], "text": ["a"], "title": ["b"]}, "one of 'text', 'title'"),
    ],
)
def test_a_choice_in_a_parquet_file_is_refused_with_the_names(tmp_path, columns, says):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"train/a.parquet.*{says}"):
        opened(tmp_path)


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


PNG = PAIRS[7][1]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def repeated(value, count):
    """A dictionary column of one value: next to no bytes, however many rows."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array([value]))


def written(folder, name="a.parquet", **columns):
    options = {"dictionary_pagesize_limit": 1 << 30, "compression": "zstd", "store_schema": False}
    pq.write_table(pa.table(columns), folder / name, **options)


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [PNG], "text": repeated("a", 1)},
        {"image": repeated(PNG, 1), "text": ["a"]},
        {"image": pa.array([PNG], pa.large_binary()), "text": pa.array(["a"], pa.large_string())},
        {"image": pa.array([PNG], pa.binary(len(PNG))), "text": [["a"]]},
        {"my.image": [PNG], "the.text": ["a"]},
        {"image": [{"bytes": PNG, "path": 7}], "text": ["a"]},
        {"image": pa.array([{"bytes": PNG, "path": None}], STRUCT), "text": ["a"]},
    ],
)
def test_images_and_captions_are_read_in_whatever_way_arrow_stores_them(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert contents(opened(tmp_path)) == [(7, ("a",))]


def test_row_groups_without_rows_and_rows_without_values_are_no_end(tmp_path):
    table = pa.table(
        {
            "image": pa.array([None, {"bytes": PNG, "path": "b.png"}], STRUCT),
            "text": [None, "b"],
        }
    )
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table, table.slice(0, 0), table.slice(1)):
            writer.write_table(part)
    dataset = opened(tmp_path)
    assert contents(dataset) == [(7, ("b",)), (7, ("b",))]
    assert dataset.skips.counts == {SkipReason.EMPTY_CAPTION: 1}


def test_a_parquet_text_that_is_not_unicode_is_counted(tmp_path):
    offsets = pa.py_buffer(np.array([0, 2, 4], np.int32).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")])
    written(tmp_path, image=[PNG, PNG], text=texts)
    dataset = opened(tmp_path)
    assert contents(dataset) == [(7, ("ok",))]
    assert dataset.skips.counts == {SkipReason.NOT_UTF8: 1}


def test_a_few_bytes_that_say_they_are_many_rows_are_not_read(tmp_path):
    written(tmp_path, image=repeated(PNG, 1_000_000), text=repeated("a", 1_000_000))
    with pytest.raises(DataError, match=r"no image-caption pair.*1,000,000 row over 1 MiB"):
        opened(tmp_path)


def test_a_giant_dictionary_of_captions_ends_its_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "MAX_TEXT_BYTES", 10_000)
    written(tmp_path, image=[PNG] * 100, text=repeated("x" * 9_000, 100))
    dataset = opened(tmp_path)
    assert len(dataset) == 1
    assert dataset.skips.counts == {SkipReason.GIANT_ROW: 99}


def test_a_giant_dictionary_of_images_is_not_unfolded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "MAX_GROUP_BYTES", 100_000)
    written(tmp_path, image=repeated(PNG + bytes(90_000), 100), text=["a"] * 100)
    dataset = opened(tmp_path)
    with pytest.raises(DataError, match=r"a.parquet/000000 cannot be read .*more than 100,000"):
        dataset.image(0)


@pytest.mark.parametrize("content", [b"", b"PAR1junk", b"PAR1junkPAR1"])
def test_a_damaged_first_parquet_file_does_not_hide_the_others(tmp_path, content):
    layouts.parquet(tmp_path, PAIRS)
    (tmp_path / "a.parquet").write_bytes(content)
    dataset = opened(tmp_path)
    assert len(dataset) == len(PAIRS)
    assert dataset.skips.counts == {SkipReason.DAMAGED_SHARD: 1}


@pytest.mark.parametrize("seed", range(8))
def test_a_parquet_file_with_wrong_bytes_is_counted_or_its_images_are(tmp_path, seed):
    layouts.parquet(tmp_path, PAIRS)
    layouts.parquet(tmp_path / "more", PAIRS * 20)
    file = tmp_path / "more" / "train-00000-of-00001.parquet"
    data, generator = bytearray(file.read_bytes()), np.random.default_rng(seed)
    for place in generator.integers(4, len(data) - 8, 12):
        data[place] ^= 0x55
    file.write_bytes(data)
    dataset = preload_if_small(opened(tmp_path))
    assert len(dataset) >= len(PAIRS)
    assert dataset.skips.num_bad > 0


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


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    columns = pa.table([[PNG], ["a"], ["b"]], names=["image", "text", "text"])
    pq.write_table(columns, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has several columns called 'text'"):
        opened(tmp_path)


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
