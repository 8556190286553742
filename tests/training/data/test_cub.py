"""The birds, from the archives' own layout to folders that `train` reads."""

import pytest

from dalle.errors import DataError, UserError
from dalle.preprocess.images import encode_image
from tests.training.pairs import SIZE, picture
from training.data.__main__ import main
from training.data.skips import SkipReason
from training.data.sources.channel import open_channel
from training.data.tools import cub

BIRDS = {
    "001.Black_footed_Albatross": ["Black_Footed_Albatross_0046_18", "Black_Footed_Albatross_0009"],
    "002.Laysan_Albatross": ["Laysan_Albatross_0001_545"],
    "003.Sooty_Albatross": ["Sooty_Albatross_0048_1130"],
}


@pytest.fixture
def birds(tmp_path):
    """Four birds as the archives have them, the second and the fourth in the test set."""
    root = tmp_path / "CUB_200_2011"
    number = 0
    names, split = [], []
    for folder, stems in BIRDS.items():
        (root / "images" / folder).mkdir(parents=True)
        (root / "text" / folder).mkdir(parents=True)
        for stem in stems:
            number += 1
            image = encode_image(picture(number), "jpeg")
            (root / "images" / folder / f"{stem}.jpg").write_bytes(image)
            lines = [f"this bird has {number} wings, says {who}." for who in range(10)]
            (root / "text" / folder / f"{stem}.txt").write_text("\n".join(lines) + "\n")
            names.append(f"{number} {folder}/{stem}.jpg")
            split.append(f"{number} {number % 2}")
    (root / "images.txt").write_text("\n".join(names) + "\n")
    (root / "train_test_split.txt").write_text("\n".join(split) + "\n")
    (root / "classes.txt").write_text("1 001.Black_footed_Albatross\n")
    return root


def opened(out, channel):
    return open_channel(out / channel, image_size=SIZE)


def test_the_official_split_decides_and_all_ten_captions_are_kept(birds, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["cub", str(birds), "--out", str(out)]) == 0
    assert "2 training and 2 held-out pairs with 40 captions" in capsys.readouterr().out
    train, validation = opened(out, "train"), opened(out, "validation")
    assert [train.name(index) for index in range(2)] == [
        "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg",
        "002.Laysan_Albatross/Laysan_Albatross_0001_545.jpg",
    ]
    assert len(train.captions(0)) == 10
    assert validation.captions(1)[9] == "this bird has 4 wings, says 9."
    assert train.skips.counts == validation.skips.counts == {}


def test_whole_classes_can_be_held_out(birds, tmp_path):
    (tmp_path / "test.txt").write_text("002.Laysan_Albatross\n003.Sooty_Albatross\n")
    converted = cub.convert(birds, tmp_path / "out", held_out=tmp_path / "test.txt")
    assert (converted.num_train, converted.num_validation) == (2, 2)
    assert {path.name for path in (tmp_path / "out/train").iterdir()} == {*list(BIRDS)[:1]}
    (tmp_path / "test.txt").write_text("004.Groove_billed_Ani\n")
    with pytest.raises(UserError, match="names 004.Groove_billed_Ani, which is not in"):
        cub.convert(birds, tmp_path / "other", held_out=tmp_path / "test.txt")


def test_a_list_that_is_a_pickle_is_refused(birds, tmp_path):
    (tmp_path / "filenames.pickle").write_bytes(b"\x80\x03]q\x00.")
    with pytest.raises(UserError, match="is not a text file"):
        cub.convert(birds, tmp_path / "out", held_out=tmp_path / "filenames.pickle")


def test_without_a_split_everything_is_trained_on(birds, tmp_path):
    (birds / "train_test_split.txt").unlink()
    converted = cub.convert(birds, tmp_path / "out")
    assert (converted.num_train, converted.num_validation) == (4, 0)
    assert not (tmp_path / "out/validation").exists()


def test_captions_with_broken_bytes_are_mended_and_counted(birds, tmp_path):
    folder, (stem, _) = next(iter(BIRDS.items()))
    (birds / "text" / folder / f"{stem}.txt").write_bytes(b"a caf\xe9-coloured bird\n\nit flies\n")
    converted = cub.convert(birds, tmp_path / "out")
    assert converted.num_mended == 1
    assert opened(tmp_path / "out", "train").captions(0) == ("a café-coloured bird", "it flies")


def test_missing_halves_are_counted_and_too_many_are_a_failure(birds, tmp_path, capsys):
    folder, (first, second) = next(iter(BIRDS.items()))
    (birds / "text" / folder / f"{first}.txt").unlink()
    (birds / "images" / folder / f"{second}.jpg").unlink()
    converted = cub.convert(birds, tmp_path / "out")
    assert converted.skips.counts == {
        SkipReason.IMAGE_WITHOUT_CAPTION: 1,
        SkipReason.CAPTION_WITHOUT_IMAGE: 1,
    }
    assert main(["cub", str(birds), "--out", str(tmp_path / "again")]) == 1
    assert "2 of 4 pairs cannot be used" in capsys.readouterr().err


def test_the_captions_may_lie_elsewhere(birds, tmp_path):
    (birds / "text").rename(tmp_path / "birds")
    with pytest.raises(DataError, match="no folder of captions at .*text or .*text_c10"):
        cub.convert(birds, tmp_path / "out")
    assert cub.convert(birds, tmp_path / "out", text=tmp_path / "birds").num_captions == 40


def test_another_folder_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    with pytest.raises(DataError, match="has no folder images"):
        cub.convert(tmp_path, tmp_path / "out")
