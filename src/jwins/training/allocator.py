"""How the C library treats memory that tensors give back."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**30


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 1 GiB for the next tensor, for the whole process.

    By default it hands large blocks back to the system at once, and the system clears every page again before
    the next activation is written to it: a fifth of the time of evaluating a convolutional network, two fifths
    in large batches (``benchmarks/evaluation.py``). Results do not depend on it.

    Returns:
        Whether it was set; False with other C libraries, which are left alone.
    """
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}) or not os.confstr("CS_GNU_LIBC_VERSION"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MOST) and mallopt(_M_TRIM_THRESHOLD, _MOST))
