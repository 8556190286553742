"""training.data.sources.channel: which layout a channel has, and which it must not have."""

import logging

import pytest

from dalle.errors import DataError
from tests.training.pairs import SIZE, channel_of, members_of, tar_of
from training.data.sources.channel import open_channel


def test_the_layout_is_told_by_what_is_there_and_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    channel_of(tmp_path / "folder", 3)
    tar_of(tmp_path / "shards" / "sub" / "a.tar", members_of(range(3)))
    for name, layout in (("folder", "image-text folder"), ("shards", "1 tar shards")):
        dataset = open_channel(tmp_path / name, image_size=SIZE, channel="train")
        assert len(dataset) == 3
        assert dataset.layout == layout
        assert f"train: layout: {layout}" in caplog.text


def test_a_mixture_of_layouts_is_refused_by_name(tmp_path):
    channel_of(tmp_path, 3)
    tar_of(tmp_path / "more" / "a.tar", members_of(range(3)))
    with pytest.raises(
        DataError, match="tar shards or other files, this one has more/a.tar, 000.png; keep one"
    ):
        open_channel(tmp_path, image_size=SIZE)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "b.zip"])
def test_packed_data_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{name} is compressed"):
        open_channel(tmp_path, image_size=SIZE)


def test_a_packed_file_beside_a_folder_is_nobodys_mistake(tmp_path):
    (channel_of(tmp_path, 3) / "originals.zip").write_bytes(b"x")
    dataset = open_channel(tmp_path, image_size=SIZE)
    assert dataset.skips.num_bad == 0


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_a_channel_without_anything_is_refused_with_what_it_must_look_like(tmp_path, make):
    root = tmp_path / "train"
    if make == "empty":
        root.mkdir()
    with pytest.raises(DataError, match="train: .*0017.png, 0017.txt.* tar shards"):
        open_channel(root, image_size=SIZE)


def test_a_caption_key_without_shards_is_a_warning(tmp_path, caplog):
    open_channel(channel_of(tmp_path, 3), image_size=SIZE, caption_key="alt")
    assert "caption_key has no effect" in caplog.text


def test_single_files_that_are_fetched_one_by_one_are_a_warning(tmp_path, caplog):
    open_channel(channel_of(tmp_path, 3), image_size=SIZE, is_streamed=True)
    assert "single files are slow to fetch" in caplog.text
