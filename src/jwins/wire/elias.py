"""Elias gamma codes: a positive integer of d binary digits is d - 1 zeros, then the digits.

Source: P. Elias, "Universal codeword sets and representations of the integers", IEEE Transactions on
Information Theory 21(2), 1975. The JWINS paper uses them for the gaps between positions.
Bits run from the most significant of each byte to the least; zero bits fill the last byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jwins.errors import CodecError, UsageError

LARGEST = 2**32
"""Largest integer: the largest gap between positions, or an int32 symbol after zigzag plus one."""

_MAX_ZEROS = 32  # zeros before the digits of LARGEST
_BLOCK_BITS = 1 << 16  # bits of a block, whose arrays stay in the cache
_MARGIN_BYTES = 16  # room after a block for the rest of its last code word (at most 65 bits) and a 5-byte read
_STRIDE = 32  # code words that the walk through a block skips at a time

Int64 = npt.NDArray[np.int64]


def encode_integers(values: Int64) -> bytes:
    """Return the Elias gamma codes of ``values``, without gaps.

    Args:
        values: (k,) int64, each in [1, 2**32].

    Returns:
        The codes, padded with zero bits to a whole number of bytes; nothing for no values.

    Raises:
        UsageError: a value out of range.

    >>> encode_integers(np.array([1, 2, 5])).hex()  # 1 010 00101, and seven zeros
    'a280'
    """
    if len(values) == 0:
        return b""
    if int(values.min()) < 1 or int(values.max()) > LARGEST:
        raise UsageError(f"Elias gamma codes 1 to {LARGEST}, got {values.min()} to {values.max()}")
    # frexp of an integer below 2**53 is exact: its exponent is the number of binary digits.
    digits = np.frexp(values.astype(np.float64))[1].astype(np.int64)
    ends = np.cumsum(2 * digits - 1)
    bits = np.zeros(int(ends[-1]), dtype=np.uint8)
    rest, place = values, ends - 1
    while len(rest):  # once per binary digit of the largest value
        bits[place] = rest & 1
        rest = rest >> 1
        more = rest != 0
        rest, place = rest[more], place[more] - 1
    return np.packbits(bits).tobytes()


def decode_integers(data: bytes | memoryview, *, count: int, largest: int = LARGEST) -> Int64:
    """Decode integers of :func:`encode_integers`; safe for any bytes.

    Args:
        data: the codes and their padding, nothing after them.
        count: expected number of integers, at least 0.
        largest: reject integers above this one.

    Returns:
        (count,) int64.

    Raises:
        CodecError: the bytes are not exactly ``count`` codes of integers in [1, largest], or their padding
            is not zero bits to the next whole byte.

    >>> decode_integers(bytes.fromhex("a280"), count=3)
    array([1, 2, 5])
    """
    num_bits = 8 * len(data)
    if not 0 <= count <= num_bits:  # before anything is allocated: a code word has at least one bit
        raise CodecError(f"Elias gamma: {num_bits} bits cannot hold {count} integers")
    buffer = np.frombuffer(data, dtype=np.uint8)
    values = np.empty(count, dtype=np.int64)
    done, start = 0, 0  # integers decoded; bit at which the next code word starts
    while done < count:
        if start >= num_bits:
            raise CodecError(f"Elias gamma: the bytes end after {done} of {count} integers")
        first_byte = start // 8
        block = np.zeros(min(_BLOCK_BITS // 8, len(buffer) - first_byte) + _MARGIN_BYTES, dtype=np.uint8)
        there = buffer[first_byte : first_byte + len(block)]
        block[: len(there)] = there
        starts, zeros = _code_words(block, start % 8, count - done)
        values[done : done + len(starts)] = _digits(block, starts + zeros, zeros)
        done += len(starts)
        start = 8 * first_byte + int(starts[-1]) + 2 * int(zeros[-1]) + 1
    if start > num_bits:
        raise CodecError("Elias gamma: the bytes end inside the last integer")
    padding = num_bits - start
    if padding >= 8 or (padding and int(buffer[-1]) & ((1 << padding) - 1)):
        raise CodecError(f"Elias gamma: bytes left over after {count} integers")
    if count and int(values.max()) > largest:
        raise CodecError(f"Elias gamma: {values.max()} is larger than {largest}")
    return values


def encode_positions(positions: Int64) -> bytes:
    """Encode the gaps between positions as Elias gamma codes; the first gap counts from -1.

    Args:
        positions: (k,) int64, strictly increasing, each in [0, 2**32).

    Raises:
        UsageError: not strictly increasing, or out of range.

    >>> encode_positions(np.array([0, 2, 7])).hex()
    'a280'
    """
    return encode_integers(np.diff(positions, prepend=-1))


def decode_positions(data: bytes | memoryview, *, count: int, dim: int) -> Int64:
    """Decode positions of :func:`encode_positions`; safe for any bytes.

    Args:
        data: the codes and their padding, nothing after them.
        count: expected number of positions.
        dim: length of the vector.

    Returns:
        (count,) int64, strictly increasing, each in [0, dim).

    Raises:
        CodecError: the bytes are invalid.

    >>> decode_positions(bytes.fromhex("a280"), count=3, dim=8)
    array([0, 2, 7])
    """
    if not 0 <= count <= dim:
        raise CodecError(f"{count} positions in a vector of {dim}")
    gaps = decode_integers(data, count=count, largest=min(dim, LARGEST))
    total = int(gaps.view(np.uint64).sum())  # count * dim < 2**64: exact
    if total > dim:
        raise CodecError(f"position {total - 1} in a vector of {dim}")
    np.cumsum(gaps, out=gaps)
    gaps -= 1
    return gaps


def _code_words(block: npt.NDArray[np.uint8], start: int, max_words: int) -> tuple[Int64, Int64]:
    """Return the starts of a block's code words, from bit ``start`` on, and their numbers of leading zeros.

    For every bit, compute the start of the next code word as if one started at this bit. Following these links
    is sequential, so the walk skips 32 code words at a time, and array operations fill in the rest.
    """
    num_bits = 8 * len(block)
    stop = num_bits - 8 * _MARGIN_BYTES  # code words start before this bit
    places = np.arange(num_bits, dtype=np.int32)
    ones = np.where(np.unpackbits(block), places, np.int32(num_bits + _MAX_ZEROS + 1))
    zeros = np.minimum.accumulate(ones[::-1])[::-1] - places
    link = places + 2 * zeros + 1
    link[zeros > _MAX_ZEROS] = num_bits - 1  # not a code: points out of the block
    link[stop:] = places[stop:]
    links = [link]
    while 2 ** len(links) <= _STRIDE:
        links.append(links[-1][links[-1]])
    anchors: list[int] = []
    leap: memoryview[int] = links[-1].data.cast("B").cast("i")
    place = start
    while place < stop and len(anchors) * _STRIDE < max_words:
        anchors.append(place)
        place = leap[place]
    table = np.empty((len(anchors), _STRIDE), dtype=np.int32)
    table[:, 0] = anchors
    for power in reversed(range(len(links) - 1)):
        step = 1 << power
        table[:, step :: 2 * step] = links[power][table[:, :: 2 * step]]
    num_words = min(int(np.searchsorted(table.ravel(), stop)), max_words)
    chain: Int64 = table.ravel()[:num_words].astype(np.int64)
    leading: Int64 = zeros[chain].astype(np.int64)
    if int(leading.max()) > _MAX_ZEROS:
        raise CodecError(f"Elias gamma: more than {_MAX_ZEROS} zeros before an integer")
    return chain, leading


def _digits(block: npt.NDArray[np.uint8], one: Int64, zeros: Int64) -> Int64:
    """Read ``zeros + 1`` binary digits from bit ``one`` on; five bytes contain any 33 bits."""
    byte = one >> 3
    window: Int64 = block[byte].astype(np.int64)
    for i in range(1, 5):
        window = window << 8 | block[byte + i]
    window >>= 39 - (one & 7) - zeros
    window &= (np.int64(2) << zeros) - 1
    return window
