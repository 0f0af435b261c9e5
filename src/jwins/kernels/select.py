"""Exact choice of the k largest magnitudes by radix, in three passes; ties go to the lower position."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jwins.kernels.compiler import kernel

_MAGNITUDE = 0x7FFFFFFF  # without the sign, float32 have the same order as their bits as integers
_INFINITE = 0x7F800000
_HIGH, _MIDDLE, _LOW = 12, 10, 9  # bits of a magnitude, in the order of the passes


@kernel
def largest_k(bits: npt.NDArray[np.uint32], positions: npt.NDArray[np.int64]) -> bool:
    """Find the positions of the k largest magnitudes, in increasing order.

    Args:
        bits: (n,), the bits of float32.
        positions: (k + 1,), 1 <= k <= n, of which the first k are written.

    Returns:
        False if a number is not finite; ``positions`` is invalid then.
    """
    k = len(positions) - 1
    # Neighbours have separate counts: the processor would otherwise wait at equal numbers, such as zeros.
    counts = np.zeros((2, 1 << _HIGH), dtype=np.int64)
    largest = np.uint32(0)
    for i in range(len(bits)):
        magnitude = bits[i] & np.uint32(_MAGNITUDE)
        largest = max(largest, magnitude)
        counts[i & 1, magnitude >> np.uint32(_MIDDLE + _LOW)] += 1
    if largest >= _INFINITE:
        return False
    high, above = _bucket(counts[0] + counts[1], k)

    candidates = np.empty(counts[0, high] + counts[1, high], dtype=np.uint32)
    found = 0
    for i in range(len(bits)):
        magnitude = bits[i] & np.uint32(_MAGNITUDE)
        if magnitude >> np.uint32(_MIDDLE + _LOW) == high:
            candidates[found] = magnitude
            found += 1
    of_middle = np.zeros(1 << _MIDDLE, dtype=np.int64)
    for magnitude in candidates:
        of_middle[magnitude >> np.uint32(_LOW) & np.uint32((1 << _MIDDLE) - 1)] += 1
    middle, more = _bucket(of_middle, k - above)
    above += more
    prefix = high << _MIDDLE | middle
    of_low = np.zeros(1 << _LOW, dtype=np.int64)
    for magnitude in candidates:
        if magnitude >> np.uint32(_LOW) == prefix:
            of_low[magnitude & np.uint32((1 << _LOW) - 1)] += 1
    low, more = _bucket(of_low, k - above)
    above += more

    smallest = np.uint32(prefix << _LOW | low)
    ties = k - above
    found = 0
    for i in range(len(bits)):
        magnitude = bits[i] & np.uint32(_MAGNITUDE)
        positions[found] = i
        if magnitude == smallest:
            if ties > 0:
                ties -= 1
                found += 1
        else:
            found += magnitude > smallest
    return True


@kernel
def _bucket(counts: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """Return the bucket of the k-th largest number, and the count of numbers in higher buckets."""
    above = 0
    bucket = len(counts) - 1
    while above + counts[bucket] < k:
        above += counts[bucket]
        bucket -= 1
    return bucket, above


@kernel
def copy_some(
    source: npt.NDArray[np.float32], positions: npt.NDArray[np.int64], target: npt.NDArray[np.float32]
) -> None:
    """Copy the numbers at ``positions``, which must be in range, from one vector to another."""
    for position in positions:
        target[position] = source[position]
