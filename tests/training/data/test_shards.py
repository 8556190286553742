"""training.data.sources.shards: pairs within tar files, found once and read from the middle."""

import json
import os
import threading

import pytest
import torch

import training.data.sources.shards as shards_module
from dalle.errors import DataError
from dalle.preprocess.images import encode_image
from tests.training.pairs import SIZE, channel_of, members_of, picture, tar_of
from training.data.batching.batches import Batches
from training.data.skips import SkipReason
from training.data.sources.channel import open_channel
from training.stopping import Stopped

PNG = encode_image(picture(1), "png")


def shards(root, sizes=(4, 5, 3), captions=1):
    """Pictures 0, 1, … in shards of these sizes."""
    first = 0
    for number, size in enumerate(sizes):
        tar_of(root / f"{number:05}.tar", members_of(range(first, first + size), captions))
        first += size
    return root


def test_the_pairs_of_all_shards_are_found_and_each_image_is_its_own(tmp_path):
    dataset = open_channel(shards(tmp_path), image_size=SIZE)
    assert len(dataset) == 12
    assert dataset.name(4) == "00001.tar/004.png"
    assert dataset.layout == "3 tar shards"
    for index in range(12):
        assert dataset.captions(index) == (f"picture {index}",)
        assert (dataset.image(index) == index).all()


def test_shards_of_the_webdataset_library_are_read(tmp_path):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "%04d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(12):
            json_ = {"caption": [f"picture {number}", "of many"], "other": 1}
            writer.write(
                {"__key__": f"some/folder/{number:03}", "png": PNG, "json": json_, "cls": number}
            )
    dataset = open_channel(tmp_path, image_size=SIZE)
    assert [dataset.captions(index)[0] for index in range(12)] == [
        f"picture {number}" for number in range(12)
    ]
    assert dataset.captions(3)[1] == "of many"
    assert dataset.skips.counts == {SkipReason.IGNORED: 12}  # cls


@pytest.mark.parametrize(
    ("caption_key", "expected"), [(None, ("text",)), ("caption", ("json",)), ("alt", ("a b", "c"))]
)
def test_captions_come_from_text_unless_a_key_is_given(tmp_path, caption_key, expected):
    content = json.dumps({"caption": "json", "alt": [" a\nb", "", None, "c"]}).encode()
    tar_of(tmp_path / "a.tar", [("1.JPG", PNG), ("1.txt", b"text"), ("1.json", content)])
    dataset = open_channel(tmp_path, image_size=SIZE, caption_key=caption_key)
    assert dataset.captions(0) == expected


def test_without_a_text_member_json_has_the_caption(tmp_path):
    tar_of(tmp_path / "a.tar", [("1.json", b'{"caption": "json"}'), ("1.webp", PNG)])
    assert open_channel(tmp_path, image_size=SIZE).captions(0) == ("json",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", SkipReason.NOT_JSON),
        (b"[" * 100_000, SkipReason.NOT_JSON),
        (b'{"text": "a"}', SkipReason.NO_CAPTION_KEY),
        (b'["a"]', SkipReason.NO_CAPTION_KEY),
        (b'{"caption": null}', SkipReason.EMPTY_CAPTION),
        (b'{"caption": [" "]}', SkipReason.EMPTY_CAPTION),
        (b'{"caption": "caf\xe9"}', SkipReason.NOT_UTF8),
        (rb'{"caption": "\ud800"}', SkipReason.NOT_UTF8),
    ],
)
def test_json_without_a_caption_is_skipped_counted_and_named(tmp_path, content, reason):
    tar_of(tmp_path / "a.tar", [*members_of(range(20)), ("x.png", PNG), ("x.json", content)])
    dataset = open_channel(tmp_path, image_size=SIZE)
    assert dataset.skips.counts == {reason: 1}
    assert dataset.skips.examples == {reason: ["a.tar/x.json"]}


def test_further_members_of_a_pair_are_counted_and_not_taken_for_images(tmp_path):
    members = [("1.png", PNG), ("1.txt", b"one"), ("1.mask.png", PNG), ("d.x/2.png", PNG)]
    tar_of(tmp_path / "a.tar", [*members, ("d.x/2.txt", b"two")])
    dataset = open_channel(tmp_path, image_size=SIZE)
    assert [dataset.captions(index) for index in range(len(dataset))] == [("one",), ("two",)]
    assert dataset.skips.counts == {SkipReason.FURTHER: 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_batches_of_shards_are_those_of_any_other_data_set(tmp_path):
    """The same step has the same pairs, however it is reached, and several processes may read."""
    dataset = open_channel(shards(tmp_path / "shards", captions=3), image_size=SIZE)
    folder = open_channel(channel_of(tmp_path / "folder", 12, captions=3), image_size=SIZE)
    expected = Batches(folder, batch_size=4, seed=5, num_workers=0)
    with Batches(dataset, batch_size=4, seed=5, num_workers=2) as batches:
        for step in (5, 6, 0, 7):
            batch, same = batches.batch(step), expected.batch(step)
            assert torch.equal(batch.images, same.images)
            assert batch.captions == same.captions


@pytest.mark.parametrize("most_open", [1, 64])
def test_no_more_shards_are_open_than_allowed(tmp_path, monkeypatch, most_open):
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", most_open)
    before = len(os.listdir("/proc/self/fd"))
    dataset = open_channel(shards(tmp_path), image_size=SIZE)
    for index in (0, 11, 5, 0, 6):
        assert (dataset.image(index) == index).all()
    assert len(os.listdir("/proc/self/fd")) - before == min(3, most_open)
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def spoil_cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"003.png") + 700])  # within the image's bytes or header


def spoil_header(path):
    data = bytearray(path.read_bytes())
    place = data.index(b"003.png")
    data[place : place + 512] = b"\xff" * 512
    path.write_bytes(data)


def spoil_end(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data.rstrip(b"\0")) // 512 * 512 + 512])


def spoil_all(path):
    path.write_bytes(b"")


def spoil_joined(path):
    path.write_bytes(path.read_bytes() * 2)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("spoil", "says", "num_used", "num_lost"),
    [
        (spoil_cut, "damaged", 3, 4),
        (spoil_header, "no member begins there", 3, 4),
        (spoil_end, "cut off", 7, 1),
        (spoil_all, "damaged (empty file)", 0, 7),
        (spoil_joined, "were joined", 7, 1),
    ],
)
def test_a_damaged_shard_counts_as_the_pairs_that_it_probably_lost(
    tmp_path, caplog, spoil, says, num_used, num_lost, is_streamed
):
    shards(tmp_path, sizes=(7, 7, 7))
    spoil(tmp_path / "00000.tar")
    dataset = open_channel(tmp_path, image_size=SIZE, max_bad_share=0.5, is_streamed=is_streamed)
    assert len(dataset) == 14 + num_used
    assert dataset.skips.counts[SkipReason.DAMAGED_SHARD] == num_lost
    assert dataset.skips.examples[SkipReason.DAMAGED_SHARD] == ["00000.tar"]
    assert says in caplog.text
    with pytest.raises(DataError, match="max_bad_share 0.01 allows: .* damaged shard"):
        open_channel(tmp_path, image_size=SIZE, max_bad_share=0.01)


def test_a_shard_that_shrinks_later_gives_unreadable_images(tmp_path):
    dataset = open_channel(shards(tmp_path), image_size=SIZE)
    os.truncate(tmp_path / "00001.tar", 1000)
    with pytest.raises(DataError, match="00001.tar/006.png cannot be read .*shorter"):
        dataset.image(6)


def test_a_stop_ends_the_indexing(tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        open_channel(shards(tmp_path), image_size=SIZE, stop=stop)


def test_a_streamed_channel_is_read_shard_by_shard_from_front_to_back(tmp_path, monkeypatch):
    shards(tmp_path, sizes=(20, 0, 12, 8))
    dataset = open_channel(tmp_path, image_size=SIZE, is_streamed=True)
    assert dataset.groups == (20, 12, 8)
    assert open_channel(tmp_path, image_size=SIZE).groups is None
    reads, pread = [], os.pread

    def noting(file, size, place):
        reads.append((file, place))
        return pread(file, size, place)

    monkeypatch.setattr(os, "pread", noting)
    batches = Batches(dataset, batch_size=8, seed=0, num_workers=0)
    numbers = [number for step in range(5) for number in batches.batch(step).indices.tolist()]
    assert sorted(numbers) == list(range(40))
    for file in {file for file, _ in reads}:
        places = [at for each, at in reads if each == file]
        assert sum(later < earlier for earlier, later in zip(places, places[1:], strict=False)) <= 1


def test_a_run_that_read_shards_in_another_order_is_another_run(tmp_path):
    shards(tmp_path)
    identities = [
        Batches(
            open_channel(tmp_path, image_size=SIZE, is_streamed=is_streamed), batch_size=2, seed=0
        ).identity()
        for is_streamed in (False, True)
    ]
    assert identities[0] != identities[1]
