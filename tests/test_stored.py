"""training.data.stored: what cannot be trusted, in a folder of files and in a tar shard alike."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from dalle.images import encode_image
from tests.pairs import SIZE, members_of, picture, tar_of
from training.data.channel import open_channel
from training.data.memory import decode_if_small
from training.data.pairs import SkipReason


def lay_out(root, layout, members):
    """Twenty sound pairs, and these (name, bytes) beside them, as a channel of one layout."""
    members = [*members_of(range(20)), *members]
    if layout == "shard":
        tar_of(root / "a.tar", members)
        return root
    for name, data in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def noise(mode, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def zip_bomb():
    """A PNG of a few hundred bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def turned():
    """Red above blue, stored lying on its side with the EXIF mark that says so."""
    upright = np.zeros((64, 64, 3), dtype=np.uint8)
    upright[:32, :, 0], upright[32:, :, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise to see it
    return saved(Image.fromarray(np.rot90(upright)), "JPEG", exif=exif, quality=95)


def grey_16():
    """Sixteen bits a pixel, half of the range."""
    return saved(Image.fromarray(np.full((SIZE, SIZE), 32_896, dtype=np.uint16)), "PNG")


def animation():
    frames = [Image.fromarray(picture(number)) for number in (7, 200)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


LAYOUTS = pytest.mark.parametrize("layout", ["folder", "shard"])


@LAYOUTS
@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (
            [("x.jpg", saved(noise("RGB"), "JPEG")[:-900]), ("x.txt", b"a")],
            SkipReason.DAMAGED_IMAGE,
        ),
        ([("x.png", zip_bomb()), ("x.txt", b"a")], SkipReason.GIANT_IMAGE),
        ([("x.png", b""), ("x.txt", b"a")], SkipReason.EMPTY_IMAGE),
        ([("x.png", bytes(700)), ("x.txt", b"a")], SkipReason.NOT_AN_IMAGE),
        ([("x.webp", b"<html>"), ("x.txt", b"a")], SkipReason.NOT_AN_IMAGE),
        ([("x.png", encode_image(picture(1), "png"))], SkipReason.IMAGE_WITHOUT_CAPTION),
        ([("x.txt", b"a")], SkipReason.CAPTION_WITHOUT_IMAGE),
        ([("x.gif", animation()), ("x.txt", b"a")], SkipReason.CAPTION_WITHOUT_IMAGE),
        ([("x.jpg", turned()), ("x.txt", b"caf\xe9")], SkipReason.NOT_UTF8),
        ([("x.jpg", turned()), ("x.txt", b"\n \n")], SkipReason.EMPTY_CAPTION),
        ([("x.jpg", turned()), ("x.txt", b"")], SkipReason.EMPTY_CAPTION),
        ([("x.jpg", turned()), ("x.txt", b"a" * (1 << 20) + b"b")], SkipReason.GIANT_CAPTION),
        ([("x.jpg", turned()), ("x.png", grey_16()), ("x.txt", b"a")], SkipReason.SECOND_IMAGE),
    ],
)
def test_what_cannot_be_used_is_skipped_counted_and_named(tmp_path, layout, members, reason):
    root = lay_out(tmp_path / "train", layout, members)
    dataset = decode_if_small(open_channel(root, image_size=SIZE))
    found = {each: count for each, count in dataset.skips.counts.items() if each != "ignored file"}
    assert found == {reason: 1}
    assert "x." in dataset.skips.examples[reason][0]
    assert len(dataset) == (21 if reason is SkipReason.SECOND_IMAGE else 20)


@LAYOUTS
@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("cmyk.jpg", saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
        ("grey_16.png", grey_16(), (128, 128, 128)),
        ("palette.png", saved(Image.fromarray(picture(51)).convert("P"), "PNG"), (51, 51, 51)),
        ("glass.png", saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), (255, 255, 255)),
        ("animated.png", animation(), (7, 7, 7)),
    ],
)
def test_every_kind_of_image_comes_as_eight_bit_rgb(tmp_path, layout, name, data, expected):
    root = lay_out(tmp_path, layout, [(name, data), (name[:-3] + "txt", b"a")])
    dataset = open_channel(root, image_size=SIZE)
    (index,) = [each for each in range(len(dataset)) if dataset.name(each).endswith(name)]
    assert np.abs(dataset.image(index).astype(int) - expected).max() <= 3


@LAYOUTS
def test_a_photograph_is_turned_upright(tmp_path, layout):
    root = lay_out(tmp_path, layout, [("z.jpg", turned()), ("z.txt", b"a")])
    dataset = open_channel(root, image_size=SIZE)
    pixels = dataset.image(len(dataset) - 1)
    assert (pixels[0, :, 0] > 200).all()
    assert (pixels[-1, :, 2] > 200).all()


def test_a_link_out_of_the_channel_is_not_followed(tmp_path):
    root = lay_out(tmp_path / "train", "folder", [])
    outside = tar_of(tmp_path / "secret.tar", members_of(range(30, 33)))
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (root / "x.txt").symlink_to(tmp_path / "secret.txt")
    assert open_channel(root, image_size=SIZE).skips.counts == {SkipReason.OUTSIDE: 1}
    shards = lay_out(tmp_path / "shards", "shard", [])
    (shards / "b.tar").symlink_to(outside)
    dataset = open_channel(shards, image_size=SIZE)
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.OUTSIDE: 1}


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png"])
def test_a_member_whose_name_leaves_its_shard_is_not_used(tmp_path, name):
    members = [(name, encode_image(picture(1), "png")), (name[:-3] + "txt", b"a")]
    dataset = open_channel(lay_out(tmp_path, "shard", members), image_size=SIZE, max_bad_share=0.1)
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.OUTSIDE_NAME: 2}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_a_member_that_is_a_link_or_a_device_is_not_used(tmp_path, kind):
    link = tarfile.TarInfo("x.png")
    link.type, link.linkname = kind, "/etc/passwd"
    tar_of(tmp_path / "a.tar", [*members_of(range(20)), link])
    dataset = open_channel(tmp_path, image_size=SIZE)
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.NOT_A_FILE: 1}
