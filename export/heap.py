"""Freed memory goes back to the system, and not into the C library's keeping.

glibc maps large blocks one by one, and unmaps them when they are freed; but with every one that is
freed it raises the size from which it does so, up to 32 MB, and keeps smaller ones in a heap that
falls to pieces. An export frees some ten thousand tensors of 10 to 30 MB: for 11.9 billion weights
that heap was 3 GB of nothing at the end. A fixed size, as MALLOC_MMAP_THRESHOLD_ sets it from
outside, keeps the peak where the largest tensor puts it.

    >>> unmap_from(MAPPED)
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Final

MAPPED: Final = 2**20
"""Bytes: far below a layer's weights, and far above what Python allocates by the million."""
_M_MMAP_THRESHOLD: Final = -3  # of glibc's malloc.h


def unmap_from(size: int) -> bool:
    """Have blocks of `size` bytes and more mapped and unmapped one by one; False where the C
    library is no glibc, and nothing is changed."""
    name = ctypes.util.find_library("c")
    if name is None or "libc.so" not in name:
        return False
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, size) == 1
