"""Colours of decoded images: those that a viewer shows, whatever the file's profile and mode."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from dalle.preprocess.colours import MAX_PROFILE_BYTES
from dalle.preprocess.images import decode_image

RED = (220, 20, 20)
P3_PRIMARIES = {
    b"rXYZ": (0.5151, 0.2412, -0.0011),
    b"gXYZ": (0.2919, 0.6922, 0.0419),
    b"bXYZ": (0.1572, 0.0666, 0.7841),
}
DAMAGED = b"no profile at all" * 20


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def shown(image, format="PNG", **options):
    """The upper left pixel of an image file as training and serving see it."""
    return decode_image(encoded(image, format, **options), what="image").getpixel((0, 0))


def s15(*values):
    return b"".join(struct.pack(">i", round(value * 65_536)) for value in values)


def built_in(space):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def display_p3():
    """sRGB's profile with the primaries that telephones use."""
    profile = bytearray(built_in("sRGB"))
    for number in range(struct.unpack(">I", profile[128:132])[0]):
        at = 132 + 12 * number
        if primary := P3_PRIMARIES.get(bytes(profile[at : at + 4])):
            (offset,) = struct.unpack(">I", profile[at + 4 : at + 8])
            profile[offset + 8 : offset + 20] = s15(*primary)
    return bytes(profile)


def profile(space, connection, tags, kind=b"prtr"):
    """A profile of a colour space and these tags; space, connection, kind: of four bytes."""
    start = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, kind, space, connection
    )
    head = head.ljust(36, b"\0") + b"acsp"
    head = head.ljust(68, b"\0") + s15(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


def linear_grey():
    tags = {b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1.0, 0.8249), b"kTRC": b"curv" + bytes(8)}
    return profile(b"GRAY", b"XYZ ", tags, b"mntr")


def inks_without_colour():
    """A profile of four inks: the three coloured ones come out as one grey, the fourth as black."""
    curve = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += curve * 4 + bytes([128, 128, 128, 0, 128, 128]) * 8 + curve * 3
    return profile(b"CMYK", b"Lab ", {b"A2B0": table})


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_an_image_in_display_p3_has_the_colours_that_viewers_show(format):
    options = {"lossless": True} if format == "WEBP" else {}
    image = Image.new("RGB", (16, 16), RED)
    found = shown(image, format, icc_profile=display_p3(), **options)
    assert max(abs(got - right) for got, right in zip(found, (240, 0, 0), strict=True)) <= 4


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_palettes_and_transparent_images_have_colour_profiles_too(mode):
    image = Image.new("RGB", (2, 1), RED).convert(mode, palette=Image.Palette.ADAPTIVE)
    red, green, blue = shown(image, icc_profile=display_p3())
    assert red >= 238
    assert max(green, blue) <= 4


def test_a_transparent_part_is_white_whatever_the_profile():
    image = Image.new("RGBA", (2, 2), (*RED, 0))
    assert shown(image, icc_profile=display_p3()) == (255, 255, 255)


def test_a_grey_image_is_shown_by_its_grey_profile():
    # Half of the light is 188 of 255 in sRGB.
    assert shown(Image.new("L", (2, 2), 128), icc_profile=linear_grey()) == (188, 188, 188)


def test_inks_are_shown_by_their_profile():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = shown(image, "JPEG", icc_profile=inks_without_colour())
    assert abs(red - 119) <= 3  # L* 50
    assert abs(green - red) <= 3
    assert abs(blue - red) <= 3


@pytest.mark.parametrize(
    "foreign",
    [
        DAMAGED,
        b"x",
        display_p3()[:300],
        built_in("LAB"),
        linear_grey(),
        inks_without_colour(),
        display_p3() + bytes(MAX_PROFILE_BYTES),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_profile_that_does_not_fit_leaves_a_sound_image_as_it_is(foreign, format):
    found = shown(Image.new("RGB", (8, 8), RED), format, icc_profile=foreign)
    assert max(abs(got - right) for got, right in zip(found, RED, strict=True)) <= 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("foreign", [DAMAGED, built_in("sRGB"), profile(b"CMYK", b"Lab ", {})])
def test_grey_images_and_inks_with_a_foreign_profile_are_shown_as_without(mode, foreign):
    image = Image.new("RGB", (8, 8), RED).convert(mode)
    assert shown(image, "JPEG", icc_profile=foreign) == shown(image, "JPEG")


def test_an_image_in_srgb_is_not_touched():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), icc_profile=built_in("sRGB"))
    assert np.array_equal(np.asarray(decode_image(data, what="image")), pixels)


def png(colour_type, depth, row, *, transparent, palette=None):
    """A PNG one pixel high."""
    channels = {0: 1, 2: 3, 3: 1}[colour_type]

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    width = len(row) * 8 // (depth * channels)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0))]
    if palette:
        parts.append(chunk(b"PLTE", palette))
    parts += [chunk(b"tRNS", transparent), chunk(b"IDAT", zlib.compress(b"\0" + row))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "second"),
    [
        # The first pixel is transparent, and the second one has another colour.
        (png(0, 1, b"\x40", transparent=b"\0\0"), 255),
        (png(0, 2, b"\x60", transparent=b"\0\1"), 170),
        (png(0, 4, b"\x4a", transparent=b"\0\4"), 170),
        (png(0, 8, b"\x40\x41", transparent=b"\0\x40"), 0x41),
        (png(0, 16, b"\x40\x40\x40\x41", transparent=b"\x40\x40"), 0x40),
        (png(2, 8, b"\x40\x41\x42\x41\x41\x41", transparent=b"\0\x40\0\x41\0\x42"), 0x41),
        (png(2, 16, b"\x12\x34" * 3 + b"\x56" * 6, transparent=b"\x12\x34" * 3), 0x56),
        (png(3, 8, b"\0\1", transparent=b"\0", palette=b"\x10\x10\x10\x20\x20\x20"), 0x20),
        (png(3, 8, b"\0\1", transparent=b"\0\xff", palette=b"\x10\x10\x10\x20\x20\x20"), 0x20),
    ],
)
def test_the_transparent_colour_of_a_png_is_white_at_every_depth(data, second):
    pixels = np.asarray(decode_image(data, what="image"))[0]
    assert pixels[0].tolist() == [255, 255, 255]
    assert pixels[1].tolist() == [second] * 3


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_half_transparent_black_is_grey(mode):
    black = (0, 127) if mode == "LA" else (0, 0, 0, 127)
    assert shown(Image.new(mode, (2, 2), black)) == (128, 128, 128)
