"""Parts of a PNG file: what Pillow refuses without need, and what it accepts though it is missing.

Parts (chunks) are a length, a kind, the content and a checksum (PNG specification, section 5.3).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Parts besides the pixels. The others describe the image.
_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_NEEDED = frozenset({b"tRNS", b"acTL", b"fcTL", b"fdAT"})  # transparency and animation

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column and row, and steps, of each pass of an interlaced image (section 8.2).
_PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
_INFLATE_BYTES = 1 << 16


def without_descriptions(data: bytes) -> Iterator[bytes]:
    """Return a PNG file without its texts, then with its pixels alone, where that is shorter."""
    for with_pixels_alone in (False, True):
        parts = [data[:8]]
        for kind, start, end in _parts(data):
            is_ancillary = kind[:1] >= b"a"  # lower case
            if kind not in _TEXT and (kind in _NEEDED or not (with_pixels_alone and is_ancillary)):
                parts.append(data[start:end])
        shorter = b"".join(parts)
        if len(shorter) < len(data):
            yield shorter


def lacks_pixels(data: bytes) -> bool:
    """Return whether the compressed pixels end, without an error, before those of the header.

    Decompresses the pixels, piece by piece.
    """
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    bits_of_pixel = data[24] * _CHANNELS[data[25]]
    missing = sum(
        rows * (1 + (columns * bits_of_pixel + 7) // 8)
        for columns, rows in _passes(width, height, is_interlaced=bool(data[28]))
        if columns
    )
    inflate = zlib.decompressobj()
    for kind, start, end in _parts(data):
        if kind != b"IDAT":
            continue
        rest = data[start + 8 : end - 4]
        while rest and missing > 0 and not inflate.eof:
            missing -= len(inflate.decompress(rest, _INFLATE_BYTES))
            rest = inflate.unconsumed_tail
    while missing > 0 and not inflate.eof and (more := inflate.decompress(b"", _INFLATE_BYTES)):
        missing -= len(more)
    return missing > 0


def _passes(width: int, height: int, *, is_interlaced: bool) -> Iterator[tuple[int, int]]:
    """Yield the columns and rows of each pass."""
    if not is_interlaced:
        yield width, height
        return
    for left, top, across, down in _PASSES:
        yield -(-(width - left) // across), -(-(height - top) // down)


def _parts(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each part."""
    at = len(SIGNATURE)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        yield data[at + 4 : at + 8], at, end
        at = end
