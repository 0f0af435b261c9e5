"""Compiled twin of :mod:`jwins.wire.symbols`, the entropy coding of quantized symbols.

That module explains the names and constants. numba compiles one function to an encoder and to a decoder: for
``decoding`` None it drops the branches of the decoder, and for other values those of the encoder. All numbers
are integers that fit in 64 bits, so the bytes are the same on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from jwins.kernels.compiler import inlined, kernel

FULL = -1
FAILED = -2

_HALF, _MIN_P, _MAX_P = 1 << 15, 32, 45875
_MIN_WIDTH, _MAX_PAST_END = 1 << 24, 4
_START, _SLOWEST = 4, 160
_BLOCK, _SPARSE = 16, 128
_DENSITIES, _BANDS, _NEAR, _ABOVE, _LATE_NEAR = 12, 16, 12, 4, 4
_UNARY, _MAX_EXPONENT, _EQUAL, _MIN_WEIGHT = 14, 30, 32, 4
_MAX_BLOCK_BYTES = 1 << 12
# Where the contexts of each kind begin.
_BY_BAND = _DENSITIES * _NEAR
_LATE = _BY_BAND + _BANDS * _NEAR
_BLOCKS = _LATE + _BLOCK * _LATE_NEAR
_BLOCKS_BY_BAND = _BLOCKS + _DENSITIES * _ABOVE
_SIGNS = _BLOCKS_BY_BAND + _BANDS * _ABOVE * 2
_LARGER = _SIGNS + _BANDS * 27
_LARGER_BY_DENSITY = _LARGER + _NEAR * 2
_EXPONENTS = _LARGER_BY_DENSITY + _DENSITIES * 2
_WEIGHTS = _EXPONENTS + _MAX_EXPONENT
_NUM_CONTEXTS = _WEIGHTS + _NEAR * 2
_PACES = np.array([(1 << 16) // (count + 4) for count in range(_SLOWEST + 1)], dtype=np.int64)
_CLASSES = np.array([eighth.bit_length() for eighth in range((2 << 9) + 1)], dtype=np.int8)

Symbols = npt.NDArray[np.int32]
Data = npt.NDArray[np.uint8]
Table = npt.NDArray[np.int64]


@kernel
def encode(symbols: Symbols, runs: npt.NDArray[np.int64], first: int, data: Data) -> int:
    """Encode symbols.

    Args:
        symbols: (k,).
        runs: lengths of the subbands, which sum to k.
        first: prior probability of a nonzero symbol, in units of 2^-16.
        data: output buffer.

    Returns:
        Number of bytes written, or FULL if ``data`` is too short.
    """
    size: int = _code(symbols, runs, first, data, None)
    return size


@kernel
def decode(symbols: Symbols, runs: npt.NDArray[np.int64], first: int, data: Data) -> int:
    """Decode into ``symbols``, which must be zeros.

    Returns:
        Number of bytes read, including zeros after the end of ``data``, or FAILED for a symbol of more than 32
        bits. Decoding stops before a block if it has read more of these zeros than an encoder leaves out.
    """
    looked_at: int = _code(symbols, runs, first, data, True)
    return looked_at


@kernel
def _code(  # noqa: PLR0915  the decisions of a symbol, with all state in local variables
    symbols: Symbols, runs: npt.NDArray[np.int64], first: int, data: Data, decoding: Any
) -> Any:
    table = _contexts(first)
    low: Any
    width: Any
    at: Any
    bit: Any
    near: Any
    low, width, at, density, start = 0, 1 << 32, 0, 0, 0
    if decoding is not None:
        for _ in range(4):
            low = low << 8 | _byte(data, at)
            at += 1
    for b in range(len(runs)):
        own, parents, shift = symbols[start : start + runs[b]], symbols[:0], 0
        if b == 1 or (b > 1 and runs[b - 1] < runs[b]):
            parents, shift = symbols[start - runs[b - 1] : start], min(b - 1, 1)
        start += runs[b]
        around = _around(parents, (len(own) - 1 >> shift) + 1)
        band = min(b, _BANDS - 1)
        left = left2 = 0
        for begin in range(0, len(own), _BLOCK):
            end = min(begin + _BLOCK, len(own))
            if decoding is None:
                if at + _MAX_BLOCK_BYTES > len(data):
                    return FULL
            elif at > len(data) + _MAX_PAST_END:
                return at
            waiting = False
            if density < _SPARSE:
                bit = 0
                if decoding is None:
                    bit = min(_nonzero(own[begin:end]), 1)
                above = _nonzero(parents[begin >> shift : (end - 1 >> shift) + 1])
                above = min(above, _ABOVE - 1)
                c = _BLOCKS + _CLASSES[density >> 3] * _ABOVE + above
                other = _BLOCKS_BY_BAND + (band * _ABOVE + above) * 2 + min(left + left2, 1)
                p = (table[c] >> 8) + (table[other] >> 8) >> 1
                low, width, at, bit = _put(low, width, at, data, p, bit, decoding)
                _learn(table, c, bit)
                _learn(table, other, bit)
                if bit == 0:
                    density -= density * 13 >> 5
                    left = left2 = 0
                    continue
                waiting = True
            for i in range(begin, end):
                near = min(2 * left + left2 + around[np.uint64(i >> shift)], _NEAR - 1)
                bit = np.int64(own[np.uint64(i)] != 0)
                if not waiting:  # most of the time goes here; an unsigned index cannot count from the end
                    of_density = np.uint64(_CLASSES[np.uint64(density >> 3)] * _NEAR + near)
                    of_band = np.uint64(_BY_BAND + band * _NEAR + near)
                    state, of_other = table[of_density], table[of_band]
                    p = (state >> 8) + (of_other >> 8) >> 1
                    bound = (width >> 16) * p
                    if decoding is not None:
                        bit = np.int64(low < bound)
                    if bit == 0:
                        low, width, at = _upper(low, width, at, data, bound, decoding)
                        table[of_density], table[of_band] = _less(state), _less(of_other)
                        density -= density + 31 >> 5
                        left2, left = left, 0
                        continue
                    low, width, at = _filled(low, bound, at, data, decoding)
                    table[of_density], table[of_band] = _more(state), _more(of_other)
                elif i < end - 1:
                    c = _LATE + (end - 1 - i) * _LATE_NEAR + min(near, _LATE_NEAR - 1)
                    low, width, at, bit = _put(low, width, at, data, table[c] >> 8, bit, decoding)
                    _learn(table, c, bit)
                else:
                    bit = 1
                magnitude = 0
                if bit:
                    waiting = False
                    c = _sign(own, i - 1) * 3 + _sign(own, i - 2)
                    c = _SIGNS + (band * 9 + c) * 3 + _sign(parents, i >> shift)
                    negative = np.int64(own[i] < 0)
                    low, width, at, negative = _put_even(
                        low, width, at, data, table[c] >> 8, negative, decoding
                    )
                    _learn(table, c, negative)
                    low, width, at, magnitude = _magnitude(
                        low, width, at, data, abs(np.int64(own[i])), near, density, table, decoding
                    )
                    if decoding is not None:
                        if magnitude > (1 << 31) - 1 + negative:
                            return FAILED
                        own[i] = np.int32((magnitude ^ -negative) + negative)
                density += (min(magnitude, 2) << 12) - density >> 5
                left2, left = left, min(magnitude, _NEAR)
    if decoding is not None:
        return at
    if at + _MAX_BLOCK_BYTES > len(data):
        return FULL
    return _finish(low, width, at, data)


@kernel
def _contexts(first: int) -> Table:
    """Return the initial table: for each context, its probability times 2^8 plus its number of decisions."""
    table = np.zeros(_NUM_CONTEXTS, dtype=np.int64)
    table[_BLOCKS:] = _HALF << 8
    table[_LARGER:_EXPONENTS] = _HALF >> 1 << 8
    table[_WEIGHTS:] = _EQUAL
    for near in range(_NEAR):
        for density in range(_DENSITIES):
            table[density * _NEAR + near] = min((38 << density) * (3 + near) // 3, _MAX_P) << 8 | _START
        for band in range(_BANDS):
            table[_BY_BAND + band * _NEAR + near] = min(first * (3 + near) // 3, _MAX_P) << 8 | _START
    for left in range(1, _BLOCK):
        for near in range(_LATE_NEAR):
            p = min((1 << 16) * (3 + near) // (3 * left + 3), _MAX_P)
            table[_LATE + left * _LATE_NEAR + near] = p << 8 | _START
    return table


@kernel
def _around(parents: Symbols, count: int) -> Data:
    """Return for each parent twice its magnitude plus those beside it, at most ``_NEAR - 1``."""
    found = np.zeros(count, dtype=np.uint8)
    known = min(count, len(parents))
    last = np.int64(0)
    here = _few(parents[0]) if known else np.int64(0)
    for k in range(known):
        following = _few(parents[k + 1]) if k + 1 < len(parents) else np.int64(0)
        found[k] = min(last + 2 * here + following, _NEAR - 1)
        last, here = here, following
    return found


@kernel
def _few(symbol: np.int32) -> Any:
    return min(abs(np.int64(symbol)), _NEAR - 1)


@inlined
def _nonzero(symbols: Symbols) -> int:
    count = 0
    for symbol in symbols:
        count += symbol != 0
    return count


@inlined
def _magnitude(
    low: Any, width: Any, at: Any, data: Data, known: Any, near: int, density: int, table: Table, decoding: Any
) -> tuple[Any, Any, Any, Any]:
    """Code a magnitude of at least 1, and return it; an encoder passes it as ``known``."""
    magnitude: Any = 1
    while magnitude <= _UNARY:
        more = np.int64(known > magnitude)
        later = min(magnitude - 1, 1)
        c, other = _LARGER + near * 2 + later, _LARGER_BY_DENSITY + _CLASSES[density >> 3] * 2 + later
        p, q, weight = table[c] >> 8, table[other] >> 8, table[_WEIGHTS + near * 2 + later]
        mean = weight * p + (2 * _EQUAL - weight) * q >> 6
        low, width, at, more = _put(low, width, at, data, mean, more, decoding)
        if p != q:
            weight += 1 if (p > q) == (more != 0) else -1
            weight = min(max(weight, _MIN_WEIGHT), 2 * _EQUAL - _MIN_WEIGHT)
            table[_WEIGHTS + near * 2 + later] = weight
        _learn(table, c, more)
        _learn(table, other, more)
        if more == 0:
            return low, width, at, magnitude
        magnitude += 1
    rest, exponent = known - _UNARY, 0
    while exponent < _MAX_EXPONENT:
        more = np.int64(rest >> exponent + 1 != 0)
        c = _EXPONENTS + exponent
        low, width, at, more = _put(low, width, at, data, table[c] >> 8, more, decoding)
        _learn(table, c, more)
        if more == 0:
            break
        exponent += 1
    found: Any = 1
    for digit in range(exponent - 1, -1, -1):
        one = rest >> digit & 1
        low, width, at, one = _put(low, width, at, data, _HALF, one, decoding)
        found = found << 1 | one
    return low, width, at, found + _UNARY


@kernel
def _sign(symbols: Symbols, i: int) -> Any:
    """Return 0 for a symbol that is 0 or does not exist, 1 for a positive and 2 for a negative one."""
    if i < 0 or i >= len(symbols):
        return 0
    return (symbols[i] > 0) + 2 * (symbols[i] < 0)


@kernel
def _learn(table: Table, context: int, bit: int) -> None:
    """Move a probability towards the decision; each step is smaller.

    The result is that of :func:`_more` or :func:`_less`, without a branch that a processor could only guess.
    """
    at = np.uint64(context)
    state = table[at]
    p, count = state >> 8, state & 255
    p += ((bit << 16) - p) * _PACES[count] >> 16
    table[at] = min(max(p, _MIN_P), (1 << 16) - _MIN_P) << 8 | min(count + 1, _SLOWEST)


@kernel
def _more(state: Any) -> Any:
    """Return the state of a context after a decision of 1."""
    p, count = state >> 8, state & 255
    p += ((1 << 16) - p) * _PACES[count] >> 16
    return min(p, (1 << 16) - _MIN_P) << 8 | min(count + 1, _SLOWEST)


@kernel
def _less(state: Any) -> Any:
    """Return the state of a context after a decision of 0."""
    p, count = state >> 8, state & 255
    p -= p * _PACES[count] + 0xFFFF >> 16
    return max(p, _MIN_P) << 8 | min(count + 1, _SLOWEST)


@kernel
def _byte(data: Data, at: int) -> Any:
    return np.int64(data[at]) if at < len(data) else 0


@kernel
def _put(
    low: Any, width: Any, at: Any, data: Data, p: Any, bit: Any, decoding: Any
) -> tuple[Any, Any, Any, Any]:
    """Code a decision with probability ``p / 2^16`` of 1: split the range, and keep the side of the decision.

    Args:
        low: lower end of the range; for a decoder, the difference between the coded number and this end.
        width: width of the range, 2^24 to 2^32.
        at: position of the next byte.
        data: bytes.
        p: 2^5 to 2^16 - 2^5.
        bit: the decision; a decoder ignores it.
        decoding: None for an encoder.

    Returns:
        ``low``, ``width``, ``at`` and the decision.
    """
    bound = (width >> 16) * p
    if decoding is not None:
        bit = np.int64(low < bound)
    if bit:
        low, width, at = _filled(low, bound, at, data, decoding)
    else:
        low, width, at = _upper(low, width, at, data, bound, decoding)
    return low, width, at, bit


@kernel
def _put_even(
    low: Any, width: Any, at: Any, data: Data, p: Any, bit: Any, decoding: Any
) -> tuple[Any, Any, Any, Any]:
    """Code a decision as :func:`_put` does, without a branch, for decisions that are as often 1 as 0."""
    bound = (width >> 16) * p
    if decoding is not None:
        bit = np.int64(low < bound)
    if_zero = bit - 1  # all bits set, or none
    width = bound + (if_zero & width - 2 * bound)
    if decoding is not None:
        low -= if_zero & bound
    else:
        low += if_zero & bound
        if low >> 32:
            low &= (1 << 32) - 1
            _carry(data, at)
    low, width, at = _filled(low, width, at, data, decoding)
    return low, width, at, bit


@inlined
def _upper(low: Any, width: Any, at: Any, data: Data, bound: Any, decoding: Any) -> tuple[Any, Any, Any]:
    """Keep the upper side of the range, which is that of a decision of 0."""
    if decoding is not None:
        low -= bound
    else:
        low += bound
        if low >> 32:
            low &= (1 << 32) - 1
            _carry(data, at)
    return _filled(low, width - bound, at, data, decoding)


@inlined
def _filled(low: Any, width: Any, at: Any, data: Data, decoding: Any) -> tuple[Any, Any, Any]:
    """Write or read the leading bytes of a range that became narrow."""
    while width < _MIN_WIDTH:
        width <<= 8
        if decoding is None:
            data[at] = low >> 24
            low = low << 8 & (1 << 32) - 1
        else:
            low = low << 8 | _byte(data, at)
        at += 1
    return low, width, at


@kernel
def _carry(data: Data, at: int) -> None:
    at -= 1
    while data[at] == 255:
        data[at] = 0
        at -= 1
    data[at] += 1


@kernel
def _finish(low: int, width: int, at: int, data: Data) -> int:
    """Write the number in the range that has the most zero bits at its end, without zero bytes at its end."""
    zeros = 32
    while low + width - 1 >> zeros << zeros < low:
        zeros -= 1
    number = low + width - 1 >> zeros << zeros
    if number >> 32:
        _carry(data, at)
    for place in range(3, -1, -1):
        data[at] = number >> 8 * place & 255
        at += 1
    least = at - _MAX_PAST_END
    while at > least and data[at - 1] == 0:
        at -= 1
    return at
