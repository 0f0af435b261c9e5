"""The discrete wavelet transform in PyWavelets' order of additions, so that results have the same bits.

With F taps (always even), e the vector of N numbers extended beyond its ends, and h = F / 2:

    symmetric      c[o] = sum_j dec[j] e[2 o + 1 - j]     for o < (N + F - 1) // 2
    periodization  c[o] = sum_j dec[j] e[2 o + h - j]     for o < N / 2

and back, from even and odd taps, where a and d are the coarse and the fine half:

    even[i] = sum_j low[2 j] a[i - j]     + sum_j high[2 j] d[i - j]
    odd[i]  = sum_j low[2 j + 1] a[i - j] + sum_j high[2 j + 1] d[i - j]

Sums are in float32 and begin with 0. Taps that reach beyond the right end come first, from the end outwards;
the others follow in their order. Where all taps are inside, the filters are tuples: loops over them
are unrolled, and each filter length is compiled once.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from jwins.kernels.compiler import kernel

Vector: TypeAlias = npt.NDArray[np.float32]
Lengths: TypeAlias = npt.NDArray[np.int64]
Filter: TypeAlias = tuple[np.float32, ...]


@kernel
def forward(
    rows: Vector,
    filters: Vector,
    low: Filter,
    high: Filter,
    periodic: bool,
    levels: int,
    coefficients: Vector,
    spare: Vector,
) -> None:
    """Transform each row; coarsest coefficients first.

    Args:
        rows: (R, P).
        filters: (2, F) taps of the two analysis filters: of the coarse half and of the fine one.
        low: the first of them.
        high: the second.
        periodic: periodization, for which a row is followed by zeros up to a multiple of ``2**levels``;
            else symmetric.
        levels: number of times that the coarse half is split, at least 1.
        coefficients: (R, C), written.
        spare: (2, S) working memory, S at least the length of the longest coarse half.
    """
    taps = len(low)
    dim = rows.shape[1]
    for row in range(rows.shape[0]):
        out = coefficients[row]
        end = len(out)
        source = rows[row]
        length = dim
        if periodic:
            length += -dim % (1 << levels)
        for level in range(levels):
            count = length // 2 if periodic else (length + taps - 1) // 2
            coarse = out[:count] if level == levels - 1 else spare[level % 2, :count]
            _split(source, length, filters, low, high, periodic, coarse, out[end - count : end])
            end -= count
            source = coarse
            length = count


@kernel
def inverse(
    coefficients: Vector,
    filters: Vector,
    low: Filter,
    high: Filter,
    periodic: bool,
    steps: Lengths,
    rows: Vector,
    spare: Vector,
) -> None:
    """Transform each row of coefficients back.

    Args:
        coefficients: (R, C), coarsest first.
        filters: (2, F) taps of the two synthesis filters: of the coarse half and of the fine one.
        low: the first of them.
        high: the second.
        periodic: periodization, else symmetric.
        steps: (levels,) int64, the length that each level splits, the finest first; at least one level.
        rows: (R, P), written.
        spare: (2, S) working memory, S at least the longest of ``steps`` but the first.
    """
    levels = len(steps)
    taps = len(low)
    for row in range(coefficients.shape[0]):
        given = coefficients[row]
        count = steps[levels - 1] // 2 if periodic else (steps[levels - 1] + taps - 1) // 2
        coarse = given[:count]
        at = count
        for level in range(levels - 1, -1, -1):
            out = spare[level % 2, : steps[level]] if level else rows[row]
            _join(coarse, given[at : at + count], filters, low, high, periodic, out)
            at += count
            if level:
                coarse = out
                count = steps[level - 1] // 2 if periodic else (steps[level - 1] + taps - 1) // 2


@kernel
def _split(
    x: Vector,
    length: int,
    filters: Vector,
    low: Filter,
    high: Filter,
    periodic: bool,
    coarse: Vector,
    fine: Vector,
) -> None:
    """Transform one level. Of the ``length`` numbers those beyond the end of ``x`` are 0."""
    taps = len(low)
    shift = taps // 2 if periodic else 1
    count = len(fine)
    inside = min(count, (taps - shift) // 2)  # from here on no tap reaches beyond the left end,
    beyond = max(inside, min(count, (len(x) - shift + 1) // 2))  # and from here on one reaches beyond the right
    _split_at_border(x, length, filters, periodic, shift, 0, inside, coarse, fine)
    if beyond > inside:
        first = 2 * inside + shift + 1 - taps
        _split_inside(x[first:], low, high, coarse[inside:beyond], fine[inside:beyond])
    _split_at_border(x, length, filters, periodic, shift, beyond, count, coarse, fine)


@kernel
def _split_inside(x: Vector, low: Filter, high: Filter, coarse: Vector, fine: Vector) -> None:
    last = len(low) - 1
    for o in range(len(coarse)):
        c = np.float32(0)
        d = np.float32(0)
        for j in range(last + 1):
            i = np.uint64(2 * o + (last - j))  # non-negative indices need no wrap-around from the end
            c += low[j] * x[i]
            d += high[j] * x[i]
        coarse[o] = c
        fine[o] = d


@kernel
def _split_at_border(
    x: Vector,
    length: int,
    filters: Vector,
    periodic: bool,
    shift: int,
    first: int,
    end: int,
    coarse: Vector,
    fine: Vector,
) -> None:
    for o in range(first, end):
        last = 2 * o + shift
        outside = max(0, last - length + 1)
        c = np.float32(0)
        d = np.float32(0)
        for j in range(filters.shape[1]):
            tap = outside - 1 - j if j < outside else j
            i = last - tap
            if periodic:
                i %= length
            else:
                i %= 2 * length
                if i >= length:
                    i = 2 * length - 1 - i
            value = x[i] if i < len(x) else np.float32(0)
            c += filters[0, tap] * value
            d += filters[1, tap] * value
        coarse[o] = c
        fine[o] = d


@kernel
def _join(
    a: Vector, d: Vector, filters: Vector, low: Filter, high: Filter, periodic: bool, out: Vector
) -> None:
    """Invert one level; ``out`` may be shorter than the result."""
    half = len(low) // 2
    count = len(a)
    begin = half // 2 if periodic else half - 1  # i of the first two numbers
    pairs = count if periodic else count - half + 1
    shift = 1 - half % 2 if periodic else 0  # the last odd number is then the first of all
    inside = min(pairs, half - 1 - begin)
    beyond = max(inside, min(count - begin, (len(out) - shift) // 2))
    for p in range(inside):
        _pair_at_border(a, d, filters, periodic, p, begin + p, shift, out)
    if beyond > inside:
        first = inside + begin + 1 - half
        _join_inside(a[first:], d[first:], low, high, periodic, out[2 * inside + shift : 2 * beyond + shift])
    for p in range(beyond, pairs):
        _pair_at_border(a, d, filters, periodic, p, begin + p, shift, out)


@kernel
def _join_inside(a: Vector, d: Vector, low: Filter, high: Filter, periodic: bool, out: Vector) -> None:
    last = len(low) // 2 - 1
    zero = np.float32(0)
    if periodic:  # one sum
        for p in range(len(out) // 2):
            even = zero
            odd = zero
            for j in range(last + 1):
                even += low[2 * j] * a[p + (last - j)]
                odd += low[2 * j + 1] * a[p + (last - j)]
            for j in range(last + 1):
                even += high[2 * j] * d[p + (last - j)]
                odd += high[2 * j + 1] * d[p + (last - j)]
            out[2 * p] = even
            out[2 * p + 1] = odd
    else:  # the sum of two
        for p in range(len(out) // 2):
            even = zero
            odd = zero
            fine_even = zero
            fine_odd = zero
            for j in range(last + 1):
                even += low[2 * j] * a[p + (last - j)]
                odd += low[2 * j + 1] * a[p + (last - j)]
                fine_even += high[2 * j] * d[p + (last - j)]
                fine_odd += high[2 * j + 1] * d[p + (last - j)]
            out[2 * p] = (zero + even) + fine_even
            out[2 * p + 1] = (zero + odd) + fine_odd


@kernel
def _pair_at_border(
    a: Vector, d: Vector, filters: Vector, periodic: bool, p: int, i: int, shift: int, out: Vector
) -> None:
    """Compute the two numbers at the border of a circle, or the last one of other vectors."""
    count = len(a)
    outside = max(0, i - count + 1)
    even = np.float32(0)
    odd = np.float32(0)
    fine_even = np.float32(0)
    fine_odd = np.float32(0)
    half = filters.shape[1] // 2
    for j in range(half):
        tap = outside - 1 - j if j < outside else j
        at = (i - tap) % count
        even += filters[0, 2 * tap] * a[at]
        odd += filters[0, 2 * tap + 1] * a[at]
    for j in range(half):
        tap = outside - 1 - j if j < outside else j
        at = (i - tap) % count
        if periodic:
            even += filters[1, 2 * tap] * d[at]
            odd += filters[1, 2 * tap + 1] * d[at]
        else:
            fine_even += filters[1, 2 * tap] * d[at]
            fine_odd += filters[1, 2 * tap + 1] * d[at]
    if not periodic:
        even = (np.float32(0) + even) + fine_even
        odd = (np.float32(0) + odd) + fine_odd
    at = 2 * p + shift
    if at < len(out):
        out[at] = even
    at = (at + 1) % (2 * count) if periodic else at + 1
    if at < len(out):
        out[at] = odd
