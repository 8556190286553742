"""Channels that come through a FIFO, whole and broken."""

import io
import json
import os
import random
import tarfile
import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import training.data.pipe.channel as pipe_module
from dalle.errors import DataError, DiskFullError
from dalle.platform.environment import Channel
from dalle.preprocess.images import encode_image
from infra.local.pipes import MAGIC, Pipe, augmented, objects, record
from tests.training.pairs import SIZE, channel_of, members_of, picture, tar_of
from training.data.batching.batches import Batches
from training.data.batching.preload import preload_if_small
from training.data.pipe.channel import open_pipe
from training.data.pipe.recordio import read_records
from training.data.pipe.stream import Stream
from training.data.skips import SkipReason
from training.distributed.process_group import SINGLE_PROCESS
from training.stopping import NEVER, Stopped


@contextmanager
def streamed(folder, content):
    """A channel whose FIFO brings this, again for every epoch."""
    folder.mkdir(exist_ok=True)
    with Pipe(folder / "train", content):
        yield Channel("train", folder / "train", "Pipe")


def opened(folder, content, *, max_bad_share=0.05, caption_key=None, stop=NEVER):
    with streamed(folder, content) as channel:
        return open_pipe(
            channel,
            image_size=SIZE,
            max_bad_share=max_bad_share,
            caption_key=caption_key,
            ranks=SINGLE_PROCESS,
            stop=stop,
        )


def tars(folder, sizes=(4, 5, 3)):
    first = 0
    for number, size in enumerate(sizes):
        tar_of(folder / f"{number}.tar", members_of(range(first, first + size)))
        first += size
    return folder


def pairs_of(dataset):
    """The picture's number -> its captions, of every pair."""
    return {
        int(dataset.image(index)[0, 0, 0]): dataset.captions(index) for index in range(len(dataset))
    }


def samples(numbers):
    """Records of an image and a caption each."""
    for number in numbers:
        yield record(encode_image(picture(number), "png"))
        yield record(b"picture %d" % number)


EXPECTED = {number: (f"picture {number}",) for number in range(12)}


def test_shards_that_follow_one_another_are_read_like_a_channel_of_shards(tmp_path):
    dataset = opened(tmp_path / "d", partial(objects, tars(tmp_path / "t")))
    assert pairs_of(dataset) == EXPECTED
    assert dataset.skips.counts == {}
    assert {dataset.name(index) for index in range(12)} == {f"{n:03}.png" for n in range(12)}
    assert dataset.layout == "stream"


def test_an_augmented_manifest_brings_images_and_then_their_captions(tmp_path):
    channel_of(tmp_path, 12)
    manifest = tmp_path / "all.manifest"
    values = [
        {"image-ref": f"{n:03}.png", "caption": f"picture {n}", "class": n, "class-metadata": {}}
        for n in range(12)
    ]
    manifest.write_text("\n".join(map(json.dumps, values)))
    attributes = ["image-ref", "caption", "class", "class-metadata"]
    dataset = opened(tmp_path / "d", lambda: augmented(manifest, attributes))
    assert pairs_of(dataset) == EXPECTED
    assert dataset.skips.counts == {}


@pytest.mark.parametrize(
    ("attribute", "key", "expected"),
    [
        (b"a star\nthe star", None, ("a star", "the star")),
        (b'"a star"', None, ("a star",)),
        (b'["a star", "the star"]', None, ("a star", "the star")),
        (b'{"caption": "a star"}', None, ("a star",)),
        (b'{"text": ["a star"]}', "text", ("a star",)),
        (b'[one] a star that is "no JSON"', None, ('[one] a star that is "no JSON"',)),
    ],
)
def test_a_caption_is_text_or_json(tmp_path, attribute, key, expected):
    content = [*samples(range(3)), record(encode_image(picture(9), "png")), record(attribute)]
    dataset = opened(tmp_path, lambda: content, caption_key=key)
    assert pairs_of(dataset)[9] == expected


@pytest.mark.parametrize("kind", ["shards", "records"])
def test_a_stream_in_another_order_is_the_same_data_set(tmp_path, kind):
    """As ShuffleConfig makes it: a job started anew goes on with the batches it would have had."""

    def content(seed):
        numbers = list(range(12))
        random.Random(seed).shuffle(numbers)
        if kind == "records":
            return list(samples(numbers))
        folder = tmp_path / f"t{seed}"
        for at, number in enumerate(numbers):
            tar_of(folder / f"{at:02}.tar", members_of([number]))
        return list(objects(folder))

    one, other = (opened(tmp_path / "d", partial(content, seed)) for seed in (1, 2))
    assert one.fingerprint == other.fingerprint
    for step in range(4):
        batches = [Batches(each, batch_size=4, seed=7, num_workers=0) for each in (one, other)]
        first, second = (each.batch(step) for each in batches)
        assert first.captions == second.captions
        assert torch.equal(first.images, second.images)


def test_a_fingerprint_tells_other_images_and_captions(tmp_path):
    def fingerprint(image, caption):
        content = [*samples(range(3)), record(encode_image(picture(image), "png")), record(caption)]
        return opened(tmp_path, lambda: content).fingerprint

    assert len({fingerprint(8, b"a"), fingerprint(9, b"a"), fingerprint(8, b"b")}) == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_spool_is_gone_from_the_disk_and_loader_processes_read_it_still(tmp_path, monkeypatch):
    (spool := tmp_path / "spool").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(spool))
        dataset = opened(tmp_path / "d", lambda: samples(range(12)))
    assert list(spool.iterdir()) == []
    with Batches(dataset, batch_size=4, seed=0, num_workers=1) as batches:
        for step in range(3):
            batch = batches.batch(step)
            shown = (batch.images[:, 0, 0, 0] * 255).round().int().tolist()
            assert [f"picture {number}" for number in shown] == batch.captions


def whole_tar(folder, numbers=range(20)):
    return tar_of(folder / "whole.tar", members_of(numbers)).read_bytes()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda tar: b"", "no image-caption pair in .*train_0"),
        (lambda tar: bytes(10_240), "no image-caption pair in .*train_0"),
        (
            lambda tar: b"\x1f\x8b" + tar,
            "no tar member begins at byte 0, .*CompressionType to Gzip",
        ),
        (
            lambda tar: encode_image(picture(1), "png") + tar,
            r"train: train_0: no tar member begins at byte 0, but b'\\x89PNG.*RecordWrapperType",
        ),
        (lambda tar: tar[:3000], "train_0 ended at byte 3,000, in the middle of a shard"),
        (
            lambda tar: tar[:1300],
            r"train_0 ended at byte 1,300, in the middle of a shard .*header at byte 1,024",
        ),
        (
            lambda tar: b"".join(samples(range(3))) + b"more than that",
            "train_0: no RecordIO record begins at byte .*: found b'more', not ",
        ),
        (
            lambda tar: b"".join(samples(range(3)))[:-5],
            "train_0 ended at byte .*, in the middle of a record: the channel is not complete",
        ),
        (
            lambda tar: b"".join([*samples(range(3)), record(encode_image(picture(4), "png"))]),
            "train_0 ended at byte .*, in the middle of a sample of 2 attributes",
        ),
        (
            lambda tar: b"".join(record(encode_image(picture(n), "png")) for n in range(3)),
            r"of the first 3 these are images: 0, 1, 2 .*AttributeNames",
        ),
        (
            lambda tar: b"".join([record(b"caption"), *samples(range(3))]),
            r"of the first 7 these are images: 1, 3, 5 .*AttributeNames",
        ),
        (lambda tar: record(b"only") * 3, "of the first 3 these are images: none"),
        (
            lambda tar: MAGIC + (3 << 29).to_bytes(4, "little") + tar,
            "a RecordIO record is out of order at byte 0",
        ),
    ],
)
def test_a_stream_that_is_not_whole_or_no_such_one_is_refused_with_the_byte(tmp_path, make, says):
    content = make(whole_tar(tmp_path))
    with pytest.raises(DataError, match=says):
        opened(tmp_path / "d", lambda: [content])


@pytest.mark.parametrize("shift", [0, 100])
def test_a_damaged_place_among_shards_costs_what_it_damaged_and_no_more(tmp_path, caplog, shift):
    """shift: the rest comes at no multiple of 512 bytes, as behind a shard that was cut."""
    first = whole_tar(tmp_path, range(20))
    place = first.index(b"010.png")
    damaged = first[:place] + b"\xff" * (512 + shift) + first[place + 512 :]
    content = damaged + whole_tar(tmp_path, range(20, 40))
    dataset = opened(tmp_path / "d", lambda: [content], max_bad_share=0.1)
    assert sorted(pairs_of(dataset)) == [number for number in range(40) if number != 10]
    assert dataset.skips.counts[SkipReason.DAMAGED_SHARD] == 1
    assert f"damaged at byte {place:,}: no member begins there" in caplog.text
    with pytest.raises(DataError, match="max_bad_share 0.01 allows"):
        opened(tmp_path / "d", lambda: [content], max_bad_share=0.01)


def test_a_shard_without_its_end_mark_is_counted_once(tmp_path):
    content = whole_tar(tmp_path)
    content = content[: len(content.rstrip(b"\0")) // 512 * 512 + 512]
    dataset = opened(tmp_path / "d", lambda: [content])
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.DAMAGED_SHARD: 1}


def test_a_sample_that_cannot_be_used_is_skipped_counted_and_named(tmp_path):
    def content():
        yield from samples(range(20))
        for image, caption in (
            (b"", b"no image"),
            (encode_image(picture(50), "png"), b"caf\xe9"),
            (encode_image(picture(51), "png"), b""),
            (encode_image(picture(52), "png"), b"7"),
            (b"<html>", b"no image either"),
        ):
            yield from (record(image), record(caption))
        yield from samples([60])

    dataset = opened(tmp_path, content, max_bad_share=0.5)
    assert dataset.skips.counts == {
        SkipReason.EMPTY_IMAGE: 1,
        SkipReason.NOT_UTF8: 1,
        SkipReason.EMPTY_CAPTION: 1,
        SkipReason.IMAGE_WITHOUT_CAPTION: 1,
    }
    assert dataset.skips.examples[SkipReason.EMPTY_IMAGE][0].startswith("sample 21 at byte ")
    decoded = preload_if_small(dataset)
    assert sorted(pairs_of(decoded)) == [*range(20), 60]
    (name,) = decoded.skips.examples[SkipReason.NOT_AN_IMAGE]
    assert name.startswith("sample 25 at byte ")


def test_a_magic_number_within_an_image_does_not_part_it(tmp_path):
    data = [b"", b"abc", MAGIC, b"1234" + MAGIC * 2 + b"5", b"x" + MAGIC]
    (tmp_path / "f").write_bytes(b"".join(map(record, data)))
    with Stream(tmp_path / "f", "train", NEVER) as stream:
        assert [each.data for each in read_records(stream)] == data


def test_a_disk_that_would_be_left_too_full_is_refused_before_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(pipe_module, "SPARED_BYTES", 1 << 60)
    monkeypatch.setattr(pipe_module, "LOOK_BYTES", 100)
    with pytest.raises(DiskFullError, match="train: 0.0 GB of its stream are in .*larger volume"):
        opened(tmp_path, lambda: samples(range(12)))


def test_a_fifo_that_does_not_come_and_one_that_stays_silent_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no .*train_0 after 0 s"):
        Stream(tmp_path / "train_0", "train", NEVER, open_seconds=0)
    os.mkfifo(tmp_path / "train_0")
    with (
        Stream(tmp_path / "train_0", "train", NEVER, silence_seconds=0) as stream,
        pytest.raises(DataError, match="train: train_0: nothing came for 0 s, at byte 0"),
    ):
        stream.read(1)


def test_a_stop_ends_the_waiting_for_a_fifo_and_for_its_bytes(tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        Stream(tmp_path / "train_0", "train", stop)
    os.mkfifo(tmp_path / "train_0")
    with Stream(tmp_path / "train_0", "train", stop) as stream, pytest.raises(Stopped):
        stream.read(1)


def test_a_stream_is_read_like_a_file(tmp_path):
    data = random.Random(0).randbytes(3 << 20)
    with Pipe(tmp_path / "train", lambda: [data]), Stream(tmp_path / "train_0", "t", NEVER) as it:
        assert it.read(10) == data[:10]
        assert it.seek(4) == 4
        assert it.read(2_000_000) == data[4:2_000_004]
        assert it.seek(2_000_004 - 1024) == 2_000_004 - 1024
        with pytest.raises(ValueError, match="has passed"):
            it.seek(100)
        assert not it.is_at_end
        assert it.read() == data[2_000_004 - 1024 :]
        assert it.is_at_end
        assert it.read(1) == b""


def test_each_epoch_of_a_channel_has_its_fifo(tmp_path):
    """What the harness brings is what the platform would, as far as anybody asks for it."""
    with streamed(tmp_path, lambda: samples([3])) as channel:
        for epoch in range(3):
            with Stream(channel.pipe(epoch), "train", NEVER) as stream:
                assert [each.data for each in read_records(stream)][1] == b"picture 3"


def test_long_names_and_pax_headers_are_read(tmp_path):
    name = "folder/" * 30 + "ü" * 40
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for suffix, data in ((".png", encode_image(picture(7), "png")), (".txt", b"seven")):
            info = tarfile.TarInfo(name + suffix)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    dataset = opened(tmp_path, lambda: [file.getvalue()])
    assert pairs_of(dataset) == {7: ("seven",)}
    assert dataset.name(0) == name + ".png"
