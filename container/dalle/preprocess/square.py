"""Image file -> the square of pixels that a model reads. Knows nothing of torch.

train     centre square, as pictures are read in training
clip      shorter side resized, centre cut out: OpenAI's CLIP, and most models of open_clip
squash    the whole picture resized to a square: some models of open_clip
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dalle.preprocess.images import MAX_PIXELS, Pixels, count_pixels, decode_image, to_square
from dalle.types import SquareMethod


@dataclass(frozen=True)
class Square:
    """A square of `size` pixels that a model reads, and how it comes from a picture."""

    size: int
    method: SquareMethod = "train"

    def read(self, data: bytes, what: str) -> Pixels:
        """Decode an image file and resize it. what: its name in errors.

        Returns a writable uint8 array [size, size, 3]. Raises `ImageError`.
        """
        # CLIP resizes the whole picture; a part of a JPEG's resolution would give other pixels.
        is_whole = self.method != "train" and count_pixels(data, what=what) <= MAX_PIXELS
        image = decode_image(data, what=what, min_side=None if is_whole else self.size)
        return self.of(image)

    def of(self, image: Image.Image) -> Pixels:
        """Resize an RGB image. Returns a writable uint8 array [size, size, 3]."""
        size = self.size
        if self.method == "train":
            return to_square(image, size)
        if self.method == "squash":
            square = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            square = _cut_out(image, size)
        return np.array(square, dtype=np.uint8)


def _cut_out(image: Image.Image, size: int) -> Image.Image:
    """Do what torchvision's Resize(size, bicubic) and CenterCrop(size) do."""
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if width * height <= MAX_PIXELS:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + size, top + size))
    # A strip a thousand times as wide as high: its resized pixels would take gigabytes.
    across, down = image.width / width, image.height / height
    right, bottom = (left + size) * across, (top + size) * down
    box = (left * across, top * down, min(right, image.width), min(bottom, image.height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
