"""Parquet files, well made and hostile: their pairs are read, or what is wrong is counted."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dalle.errors import DataError
from tests.training.data import layouts
from tests.training.data.layouts import PAIRS, PNG, contents, opened
from training.data.batching.preload import preload_if_small
from training.data.batching.sampler import Sampler
from training.data.skips import SkipReason
from training.data.sources import parquet as parquet_module

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def repeated(value, count):
    """A dictionary column of one value: next to no bytes, however many rows."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array([value]))


def written(folder, name="a.parquet", **columns):
    options = {"dictionary_pagesize_limit": 1 << 30, "compression": "zstd", "store_schema": False}
    pq.write_table(pa.table(columns), folder / name, **options)


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


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    columns = pa.table([[PNG], ["a"], ["b"]], names=["image", "text", "text"])
    pq.write_table(columns, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has several columns called 'text'"):
        opened(tmp_path)
