"""The colours that a viewer shows for a decoded image: sRGB, opaque on white, 8 bits a channel.

    image as its file has it -> 8-bit colours and alpha -> sRGB by its profile -> on white

littleCMS (Pillow's ImageCms) applies a colour profile where it fits the image's mode. An image
without a profile, or with one that is damaged or of another colour space, is sRGB.
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

MAX_PROFILE_BYTES = 4 << 20  # of printers: up to 3 MB; of cameras and screens: a few kB
PROFILES_KEPT = 16

_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of a profile -> Pillow's mode
_PROBE_STEP = 51  # six values a channel


def to_rgb(image: Image.Image, bit_depth: int = 8) -> Image.Image:
    """Convert a decoded image of any mode to RGB as a viewer shows it.

    bit_depth: bits per channel in the file, which the transparent colour of a PNG is written in.
    """
    colours, alpha = _split(image, bit_depth)
    colours = _to_srgb(colours, image.info.get("icc_profile"))
    if alpha is None:
        return colours
    colours.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _split(image: Image.Image, bit_depth: int) -> tuple[Image.Image, Image.Image | None]:
    """Return an image's colours in mode L, RGB or CMYK, and its alpha channel if it has one."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        # Sixteen-bit grey: Pillow's conversion would clip everything above 255 to white.
        values = np.asarray(image).astype(np.int64).clip(0, 65_535)
        grey = Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))
        if not isinstance(key, int):
            return grey, None
        return grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        if image.mode == "L" and isinstance(key, int) and bit_depth < 8:
            image = image.copy()  # Pillow widens the pixels to 8 bits and not the key
            image.info["transparency"] = key * 255 // (2**bit_depth - 1)
        elif image.mode == "RGB" and isinstance(key, tuple) and bit_depth == 16:
            image = image.copy()  # Pillow keeps each pixel's upper byte
            image.info["transparency"] = tuple(value >> 8 for value in key)
        image = image.convert("LA" if is_grey else "RGBA")
        return image.convert("L" if is_grey else "RGB"), image.getchannel("A")
    mode = "L" if is_grey else "CMYK" if image.mode == "CMYK" else "RGB"
    return image if image.mode == mode else image.convert(mode), None


def _to_srgb(colours: Image.Image, profile: Any) -> Image.Image:
    """Convert an image of mode L, RGB or CMYK to sRGB, by its profile where that fits."""
    if isinstance(profile, bytes) and 0 < len(profile) <= MAX_PROFILE_BYTES:
        try:
            transform = _transform(profile, colours.mode)
            if transform is not None:
                return transform.apply(colours)
        except MemoryError:
            raise
        except Exception as error:  # littleCMS raises exceptions of several kinds
            log.debug("a damaged colour profile is ignored: %s", error)
    return colours if colours.mode == "RGB" else colours.convert("RGB")


@lru_cache(PROFILES_KEPT)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way from a profile to sRGB; None where it changes no colour of an image.

    Raises what littleCMS raises for a damaged profile.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if _SPACES.get(opened.profile.xcolor_space.strip()) != mode:
        return None
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    transform = ImageCms.ImageCmsTransform(opened, srgb, mode, "RGB")
    if mode == "CMYK":
        return transform
    # Many profiles are sRGB by another name. Tried on some colours, they change nothing.
    values = np.arange(0, 256, _PROBE_STEP, dtype=np.uint8)
    probe = np.stack(np.meshgrid(values, values, values), axis=-1).reshape(1, -1, 3)
    image = Image.fromarray(np.ascontiguousarray(probe)).convert(mode)
    before, after = np.asarray(image.convert("RGB")), np.asarray(transform.apply(image))
    is_srgb = np.abs(before.astype(int) - after.astype(int)).max() <= 1
    return None if is_srgb else transform
