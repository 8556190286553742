"""dalle.preprocess.square: the square that a model reads of a picture file."""

import io

import numpy as np
import pytest
from clip.clip import _transform
from PIL import Image

from dalle.preprocess import square as square_module
from dalle.preprocess.images import ImageError, ImageFault, decode_image, to_square
from dalle.preprocess.square import Square

SIZES = [(60, 40), (41, 90), (32, 32), (32, 75), (20, 11), (7, 300), (333, 8), (1, 40), (700, 512)]


def picture(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("size", SIZES)
def test_clips_square_is_that_of_its_own_code(size):
    image = picture(*size)
    resize, crop, *_ = _transform(32).transforms
    expected = np.asarray(crop(resize(image)))
    assert (Square(32, "clip").read(file_of(image), "x") == expected).all()


def test_a_whole_jpeg_is_decoded_for_clip_and_as_little_as_needed_for_training():
    data = file_of(picture(640, 480), "JPEG")
    resize, crop, *_ = _transform(32).transforms
    expected = np.asarray(crop(resize(Image.open(io.BytesIO(data)))))
    assert (Square(32, "clip").read(data, "x") == expected).all()
    drafted = to_square(decode_image(data, what="x", min_side=32), 32)
    assert (Square(32).read(data, "x") == drafted).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_squashed_square_is_the_whole_picture(size):
    image = picture(*size)
    resize = _transform((32, 32)).transforms[0]
    expected = np.asarray(resize(image))
    assert (Square(32, "squash").read(file_of(image), "x") == expected).all()


@pytest.mark.parametrize("size", [(60_000, 2), (2, 60_000)])
def test_a_narrow_strip_takes_no_more_memory_than_its_square(size, monkeypatch):
    """Resized as a whole it would have 0.4 thousand million pixels."""
    strip = Square(112, "clip").read(file_of(picture(*size)), "x")
    assert strip.shape == (112, 112, 3)
    monkeypatch.setattr(square_module, "MAX_PIXELS", 1)
    image = picture(640, 480)
    by_box = square_module._cut_out(image, 64)
    monkeypatch.undo()
    difference = np.int16(by_box) - np.int16(square_module._cut_out(image, 64))
    assert abs(difference).max() <= 1


@pytest.mark.parametrize("method", ["train", "clip", "squash"])
def test_what_is_no_picture_is_refused_by_name(method):
    with pytest.raises(ImageError, match="prime_image is not an image") as caught:
        Square(8, method).read(b"none of these", "prime_image")
    assert caught.value.fault is ImageFault.FOREIGN
