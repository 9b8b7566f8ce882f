"""Memory that a large picture used goes back to the machine when the picture is done."""

from __future__ import annotations

import ctypes
from functools import cache

from nvlm_deploy.image_file.limits import MEBIBYTE

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Pillow holds a picture in blocks of 16 MB; the tiles of a picture, which every request needs, have 4 MB
_LARGE_BLOCK = 8 * MEBIBYTE
_MOST_FREE = 16 * MEBIBYTE


@cache
def return_large_blocks() -> bool:
    """Have glibc give back every large block at once when it is freed. Return False where the C library cannot.

    By default glibc keeps blocks as large as any that was ever freed, up to 32 MB, in the heaps of the threads. Then
    `malloc_trim` does not help either: it leaves the top of every thread's heap as it is, and 40 MB stayed there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK) and mallopt(_TRIM_THRESHOLD, _MOST_FREE))
