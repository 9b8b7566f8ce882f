"""Memory that a large request used goes back to the machine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

# below this, the next request soon takes the memory again, and giving it back costs page faults
LARGE_REQUEST_PIXELS = 16_000_000


def release_memory(pixels: int) -> None:
    """Give free memory back after a request of many pixels.

    Pillow's blocks of 16 MB are above glibc's first threshold for mmap, but that threshold grows to the largest block
    ever freed, up to 32 MB. From then on such blocks stay in the heaps of the threads.
    """
    trim = _malloc_trim()
    if pixels > LARGE_REQUEST_PIXELS and trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None where the C library has no such function."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
