"""Decoding, cropping and encoding of images. Knows nothing of torch, files or HTTP.

    decode_image(bytes) -> PIL RGB
    to_square(PIL RGB, size) -> [H, W, 3]
    encode_image([H, W, 3], format) -> bytes
    contact_sheet(rows of [H, W, 3]) -> [H', W', 3]

The bytes are not trusted: they come from a channel of `train` or a request to `serve`. The size is
therefore checked in the header before any pixel is decoded. `colours` converts to sRGB.

Letters: H height, W width.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin

from dalle.errors import DataError
from dalle.preprocess import png
from dalle.preprocess.colours import to_rgb

Pixels = NDArray[np.uint8]  # [H, W, 3], RGB, 0 to 255
ImageFormat = Literal["png", "jpeg", "webp"]

MAX_PIXELS = 40_000_000  # width x height as decoded; 160 MB as RGBA
MAX_JPEG_PIXELS = 250_000_000  # of a JPEG's file, where it is decoded smaller; telephones take 200

# Only formats with self-contained, widely used decoders; none that starts a program (EPS) or
# follows references. The signatures tell a damaged image from a foreign file.
_SIGNATURES: dict[str, tuple[bytes, ...]] = {
    "PNG": (png.SIGNATURE,),
    "JPEG": (b"\xff\xd8\xff",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
}
_ENCODER_OPTIONS: dict[str, dict[str, int]] = {
    "png": {},
    "jpeg": {"quality": 92, "subsampling": 0},  # full colour resolution: the images are small
    "webp": {"quality": 92},
}


class ImageFault(StrEnum):
    """Why a file or payload cannot be used as an image; logs and reports show the texts."""

    UNREADABLE = "unreadable file"  # set by callers that read files; never raised here
    EMPTY = "empty image file"
    FOREIGN = "not an image"
    GIANT = "image over the pixel limit"
    DAMAGED = "truncated or damaged image"


class ImageError(DataError, code="bad_image"):
    """A file or payload cannot be used as an image, for the reason in `fault`."""

    def __init__(self, message: str, fault: ImageFault) -> None:
        super().__init__(message)
        self.fault = fault


def decode_image(
    data: bytes, *, what: str, min_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode an image to RGB: upright, in sRGB, eight bits per channel, transparency on white.

    data: a whole PNG, JPEG, WebP, GIF or BMP file; of an animation the first frame is decoded.
    what: names the image in errors, such as `train/0017.png` or `prime_image`.
    min_side: least pixels of the shorter side that the caller needs. A larger JPEG is then decoded
        at 1/2, 1/4 or 1/8 of its size, several times faster; other formats at full size.
    max_pixels: of the decoded image. The file of a JPEG that is decoded smaller may have up to
        `MAX_JPEG_PIXELS`.
    Returns a fully loaded image of mode RGB. Raises `ImageError` for no bytes, a foreign file, an
    image of too many pixels (by its header) and a truncated or damaged image.
    """
    if not data:
        raise ImageError(f"{what} has no bytes; give a whole image file", ImageFault.EMPTY)
    with _quiet_pillow():
        try:
            return _decode(data, what, min_side, max_pixels)
        except ImageError as error:
            if error.fault is not ImageFault.DAMAGED:
                raise
            # Pillow refuses a PNG for the size or the checksum of a text that no pixel needs.
            if not data.startswith(png.SIGNATURE):
                raise
            for shorter in png.without_descriptions(data):
                try:
                    return _decode(shorter, what, min_side, max_pixels)
                except ImageError:
                    continue
            raise


def image_format(data: bytes, *, what: str) -> str:
    """Return the format of an image file, as in `jpeg`. Raises ImageError for no image."""
    with _open(data, what) as image:
        return str(image.format).lower()


def count_pixels(data: bytes, *, what: str) -> int:
    """Return the width x height of an image file, by its header. Raises ImageError for no image."""
    if not data:
        raise ImageError(f"{what} has no bytes; give a whole image file", ImageFault.EMPTY)
    with _quiet_pillow(), _open(data, what, is_drafted=True) as image:
        return image.width * image.height


def to_square(image: Image.Image, size: int) -> Pixels:
    """Crop the centre square of an RGB image and resize it, with antialiasing, to `size`.

    Returns a writable uint8 array [size, size, 3]. An image of this size is unchanged.
    """
    if image.mode != "RGB":
        raise ValueError(f"to_square takes an RGB image, got mode {image.mode}")
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize(
            (size, size),
            # Hamming's window covers half as many pixels as the cubic one and is nearly as sharp;
            # for enlarging it is too narrow.
            Image.Resampling.HAMMING if side > size else Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
            reducing_gap=3.0,  # first reduces by a whole factor: several times faster
        )
    return np.array(image, dtype=np.uint8)


def encode_image(pixels: Pixels, format: ImageFormat, *, xmp: str = "") -> bytes:
    """Encode a uint8 array [H, W, 3] as a PNG (exact), JPEG or WebP (quality 92) file.

    xmp: packet of metadata that the file carries; it changes no pixel. Empty: none.
    """
    if format not in _ENCODER_OPTIONS:
        raise ValueError(f"format must be one of {', '.join(_ENCODER_OPTIONS)}, got {format!r}")
    _check_pixels(pixels)
    file = io.BytesIO()
    options: dict[str, Any] = {**_ENCODER_OPTIONS[format]}
    if xmp and format == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    elif xmp:
        options["xmp"] = xmp.encode()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format=format.upper(), **options)
    return file.getvalue()


def contact_sheet(rows: Sequence[Sequence[Pixels]], *, padding: int = 2, scale: int = 1) -> Pixels:
    """Arrange images of one size in rows from the left, on white, `padding` pixels around each.

    scale: side of the square that each pixel becomes, for tiny images. Returns a uint8 array
    [rows * (scale*H + padding) + padding, columns * (scale*W + padding) + padding, 3].
    """
    shapes = {image.shape for row in rows for image in row}
    if len(shapes) != 1:
        raise ValueError(f"contact_sheet takes images of one size, got {sorted(shapes) or 'none'}")
    H, W, _ = shapes.pop()
    height, width = scale * H + padding, scale * W + padding  # of one cell
    columns = max(len(row) for row in rows)
    shape = (len(rows) * height + padding, columns * width + padding, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for top, row in zip(range(padding, shape[0], height), rows, strict=True):
        for left, image in zip(range(padding, shape[1], width), row, strict=False):
            _check_pixels(image)
            enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet[top : top + scale * H, left : left + scale * W] = enlarged
    return sheet


def _decode(data: bytes, what: str, min_side: int | None, max_pixels: int) -> Image.Image:
    image = _open(data, what, is_drafted=min_side is not None)
    size = f"{image.width} x {image.height} = {image.width * image.height:,} pixels"
    try:
        if min_side is not None:
            _draft(image, min_side, data, max_pixels)
        if image.width * image.height > max_pixels:
            raise _giant(what, size, max_pixels)
        image.load()
        if image.format == "PNG" and _ends_empty(image) and png.lacks_pixels(data):
            raise ValueError("its pixels end early")
        return to_rgb(upright(image), data[24] if image.format == "PNG" else 8)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of any kind
        raise _damaged(what, error) from error


def _open(data: bytes, what: str, *, is_drafted: bool = False) -> Image.Image:
    """Open an image by its header, without decoding pixels.

    is_drafted: whether a JPEG may have more pixels than Pillow opens.
    """
    try:
        return Image.open(io.BytesIO(data), formats=tuple(_SIGNATURES))
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        if is_drafted and data.startswith(_SIGNATURES["JPEG"]):
            return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        size = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
        raise _giant(what, size, MAX_PIXELS) from error
    except Exception as error:
        signatures = [sign for signs in _SIGNATURES.values() for sign in signs]
        if data.startswith(tuple(signatures)):
            raise _damaged(what, error) from error
        raise ImageError(
            f"{what} is not an image: it begins with {data[:16]!r}; "
            f"give a {', '.join(_SIGNATURES)} file",
            ImageFault.FOREIGN,
        ) from error


def _draft(image: Image.Image, min_side: int, data: bytes, max_pixels: int) -> None:
    """Have a JPEG decoded at a part of its size, unless that takes too much time or memory."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return
    num_pixels = image.width * image.height
    if num_pixels > max_pixels:
        if num_pixels > MAX_JPEG_PIXELS:
            return
        areas = [across * down for _, across, down, _ in image.layer]
        if _has_several_scans(data) and 2 * num_pixels * sum(areas) > 4 * max_pixels * max(areas):
            return
    image.draft(None, (min_side, min_side))


def _has_several_scans(data: bytes) -> bool:
    """Return whether all coefficients of a JPEG, two bytes each, are in memory while it is decoded.

    So it is for a progressive file, and for one whose first scan has not all of its components.
    """
    at, num_components = 2, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a byte that fills
            at += 1
            continue
        if marker == 0xDA:  # start of scan
            return data[at + 4] < num_components
        if marker in (0xC0, 0xC1, 0xC9):  # a frame in sequence; all others are progressive
            num_components = data[at + 9]
        elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return True


def _ends_empty(image: Image.Image) -> bool:
    """Return whether the last two rows are zeros, as where pixels are missing; seldom so else."""
    rows = image.crop((0, max(0, image.height - 2), image.width, image.height))
    return rows.getbbox(alpha_only=False) is None


def upright(image: Image.Image) -> Image.Image:
    """Rotate the image by its EXIF orientation, unless the EXIF data are unreadable."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:
        return image
    return image


def _giant(what: str, size: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"{what} has {size}; the limit is {max_pixels:,}: make it smaller first", ImageFault.GIANT
    )


def _damaged(what: str, error: Exception) -> ImageError:
    return ImageError(
        f"{what} is truncated or damaged ({error}); copy or export it again", ImageFault.DAMAGED
    )


def _check_pixels(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"an image must be a uint8 array [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings (big images, odd EXIF data); errors are raised all the same.

    Up to Python 3.13 all threads share the warning filters, and two threads may restore them in the
    wrong order. The filter names Pillow alone, so one that stays behind hides nothing else.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield
