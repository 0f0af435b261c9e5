"""Settings of the C library for memory that tensors free."""

from __future__ import annotations

import ctypes
import gc
import os

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_BLOCK_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 1 GiB for the next tensor, for the whole process.

    By default glibc returns large blocks to the system at once, and the system clears every page again before
    the next activation is written to it. That takes a fifth of the time of evaluating a convolutional network,
    two fifths in large batches (``benchmarks/evaluation.py``). Results do not depend on it.

    Returns:
        Whether the setting was made; False with other C libraries, which are not changed.
    """
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAX_BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, _MAX_BLOCK_BYTES))


def trim_freed_memory() -> bool:
    """Return freed memory to the system, for an idle process that continues to exist.

    Returns:
        Whether there was freed memory; False with other C libraries.
    """
    gc.collect()
    return _is_glibc() and bool(ctypes.CDLL(None).malloc_trim(0))


def _is_glibc() -> bool:
    return "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and bool(os.confstr("CS_GNU_LIBC_VERSION"))
