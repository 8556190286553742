"""Images: refusals before decoding, and the result for every unusual kind of file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dalle.errors import DataError
from dalle.preprocess.images import (
    MAX_PIXELS,
    ImageError,
    ImageFault,
    contact_sheet,
    decode_image,
    encode_image,
    to_square,
)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def pixel(data, x=0, y=0):
    return decode_image(data, what="picture").getpixel((x, y))


def png_claiming(width, height):
    """Return a PNG whose header gives a size and whose data have hardly any pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def jpeg_claiming(width, height):
    """Return a JPEG whose header gives a size and whose data have hardly any pixels."""
    data = encoded(Image.new("L", (8, 8)), "JPEG")
    return data.replace(struct.pack(">HH", 8, 8), struct.pack(">HH", height, width), 1)


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("data", "fault", "says"),
    [
        (b"", ImageFault.EMPTY, "has no bytes"),
        (b"<!DOCTYPE html><p>404", ImageFault.FOREIGN, "<!DOCTYPE html>"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ImageFault.FOREIGN, "not an image"),
        (png_claiming(10_000, 10_000), ImageFault.GIANT, "10000 x 10000 = 100,000,000 pixels"),
        (png_claiming(60_000, 60_000), ImageFault.GIANT, "the limit is 40,000,000"),
        (png_claiming(8, 8), ImageFault.DAMAGED, "truncated or damaged"),
        (encoded(noise(64, 64))[:4000], ImageFault.DAMAGED, "truncated or damaged"),
        (encoded(noise(64, 64), "JPEG")[:1500], ImageFault.DAMAGED, "truncated or damaged"),
        (encoded(noise(64, 64), "WEBP")[:1500], ImageFault.DAMAGED, "truncated or damaged"),
        (encoded(noise(64, 64))[:20], ImageFault.DAMAGED, "truncated or damaged"),
    ],
)
def test_bytes_that_are_no_usable_image_are_refused_with_the_remedy(data, fault, says):
    with pytest.raises(ImageError, match="^train/7.png ") as refusal:
        decode_image(data, what="train/7.png")
    assert refusal.value.fault is fault
    assert says in str(refusal.value)
    assert isinstance(refusal.value, DataError)


@pytest.mark.slow
def test_the_largest_allowed_image_is_decoded_and_one_more_row_is_not():
    width = 20_000
    image = Image.new("1", (width, MAX_PIXELS // width))
    assert decode_image(encoded(image), what="picture").size == image.size
    with pytest.raises(ImageError, match="has 20000 x 2001"):
        decode_image(encoded(Image.new("1", (width, 2001))), what="picture")


def test_cmyk_becomes_rgb():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = pixel(data)
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bit_grey_keeps_its_shades():
    ramp = np.array([[0, 16_384, 32_768, 65_535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(ramp)), what="picture")
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 64, 128, 255]


def test_sixteen_bit_colour_is_accepted():
    row = b"\0" + struct.pack(">3H", 65_535, 32_768, 0)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        data += struct.pack(">I", len(body)) + kind + body + checksum
    assert pixel(data) == (255, 128, 0)


def test_a_transparent_palette_is_put_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=0)
    assert pixel(data) == (255, 255, 255)
    assert pixel(data, 1, 0) == (0, 0, 255)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 127)), (128, 128, 128)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
    ],
)
def test_other_modes_become_opaque_rgb(image, expected):
    assert pixel(encoded(image)) == expected


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert pixel(data) == (255, 0, 0)


def test_a_photograph_is_turned_upright():
    image = Image.new("RGB", (16, 8), "black")
    image.paste((255, 255, 255), (0, 0, 8, 8))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate a quarter clockwise
    decoded = decode_image(encoded(image, "JPEG", exif=exif, quality=95), what="picture")
    assert decoded.size == (8, 16)
    assert decoded.getpixel((4, 2)) > (200, 200, 200)
    assert decoded.getpixel((4, 13)) < (60, 60, 60)


def test_an_unreadable_exif_block_leaves_the_image_unchanged():
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40
    decoded = decode_image(encoded(noise(16, 8), "JPEG", exif=broken), what="picture")
    assert decoded.size == (16, 8)


def test_a_large_jpeg_is_decoded_no_smaller_than_asked():
    data = encoded(noise(800, 400), "JPEG")
    assert decode_image(data, what="picture", min_side=90).size == (200, 100)
    assert decode_image(data, what="picture").size == (800, 400)


@pytest.mark.slow
def test_a_photograph_of_48_megapixels_is_taken_where_it_is_decoded_smaller():
    data = encoded(Image.new("RGB", (8064, 6048), "red"), "JPEG")
    assert decode_image(data, what="picture", min_side=700).size == (1008, 756)
    with pytest.raises(ImageError, match="8064 x 6048"):
        decode_image(data, what="picture")
    with pytest.raises(ImageError, match="8064 x 6048"):  # it cannot be halved
        decode_image(data, what="picture", min_side=4000)


@pytest.mark.slow
def test_a_photograph_of_200_megapixels_is_taken_where_it_is_decoded_smaller():
    data = encoded(Image.new("L", (16_320, 12_240), 99), "JPEG")
    assert decode_image(data, what="picture", min_side=256).size == (2040, 1530)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (jpeg_claiming(65_000, 6_000), "390,000,000 pixels"),
        (png_claiming(60_000, 60_000), "more than"),
        (png_claiming(8_064, 6_048), "48,771,072 pixels"),  # only JPEG is decoded smaller
    ],
)
def test_an_image_that_unfolds_too_far_is_refused_though_it_is_to_be_smaller(data, says):
    with pytest.raises(ImageError, match=says) as refusal:
        decode_image(data, what="picture", min_side=64)
    assert refusal.value.fault is ImageFault.GIANT


@pytest.mark.slow
@pytest.mark.parametrize(("subsampling", "is_taken"), [(0, False), (2, True)])
def test_a_progressive_jpeg_is_refused_when_its_coefficients_take_more_than_the_largest_image(
    subsampling, is_taken
):
    image = Image.new("RGB", (8_000, 5_300))
    data = encoded(image, "JPEG", progressive=True, subsampling=subsampling)
    if is_taken:
        assert decode_image(data, what="picture", min_side=100).size == (1_000, 663)
    else:
        with pytest.raises(ImageError, match="8000 x 5300"):
            decode_image(data, what="picture", min_side=100)


def text_chunk(kind, body, *, is_sound=True):
    check = zlib.crc32(kind + body) + (not is_sound)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check & 0xFFFFFFFF)


PACKED = zlib.compress(b"x" * 3_000_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        text_chunk(b"zTXt", b"workflow\0\0" + PACKED),
        text_chunk(b"iTXt", b"workflow\0\1\0\0\0" + PACKED),
        text_chunk(b"zTXt", b"log\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
        text_chunk(b"tEXt", b"comment\0hello", is_sound=False),
        text_chunk(b"tIME", b"\0" * 7, is_sound=False),
        text_chunk(b"iCCP", b"printer\0\0" + PACKED),
        text_chunk(b"iCCP", b"printer\0\7" + PACKED),
    ],
)
def test_a_png_is_sound_whatever_its_descriptions_are(extra):
    data = encoded(Image.new("RGB", (8, 8), "red"))
    head = 8 + 25  # signature and header
    assert pixel(data[:head] + extra + data[head:]) == (255, 0, 0)
    assert pixel(data[:-12] + extra + data[-12:]) == (255, 0, 0)  # behind the pixels


def test_a_damaged_png_with_descriptions_is_still_damaged():
    data = encoded(noise(64, 64))
    with pytest.raises(ImageError, match="truncated or damaged"):
        decode_image(data[:33] + text_chunk(b"tEXt", b"a\0b") + data[33:4000], what="picture")


def test_an_image_of_the_right_size_is_not_touched():
    image = noise(32, 32)
    assert np.array_equal(to_square(image, 32), np.asarray(image))


def test_the_centre_is_cropped_and_shrinking_averages():
    pixels = np.zeros((64, 192, 3), dtype=np.uint8)
    pixels[:, 64:128:2] = 255  # fine stripes in the middle third, black beside it
    square = to_square(Image.fromarray(pixels), 16)
    assert square.shape == (16, 16, 3)
    assert square.dtype == np.uint8
    assert 120 <= square[4:12, 4:12].mean() <= 135


def test_png_is_exact_and_the_others_are_near():
    pixels = np.asarray(Image.linear_gradient("L").convert("RGB"))
    for format in ("png", "jpeg", "webp"):
        data = encode_image(pixels, format)
        again = np.asarray(decode_image(data, what=format))
        assert Image.open(io.BytesIO(data)).format == format.upper()
        tolerance = 0 if format == "png" else 8
        assert np.abs(again.astype(int) - pixels.astype(int)).max() <= tolerance


def test_only_uint8_rgb_in_known_formats_is_encoded():
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="png, jpeg, webp, got 'gif'"):
        encode_image(pixels, "gif")
    with pytest.raises(ValueError, match=r"got float64 \[4, 4, 3\]"):
        encode_image(pixels.astype(float), "png")
    with pytest.raises(ValueError, match=r"got uint8 \[4, 4\]"):
        encode_image(pixels[..., 0], "png")


def test_a_contact_sheet_has_every_image_in_its_place():
    images = [np.full((2, 3, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    sheet = contact_sheet([images[:2], images[2:]], padding=1, scale=2)
    assert sheet.shape == (2 * (4 + 1) + 1, 2 * (6 + 1) + 1, 3)
    assert (sheet[1:5, 1:7] == 10).all()
    assert (sheet[1:5, 8:14] == 20).all()
    assert (sheet[6:10, 1:7] == 30).all()
    assert (sheet[6:10, 8:14] == 255).all()
    assert (sheet[:, 0] == 255).all()


def test_a_contact_sheet_needs_images_of_one_size():
    with pytest.raises(ValueError, match="one size, got none"):
        contact_sheet([])
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([[np.zeros((2, 2, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)]])


def png_of(rows, size, bits=8, colour_type=2, interlace=0, num_parts=1):
    """A PNG of those raw bytes, which need not be all that its header promises."""

    def part(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", size, size, bits, colour_type, 0, 0, interlace)
    packed = zlib.compress(rows)
    step = -(-len(packed) // num_parts)
    pieces = [packed[at : at + step] for at in range(0, len(packed), step)]
    palette = part(b"PLTE", bytes(range(30))) if colour_type == 3 else b""
    pixels = b"".join(part(b"IDAT", piece) for piece in pieces)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + palette + pixels + part(b"IEND", b"")


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize(
    ("bits", "colour_type", "row_bytes"), [(8, 2, 192), (16, 6, 512), (1, 0, 8), (4, 3, 32)]
)
def test_a_png_whose_pixels_end_early_and_cleanly_is_damaged(
    bits, colour_type, row_bytes, num_parts
):
    """Its compressed pixels are whole, and fewer than the header says; black ones are none less."""
    black = (b"\0" + bytes(row_bytes)) * 64
    options = {"bits": bits, "colour_type": colour_type, "num_parts": num_parts}
    decode_image(png_of(black, 64, **options), what="x")
    for missing in (1, row_bytes, len(black) // 2, len(black) - 1):
        with pytest.raises(ImageError, match="x is truncated or damaged"):
            decode_image(png_of(black[:-missing], 64, **options), what="x")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 33])
def test_an_interlaced_png_is_read_whole_or_refused(size):
    passes = [
        (8, 8, 0, 0),
        (8, 8, 4, 0),
        (4, 8, 0, 4),
        (4, 4, 2, 0),
        (2, 4, 0, 2),
        (2, 2, 1, 0),
        (1, 2, 0, 1),
    ]
    rows = b"".join(
        (b"\0" + bytes(3 * columns)) * len(range(top, size, down))
        for across, down, left, top in passes
        if (columns := len(range(left, size, across)))
    )
    decode_image(png_of(rows, size, interlace=1), what="x")
    with pytest.raises(ImageError, match="truncated or damaged"):
        decode_image(png_of(rows[:-1], size, interlace=1), what="x")
