"""How a training process keeps its memory. Standard library only.

A step allocates the same blocks as the one before. By default glibc gives some of them back to the
kernel in between, which hands them out again page by page, each filled with zeros: a transformer
step of the rainbow recipe had 7,000 to 10,000 page faults and 36 to 62 ms of the kernel's time so,
and has 14 to 44 and 8 to 18 ms with what is set here, a tenth less in all (two cores, in turns,
2026-11-26).
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BLOCK = 32 << 20  # from here on a block is the kernel's again at once, as by default
_KEPT_IN_ALL = 256 << 20


def keep_memory() -> None:
    """Keep what is freed for the next step: blocks below 32 MiB, and up to 256 MiB at each arena's
    end. Without glibc it does nothing."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _KEPT_BLOCK)
        set_option(_M_TRIM_THRESHOLD, _KEPT_IN_ALL)
