"""Memory that a step gave back is the next step's: glibc told not to return it."""

import ctypes
import functools
import sys

MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2
"""Of glibc's mallopt (malloc.h)."""


@functools.cache
def keep_memory() -> str:
    """Have malloc keep what this process has freed; what is now done, for the run file.

    glibc maps every block above 32 MB anew and gives freed memory back to the kernel, so
    that each step takes tens of thousands of page faults to get the same memory again: a
    fifth of a `small` step (LOG.md). For the rest of the process, which then holds on to
    the most it ever used. Nothing is changed where the C library is not glibc.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return "the platform's malloc, as it is"
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**28))
    if not all([library.mallopt(name, value) for name, value in settings]):
        return "glibc malloc, which refused to keep freed memory"
    return "glibc malloc keeping freed memory (mmap_max 0, top_pad 256 MB)"
