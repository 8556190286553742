"""The rainbow data set: all its captions, its split, its folder, and that every colour dithers."""

import json

import numpy as np
import pytest
from PIL import Image

from training import rainbow


@pytest.fixture(scope="module")
def samples():
    return rainbow.samples()


def pick(samples: list[rainbow.Sample], **attributes: str) -> rainbow.Sample:
    """The sample with these attributes, the others at their first."""
    wanted = {name: values[0] for name, values in rainbow.ATTRIBUTES.items()} | attributes
    (found,) = (sample for sample in samples if sample.attributes == wanted)
    return found


def count_white(picture) -> int:
    return int((picture == 255).all(axis=-1).sum())


@pytest.mark.slow
def test_there_are_9216_captions_and_none_twice(samples):
    assert len(samples) == 9216
    assert len({sample.caption for sample in samples}) == 9216
    assert rainbow.samples() == samples, "always in the same order"


def test_a_caption_names_its_attributes_in_their_order(samples):
    sample = pick(
        samples,
        scale="smaller",
        fill="",
        ditherer="halftone",
        colour="violet",
        shape="crescent",
        rotation="rotated twice",
    )
    assert sample.caption == "smaller halftone violet crescent rotated twice"
    for sample in samples[::101]:
        said = " ".join(word for word in sample.attributes.values() if word)
        assert sample.caption == said


def test_30_percent_are_for_training_each_once_and_a_seed_chooses_them():
    mask = rainbow.split(9216, 0)
    assert mask.shape == (9216,)
    assert mask.dtype == bool
    assert mask.sum() == 2765
    assert (rainbow.split(9216, 0) == mask).all()
    assert (rainbow.split(9216, 1) != mask).any()


def test_pictures_are_of_their_colour_on_white(samples):
    for colour, rgb in rainbow.COLOURS.items():
        picture = pick(samples, colour=colour).picture()
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
        drawn = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()} - {(255, 255, 255)}
        if rgb is not None:
            assert drawn == {rgb}
        else:
            assert drawn == set(list(rainbow.COLOURS.values())[:7])


@pytest.mark.parametrize("colour", rainbow.COLOURS)
@pytest.mark.parametrize("shape", ["circle", "square"])
def test_every_colour_is_dithered_alike(samples, colour, shape):
    whites = {
        ditherer: count_white(
            pick(samples, ditherer=ditherer, colour=colour, shape=shape).picture()
        )
        for ditherer in rainbow.DITHERERS
    }
    drawn = 32 * 32 - whites[""]
    for ditherer, share in rainbow.DITHERERS.items():
        assert (whites[ditherer] - whites[""]) / drawn == pytest.approx(share, abs=0.05)
    for ditherer in rainbow.DITHERERS:
        black = pick(samples, ditherer=ditherer, colour="black", shape=shape).picture()
        assert count_white(black) == whites[ditherer]


def test_scale_fill_and_rotation_do_what_they_say(samples):
    sizes = [32 * 32 - count_white(pick(samples, scale=s).picture()) for s in rainbow.SCALES]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    filled, hollow = (pick(samples, fill=fill).picture() for fill in ("filled", ""))
    assert count_white(hollow) > count_white(filled)
    upright = pick(samples, shape="triangle").picture()
    clockwise = pick(samples, shape="triangle", rotation="rotated clockwise").picture()
    assert (np.rot90(upright, -1) == clockwise).all()
    assert (upright != clockwise).any()


def test_shapes_differ(samples):
    pictures = {pick(samples, shape=shape).picture().tobytes() for shape in rainbow.SHAPES}
    assert len(pictures) == len(rainbow.SHAPES) == 8


@pytest.mark.slow
def test_the_folder_holds_a_picture_and_a_caption_for_every_sample(samples, tmp_path):
    counts = rainbow.write_folder(tmp_path, seed=3)
    assert counts == {"train": 2765, "validation": 6451}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attributes.json",
        "train",
        "validation",
    ]
    attributes = json.loads((tmp_path / "attributes.json").read_text())
    assert attributes == {sample.caption: sample.attributes for sample in samples}
    in_training = rainbow.split(9216, 3)
    names = {
        folder: {path.name for path in (tmp_path / folder).iterdir()}
        for folder in ("train", "validation")
    }
    for sample, train in zip(samples, in_training, strict=True):
        stem = sample.caption.replace(" ", "_")
        folder = names["train" if train else "validation"]
        folder.remove(f"{stem}.png")
        folder.remove(f"{stem}.txt")
    assert names == {"train": set(), "validation": set()}
    for sample, train in list(zip(samples, in_training, strict=True))[::777]:
        stem = tmp_path / ("train" if train else "validation") / sample.caption.replace(" ", "_")
        assert stem.with_suffix(".txt").read_text() == f"{sample.caption}\n"
        with Image.open(stem.with_suffix(".png")) as image:
            assert image.mode == "RGB"
            assert (np.asarray(image) == sample.picture()).all()


def test_the_command_says_what_it_wrote(tmp_path, capsys, samples, monkeypatch):
    monkeypatch.setattr(rainbow, "samples", lambda: samples[:20])
    rainbow.main(["--out", str(tmp_path / "new" / "folder")])
    assert "6 training and 14 held-out pairs" in capsys.readouterr().out
    assert len(list((tmp_path / "new" / "folder").rglob("*.png"))) == 20
