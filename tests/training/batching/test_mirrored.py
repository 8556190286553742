"""training.data.batching.mirrored: pictures are mirrored where their captions stay true."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.batching.batches import Batches
from training.data.batching.mirrored import mirrorable, names_a_side
from training.data.batching.preload import Preloaded
from training.data.batching.sampler import UNMIRRORED_EPOCHS
from training.data.sources.channel import open_channel
from training.rainbow import samples

SIZE = 16


def corner(left, right):
    """A picture with a dark mark in the left or the right upper corner, or in both."""
    pixels = np.full((SIZE, SIZE, 3), 250, dtype=np.uint8)
    pixels[:6, :6] = left
    pixels[:6, -6:] = right
    return pixels


@pytest.fixture
def preloaded(tmp_path):
    def make(*pairs, size=SIZE):
        for number, (pixels, captions) in enumerate(pairs):
            Image.fromarray(pixels).save(tmp_path / f"{number:03}.png")
            (tmp_path / f"{number:03}.txt").write_text(captions)
        return Preloaded(open_channel(tmp_path, image_size=size, channel="train"))

    return make


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("a bird to the LEFT of a tree", True),
        ("backhand index pointing right", True),
        ("right-facing fist", True),
        ("a left-handed glove", True),
        ("leftwards hand", True),
        ("anticlockwise arrows button", True),
        ("a western town", True),
        ("a bright copyright sign", False),
        ("a leftover", False),
        ("a feast", False),
    ],
)
def test_words_that_name_a_side_are_found(caption, names):
    assert names_a_side(caption) is names


def test_a_picture_is_mirrored_unless_its_caption_names_a_side_or_it_becomes_another_captions(
    preloaded,
):
    data = preloaded(
        (corner(10, 250), "four o'clock"),
        (corner(250, 10), "eight o'clock"),
        (corner(90, 120), "a bird"),
        (corner(100, 200), "a fish left of a stone"),
        (corner(180, 180), "two stones"),
        (corner(180, 250), "a cat\na tabby"),
        (corner(250, 180), "a cat"),
    )
    assert mirrorable(data).tolist() == [False, False, True, False, True, True, True]


def test_turned_shapes_are_never_mirrored(preloaded):
    shapes = [each for each in samples() if {"big", "red", "filled"} <= {*each.caption.split()}]
    data = preloaded(*((each.picture(), each.caption) for each in shapes), size=32)
    assert (data.images == data.images.flip(-1)).all(dim=3).all(dim=2).any(), "some are symmetric"
    assert not mirrorable(data).any()


def test_many_pictures_are_not_mirrored(preloaded, monkeypatch):
    data = preloaded((corner(90, 120), "a bird"), (corner(10, 20), "a fish"))
    monkeypatch.setattr("training.data.batching.mirrored.MOST_PAIRS", 1)
    assert not mirrorable(data).any()


def test_a_pair_is_mirrored_by_seed_epoch_and_pair_on_any_number_of_ranks(preloaded):
    shades = range(0, 160, 5)
    data = preloaded(*((corner(shade, shade + 40), f"shade {shade}") for shade in shades))
    allowed = torch.ones(len(data), dtype=torch.bool)
    allowed[0] = False

    def seen(epoch, rank=0, world_size=1):
        batches = Batches(
            data, batch_size=32, seed=3, rank=rank, world_size=world_size, mirrorable=allowed
        )
        batch = batches.batch(epoch)
        for image, index, mirrored in zip(batch.images, batch.indices, batch.mirrored, strict=True):
            own = data.images[index] / 255
            assert torch.equal(image, own.flip(-1) if mirrored else own)
        return dict(zip(batch.indices.tolist(), batch.mirrored.tolist(), strict=True))

    assert not any(seen(UNMIRRORED_EPOCHS - 1).values()), "nothing has been repeated much"
    first, second = seen(UNMIRRORED_EPOCHS), seen(UNMIRRORED_EPOCHS + 1)
    assert not first[0]
    assert not second[0]
    assert 8 < sum(first.values()) < 24
    assert first != second
    assert seen(UNMIRRORED_EPOCHS + 1) == second
    of_two = [seen(UNMIRRORED_EPOCHS + 1, rank, world_size=2) for rank in (0, 1)]
    assert of_two[0] | of_two[1] == second
