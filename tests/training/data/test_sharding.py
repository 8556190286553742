"""training.data.tools.sharding: a folder as tar shards, for us and for the webdataset library."""

import io
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from dalle.errors import UserError
from dalle.preprocess.images import encode_image
from tests.training.pairs import SIZE, channel_of, picture, put
from training.data.__main__ import main
from training.data.skips import SkipReason
from training.data.sources.channel import open_channel
from training.data.tools.sharding import key_of, write_shards


def pairs(dataset):
    return sorted(
        (dataset.captions(index), dataset.image_bytes(index)) for index in range(len(dataset))
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_pairs_are_in_shards_of_about_the_size_asked_for(tmp_path, capsys):
    folder = channel_of(tmp_path / "folder", 60, captions=3)
    status = main(["shard", str(folder), "--out", str(tmp_path / "s"), "--megabytes", "0.03"])
    assert status == 0
    shards = sorted((tmp_path / "s").iterdir())
    assert [path.name for path in shards] == [f"shard-{n:06}.tar" for n in range(len(shards))]
    assert len(shards) == 4  # 60 pairs of 2 kB
    assert "60 pairs with 180 captions in 4 shards" in capsys.readouterr().out
    dataset = open_channel(tmp_path / "s", image_size=SIZE)
    assert pairs(dataset) == pairs(open_channel(folder, image_size=SIZE))
    assert dataset.skips.counts == {}
    sizes = [path.stat().st_size for path in shards]
    assert max(sizes) - min(sizes) <= 10_240  # tar files are padded to this


def test_the_same_input_gives_the_same_bytes_and_another_seed_another_order(tmp_path):
    folder = channel_of(tmp_path / "folder", 30)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        dataset = open_channel(folder, image_size=SIZE)
        for path in folder.iterdir():
            path.touch()
        write_shards(dataset, tmp_path / name, megabytes=0.02, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    names = [open_channel(tmp_path / n, image_size=SIZE).skips.num_pairs for n in "ac"]
    assert names == [30, 30]


def test_the_order_is_drawn_anew_and_not_that_of_the_names(tmp_path):
    write_shards(
        open_channel(channel_of(tmp_path / "f", 30), image_size=SIZE), tmp_path / "s", megabytes=1
    )
    with tarfile.open(tmp_path / "s" / "shard-000000.tar") as archive:
        members = archive.getmembers()
    images = [member.name for member in members if member.name.endswith("png")]
    assert images != sorted(images)
    assert {(each.mtime, each.uid, each.uname) for each in members} == {(0, 0, "")}


def test_the_webdataset_library_reads_our_shards(tmp_path):
    import webdataset

    folder = channel_of(tmp_path / "f", 12, captions=2)
    put(folder, "a.b/with.dots.0.5%", encode_image(picture(50), "png"), "größer".encode())
    write_shards(open_channel(folder, image_size=SIZE), tmp_path / "s", megabytes=0.02)
    urls = [str(path) for path in sorted((tmp_path / "s").iterdir())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 13
    assert {sample["txt"] for sample in samples} >= {"größer\n".encode()}
    assert all(sample["png"] for sample in samples)


def test_keys_have_no_dot_in_their_last_part_and_stay_apart():
    names = ["a.b/c.d.png", "a.b/c%2Ed.png", "a.b/c_d.png", "a.b/c d.png"]
    keys = [key_of(name) for name in names]
    assert len(set(keys)) == 4
    assert not any("." in key.split("/")[-1] for key in keys)


def test_an_image_that_vanishes_is_left_out_and_counted(tmp_path):
    folder = channel_of(tmp_path / "f", 30)
    dataset = open_channel(folder, image_size=SIZE)
    (folder / "003.png").unlink()
    assert write_shards(dataset, tmp_path / "s", megabytes=1).num_pairs == 29
    assert dataset.skips.counts == {SkipReason.UNREADABLE: 1}
    assert len(open_channel(tmp_path / "s", image_size=SIZE)) == 29


def test_nothing_is_written_among_other_things(tmp_path, capsys):
    folder = channel_of(tmp_path / "f", 3)
    dataset = open_channel(folder, image_size=SIZE)
    with pytest.raises(UserError, match="is not empty"):
        write_shards(dataset, folder, megabytes=1)
    assert main(["shard", str(folder), "--out", str(folder / "shards")]) == 2
    assert "lies within" in capsys.readouterr().err
    assert main(["shard", str(tmp_path / "missing"), "--out", str(tmp_path / "s")]) == 2
    assert len(list(folder.iterdir())) == 6


@pytest.mark.parametrize(("suffix", "format"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_large_images_are_shrunk_and_small_ones_left_as_they_are(tmp_path, suffix, format):
    folder = tmp_path / "f"
    folder.mkdir()
    for name, size in (("large", (160, 80)), ("small", (40, 16))):
        Image.new("RGB", size, (200, 30, 30)).save(folder / f"{name}.{suffix}", format=format)
        (folder / f"{name}.txt").write_text(name)
    assert main(["shard", str(folder), "--out", str(tmp_path / "s"), "--shrink-to", "20"]) == 0
    dataset = open_channel(tmp_path / "s", image_size=20)
    images = {
        dataset.captions(index)[0]: Image.open(io.BytesIO(dataset.image_bytes(index)))
        for index in range(2)
    }
    assert images["large"].size == (40, 20)
    assert images["large"].format == ("JPEG" if format == "JPEG" else "PNG")
    assert np.abs(np.asarray(images["large"]).astype(int) - (200, 30, 30)).max() < 8
    assert images["small"].size == (40, 16)
    assert images["small"].format == format


def test_a_photograph_of_48_megapixels_is_shrunk(tmp_path):
    folder = channel_of(tmp_path / "f", 1)
    Image.new("RGB", (8064, 6048), (200, 30, 30)).save(folder / "large.jpg")
    (folder / "large.txt").write_text("large")
    assert main(["shard", str(folder), "--out", str(tmp_path / "s"), "--shrink-to", "64"]) == 0
    dataset = open_channel(tmp_path / "s", image_size=20)
    sizes = [Image.open(io.BytesIO(dataset.image_bytes(index))).size for index in range(2)]
    assert (85, 64) in sizes


def test_an_image_that_cannot_be_shrunk_is_left_out_and_counted(tmp_path, capsys):
    folder = channel_of(tmp_path / "f", 30)
    (folder / "003.png").write_bytes(b"no")
    assert main(["shard", str(folder), "--out", str(tmp_path / "s"), "--shrink-to", "8"]) == 0
    assert "29 pairs" in capsys.readouterr().out
