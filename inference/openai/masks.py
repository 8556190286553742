"""What a mask keeps of an image: the number of rows of the image-token grid, from the top.

An edit can keep an image's top rows and generate the rest, since the model samples row by row. A
mask of any other form is refused by name. Letters: H height, W width.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle.errors import UserError
from dalle.preprocess.images import upright

MAX_PIXELS = 1 << 22  # of a mask: 2,048 x 2,048, some ten milliseconds
_ORIENTATION = 0x0112  # EXIF's tag
_ON_ITS_SIDE = range(5, 9)  # of its values: turned by a quarter
_FORMATS = ("PNG", "WEBP")  # with an alpha channel


def kept_rows(image: bytes, mask: bytes | None, grid_size: int) -> int:
    """Return how many rows of the image-token grid are kept, 1 to `grid_size` - 1.

    image, mask: files. mask: of the image's width and height; its alpha channel is 0 where the
    model generates. None: the image's own alpha channel.
    Raises `UserError` that names `mask` for one that keeps anything but whole rows from the top.
    """
    width, height = _size(image)
    keeps = _keeps(image if mask is None else mask, "image" if mask is None else "mask")
    if keeps.shape != (height, width):
        raise _wrong(
            f"mask must have the image's {width} x {height} pixels, got {keeps.shape[1]} x "
            f"{keeps.shape[0]}"
        )
    whole = keeps.all(axis=1)
    num_kept = height if whole.all() else int(np.argmin(whole))
    if keeps[num_kept:].any():
        raise _wrong(
            "mask must keep rows from the top over their whole width and no others: alpha above 0 "
            f"in the first rows, 0 in all below; got {num_kept} such rows, and kept pixels below"
        )
    # Pixels are kept of the centre square, which is scaled to the model's size.
    side = min(width, height)
    top = (height - side) // 2
    in_square = min(max(num_kept - top, 0), side)
    rows = round(in_square * grid_size / side)
    if not 0 < rows < grid_size:
        raise _wrong(
            f"mask keeps {num_kept} of {height} rows of pixels, which is {rows} of {grid_size} "
            f"rows of the model's grid; it must keep 1 to {grid_size - 1} of them, and "
            "/v1/images/generations keeps none"
        )
    if abs(rows * side / grid_size - in_square) > 0.5:
        raise _wrong(
            f"mask keeps {num_kept} of {height} rows of pixels; the model's grid has {grid_size} "
            f"rows, of which it keeps whole ones: {top + round(rows * side / grid_size)} rows of "
            "pixels are the nearest"
        )
    return rows


def _size(image: bytes) -> tuple[int, int]:
    """Return width and height of an image file as it is shown, by its header."""
    with _open(image, "image", None) as opened:
        width, height = opened.size
        return (height, width) if _is_on_its_side(opened) else (width, height)


def _is_on_its_side(opened: Image.Image) -> bool:
    """Return whether an image is shown turned by a quarter; unreadable EXIF data turn nothing."""
    if "exif" not in opened.info:  # Pillow would decode a PNG to look for it behind the pixels
        return False
    try:
        return opened.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
    except MemoryError:
        raise
    except Exception:  # of any kind, as Pillow's decoders raise them
        return False


def _keeps(file: bytes, what: str) -> NDArray[np.bool_]:
    """Return [H, W], True where the alpha channel of a file is above 0."""
    formats = None if what == "image" else _FORMATS
    with _open(file, what, formats) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise _wrong(
                f"the alpha channel of {what} must have at most {MAX_PIXELS:,} pixels, got "
                f"{opened.width} x {opened.height}; send both at the model's size"
            )
        if not opened.has_transparency_data:
            raise _wrong(
                "mask is missing, or without it an image with an alpha channel: this model can "
                "only keep an image's top rows, and generates where alpha is 0"
                if what == "image"
                else "mask must have an alpha channel, which is 0 where the model generates"
            )
        try:
            opened.load()
            alpha = upright(opened).convert("RGBA").getchannel("A")
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise exceptions of any kind
            raise _wrong(f"{what} is a damaged image ({error})") from error
    return np.asarray(alpha) > 0


def _open(file: bytes, what: str, formats: tuple[str, ...] | None) -> Image.Image:
    readable = formats or ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    try:
        return Image.open(io.BytesIO(file), formats=readable)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"{what} is no image that can be read; give a {', '.join(readable)} file",
            field=what,
            status=422,
            code="bad_image",
        ) from error


def _wrong(message: str) -> UserError:
    return UserError(message, field="mask", status=422, code="unsupported_mask")
