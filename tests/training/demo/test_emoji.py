"""The emoji data set: names and tones, what is held out, the pictures, and what is refused.

The pictures need the Debian packages fonts-noto-color-emoji and unicode-data. Without them their
tests are skipped, unless DALLE_REQUIRE_EMOJI=1.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dalle.errors import DataError
from training import emoji
from training.data.sources.channel import open_channel

TEXT = """\
# group: People & Body
1F44B                 ; fully-qualified     # 👋 E0.6 waving hand
1F44B 1F3FB           ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
1F468 1F3FB 200D 1F9B0 ; fully-qualified    # 👨🏻‍🦰 E11.0 man: light skin tone, red hair
1F441 200D 1F5E8      ; unqualified         # 👁‍🗨 E2.0 eye in speech bubble
0023 FE0F 20E3        ; fully-qualified     # #️⃣ E0.6 keycap: #
1FAF1 1F3FB 200D 1FAF2 1F3FC ; fully-qualified # x E14.0 handshake: light skin tone, dark skin tone
"""


@pytest.fixture(scope="module")
def installed():
    """Skip the tests of the pictures on a machine without the two packages."""
    missing = [str(path) for path in (emoji.FONT, emoji.NAMES) if not path.exists()]
    if missing and os.environ.get("DALLE_REQUIRE_EMOJI") == "1":
        pytest.fail(f"DALLE_REQUIRE_EMOJI=1, but {' and '.join(missing)} is missing")
    if missing:
        pytest.skip(f"{' and '.join(missing)} is missing")


@pytest.fixture(scope="module")
def folder(installed, tmp_path_factory):
    """The data set of the first 300 people and hands, and the number of pairs in its folders."""
    out = tmp_path_factory.mktemp("emoji")
    lines = emoji.NAMES.read_text("utf-8").partition("# group: People & Body")[2].splitlines()
    (out / "names.txt").write_text("\n".join(lines[:310]), encoding="utf-8")
    return out, emoji.write_folder(out, size=32, names=out / "names.txt")


def test_a_name_is_parted_into_base_and_skin_tones(tmp_path):
    (tmp_path / "names.txt").write_text(TEXT, encoding="utf-8")
    read = emoji.read_emoji(tmp_path / "names.txt")
    assert [(each.caption, each.base, each.tone) for each in read] == [
        ("waving hand", "waving hand", ""),
        ("waving hand: light skin tone", "waving hand", "light skin tone"),
        ("man: light skin tone, red hair", "man: red hair", "light skin tone"),
        ("keycap: #", "keycap: #", ""),
        (
            "handshake: light skin tone, dark skin tone",
            "handshake",
            "light skin tone, dark skin tone",
        ),
    ]
    assert read[1].text == "\U0001f44b\U0001f3fb"
    assert emoji.file_name(read[3]) == "emoji_u0023_fe0f_20e3"


def test_what_is_held_out_is_composed_of_what_is_not():
    everything = [
        emoji.Emoji("", f"{base}: {tone}", f"{base}", tone)
        for base in range(100)
        for tone in range(1 if base % 2 else emoji.NUM_VARIANTS)
    ]
    held_out = emoji.choose_held_out(everything, seed=3)
    assert (
        held_out
        == emoji.choose_held_out(everything, seed=3)
        != emoji.choose_held_out(everything, seed=4)
    )
    by_base = defaultdict(list)
    for each in everything:
        by_base[each.base].append(each.caption in held_out)
    assert all(sum(each) == 0 for each in by_base.values() if len(each) == 1)
    counts = [sum(each) for each in by_base.values() if len(each) > 1]
    assert set(counts) == {0, 1, 2}
    shown = {each.tone for each in everything if each.caption not in held_out}
    assert {each.tone for each in everything if each.caption in held_out} <= shown


def test_the_folders_hold_every_emoji_once_with_its_attributes(folder):
    out, counts = folder
    assert counts["train"] > 3 * counts["validation"] > 100
    attributes = json.loads((out / "attributes.json").read_text("utf-8"))
    captions = {
        name: {path.read_text("utf-8").strip() for path in (out / name).glob("*.txt")}
        for name in ("train", "validation")
    }
    assert {name: len(each) for name, each in captions.items()} == counts
    assert captions["train"].isdisjoint(captions["validation"])
    assert set(attributes) == captions["train"] | captions["validation"]
    bases = {attributes[caption]["base"] for caption in captions["train"]}
    assert all(attributes[caption]["base"] in bases for caption in captions["validation"])


def test_held_out_pictures_are_in_no_training_image(folder):
    out, counts = folder
    pictures = {
        name: {path.read_bytes() for path in (out / name).glob("*.png")}
        for name in ("train", "validation")
    }
    assert len(pictures["validation"]) == counts["validation"]
    assert pictures["train"].isdisjoint(pictures["validation"])


def test_a_job_can_read_the_folder(folder):
    dataset = open_channel(folder[0] / "validation", image_size=32)
    image = dataset.image(0)
    assert image.shape == (32, 32, 3)
    assert (image[0, 0] == 255).all(), "it is on white"
    assert (image.min(axis=-1) < 128).mean() > 0.1


def test_a_picture_has_the_artwork_s_colours(installed):
    artwork = emoji.Artwork()
    heart = artwork.draw("\N{HEAVY BLACK HEART}\ufe0f", 64)
    red, green, blue = heart[30, 32]
    assert red > 180 > 120 > green, "a red heart"
    assert artwork.draw("ab") is None
    assert artwork.draw("\N{GRINNING FACE}").shape == (128, 128, 3)


def test_a_font_without_colour_and_other_files_are_refused(tmp_path, capsys):
    plain = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "image.png")
    out = str(tmp_path / "out")
    for font, why in (
        (plain, "has no pictures in colour"),
        (tmp_path / "none.ttf", "install the Debian package fonts-noto-color-emoji"),
        (tmp_path / "image.png", "cannot be used"),
    ):
        assert emoji.main(["--out", out, "--font", str(font)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"emoji: {font} ")
        assert why in said
    assert not Path(out).exists()


def test_names_that_are_missing_or_none_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt cannot be read .* package unicode-data"):
        emoji.read_emoji(tmp_path / "none.txt")
    (tmp_path / "list.txt").write_text("a list")
    with pytest.raises(DataError, match=r"list\.txt names no emoji"):
        emoji.read_emoji(tmp_path / "list.txt")
