"""The C library's memory: freed buffers stay with the process, so that the next buffer is no new memory to zero."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Smaller buffers come from the heap, larger ones from the system each time. Slabs of rows are smaller.
LARGEST_HEAP_BUFFER = 1 << 23
# Free memory above so many bytes at the end of the heap goes back to the system.
_KEPT_NBYTES = 1 << 27


def keep_freed_buffers() -> bool:
    """Let the process keep freed memory, 128 MB at the end of the heap. A conversion allocates and frees the buffers of
    each slab of rows: by default glibc gives large buffers back to the system, and the system zeroes every page anew, a
    tenth of the time of a conversion. True if the C library is glibc and agrees.

    >>> keep_freed_buffers() in (True, False)
    True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_HEAP_BUFFER) and mallopt(_M_TRIM_THRESHOLD, _KEPT_NBYTES))
