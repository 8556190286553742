"""Bad and unusual files are treated alike in every layout: a folder of files, a tar shard, a stream
of shards, and the records of an augmented manifest."""

import io
import struct
import tarfile
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from dalle.platform.environment import Channel
from dalle.preprocess.images import encode_image
from infra.local.pipes import Pipe, objects, record
from tests.training.pairs import SIZE, members_of, picture, tar_of
from training.data.batching.preload import preload_if_small
from training.data.pipe.channel import open_pipe
from training.data.skips import SkipReason
from training.data.sources.channel import open_channel
from training.distributed.process_group import SINGLE_PROCESS
from training.stopping import NEVER


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


def opened(root, layout, members, max_bad_share=0.05):
    """The same as a data set; a stream comes through a FIFO."""
    if layout in ("folder", "shard"):
        return open_channel(
            lay_out(root, layout, members),
            image_size=SIZE,
            channel="train",
            max_bad_share=max_bad_share,
        )
    if layout == "shards in a pipe":
        lay_out(root / "shards", "shard", members)
        content = partial(objects, root / "shards")
    else:
        content = partial(map, record, [data for _, data in [*members_of(range(20)), *members]])
    root.mkdir(exist_ok=True)
    with Pipe(root / "train", content):
        return open_pipe(
            Channel("train", root / "train", "Pipe"),
            image_size=SIZE,
            max_bad_share=max_bad_share,
            caption_key=None,
            ranks=SINGLE_PROCESS,
            stop=NEVER,
        )


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


LAYOUTS = ["folder", "shard", "shards in a pipe", "records in a pipe"]
# A record has no name, so that these cannot be told of it.
OF_NAMES = {
    SkipReason.CAPTION_WITHOUT_IMAGE,
    SkipReason.IMAGE_WITHOUT_CAPTION,
    SkipReason.SECOND_IMAGE,
}


BAD = [
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
]


@pytest.mark.parametrize(
    ("layout", "members", "reason"),
    [
        (layout, *case)
        for case in BAD
        for layout in LAYOUTS
        if layout != "records in a pipe" or case[1] not in OF_NAMES
    ],
)
def test_what_cannot_be_used_is_skipped_counted_and_named(
    tmp_path, caplog, layout, members, reason
):
    dataset = preload_if_small(opened(tmp_path / "c", layout, members))
    found = {each: count for each, count in dataset.skips.counts.items() if each != "ignored file"}
    assert found == {reason: 1}
    name = "sample 21 at byte" if layout == "records in a pipe" else "x."
    assert name in dataset.skips.examples[reason][0]
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert name in warning.getMessage()
    assert len(dataset) == (21 if reason is SkipReason.SECOND_IMAGE else 20)


@pytest.mark.parametrize("layout", LAYOUTS)
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
    dataset = opened(tmp_path / "c", layout, [(name, data), (name[:-3] + "txt", b"a")])
    (index,) = [each for each in range(len(dataset)) if dataset.captions(each) == ("a",)]
    assert np.abs(dataset.image(index).astype(int) - expected).max() <= 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_photograph_is_turned_upright(tmp_path, layout):
    dataset = opened(tmp_path / "c", layout, [("z.jpg", turned()), ("z.txt", b"a")])
    (index,) = [each for each in range(len(dataset)) if dataset.captions(each) == ("a",)]
    pixels = dataset.image(index)
    assert (pixels[0, :, 0] > 200).all()
    assert (pixels[-1, :, 2] > 200).all()


def test_a_shard_that_is_a_link_out_of_the_channel_is_not_followed(tmp_path):
    outside = tar_of(tmp_path / "secret.tar", members_of(range(30, 33)))
    root = lay_out(tmp_path / "shards", "shard", [])
    (root / "b.tar").symlink_to(outside)
    dataset = open_channel(root, image_size=SIZE)
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.OUTSIDE: 1}


@pytest.mark.parametrize("layout", ["shard", "shards in a pipe"])
@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png"])
def test_a_member_whose_name_leaves_its_shard_is_not_used(tmp_path, layout, name):
    members = [(name, encode_image(picture(1), "png")), (name[:-3] + "txt", b"a")]
    dataset = opened(tmp_path / "c", layout, members, max_bad_share=0.1)
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.OUTSIDE_NAME: 2}


@pytest.mark.parametrize("layout", ["shard", "shards in a pipe"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_a_member_that_is_a_link_or_a_device_is_not_used(tmp_path, layout, kind):
    link = tarfile.TarInfo("x.png")
    link.type, link.linkname = kind, "/etc/passwd"
    dataset = opened(tmp_path / "c", layout, [link])
    assert len(dataset) == 20
    assert dataset.skips.counts == {SkipReason.NOT_A_FILE: 1}
