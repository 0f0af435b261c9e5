"""Entropy coding of quantized symbols: an adaptive binary range coder with contexts for clustered zeros.

:func:`_code` defines the decisions of each symbol and their probabilities, for the encoder and the decoder.
All numbers are integers, so the bytes are the same on every machine; they belong to the wire format
(docs/reference/wire.md). Longer vectors use the compiled twin of this module,
:mod:`jwins.kernels.range_coder`; ``tests/property/test_symbols.py`` compares the two.

The coder is that of LZMA, with carries written back: G. N. N. Martin, "Range encoding: an algorithm for
removing redundancy from a digitised message", 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jwins.errors import CodecError
from jwins.kernels import range_coder

_MAX_UNCOMPILED = 100  # symbols that this module codes itself, in about a millisecond
_QUARTERS = (65536, 55109, 46341, 38968)  # 2^16 * 2^(-i/4)
_MAX_QUARTERS = 43  # 2^16 * 2^(-43/4) is 38

# Probabilities are of 2^16; none is nearer to 0 or 1 than _MIN_P, and none begins above _MAX_P.
_HALF, _MIN_P, _MAX_P = 1 << 15, 32, 45875
_START = 4  # a context with a prior probability begins as if it had made 4 decisions
_SLOWEST = 160  # a probability is an average over about the last 160 decisions at most
_MIN_WIDTH = 1 << 24
_MAX_PAST_END = 4  # zero bytes that an encoder leaves out at the end

_BLOCK = 16
_SPARSE = (1 << 12) // 32  # a mean magnitude below which blocks of zeros are skipped
_NEAR, _BANDS, _ABOVE, _LATE_NEAR = 12, 16, 4, 4  # contexts
_UNARY = 14  # larger magnitudes have an exponent and digits
_MAX_EXPONENT = 30
_EQUAL, _MIN_WEIGHT = 32, 4  # of 64


def encode_symbols(symbols: npt.NDArray[np.int32], runs: Sequence[int]) -> bytes:
    """Encode symbols (k,); ``runs`` are the lengths of their subbands, which sum to k."""
    share = int(np.count_nonzero(symbols)) * _QUARTERS[0] // max(1, len(symbols))
    quarters = next((t for t in range(_MAX_QUARTERS) if _first(t) <= share), _MAX_QUARTERS)
    if len(symbols) <= _MAX_UNCOMPILED:
        encoder = _Encoder()
        _code(encoder, symbols.tolist(), runs, _first(quarters))
        return bytes([quarters]) + encoder.finished()
    room = 2 * len(symbols) + (1 << 14)  # memory that is not written to is not taken
    while True:
        data = np.empty(room, dtype=np.uint8)
        lengths = np.array(runs, dtype=np.int64)
        size = range_coder.encode(np.ascontiguousarray(symbols), lengths, _first(quarters), data)
        if size != range_coder.FULL:
            return bytes([quarters]) + data[:size].tobytes()
        room *= 2


def decode_symbols(data: memoryview, *, count: int, runs: Sequence[int]) -> npt.NDArray[np.int32]:
    """Decode (count,) int32 symbols.

    Args:
        data: any bytes.
        count: expected number of symbols; memory is allocated for this number only.
        runs: lengths of their subbands, which sum to ``count``.

    Raises:
        CodecError: no encoder writes these bytes.
    """
    if not len(data) or data[0] > _MAX_QUARTERS:
        raise CodecError("symbols begin with an unknown share of zeros")
    first, coded = _first(data[0]), data[1:]
    if count <= _MAX_UNCOMPILED:
        decoder, few = _Decoder(bytes(coded)), [0] * count
        fit = _code(decoder, few, runs, first)
        looked_at = decoder.at
    else:
        symbols = np.zeros(count, dtype=np.int32)
        looked_at = range_coder.decode(
            symbols, np.array(runs, dtype=np.int64), first, np.frombuffer(bytearray(coded), dtype=np.uint8)
        )
        fit = looked_at != range_coder.FAILED
    if not fit:
        raise CodecError("symbols of more than 32 bits")
    if looked_at > len(coded) + _MAX_PAST_END:
        raise CodecError(f"symbols are cut off after {len(coded)} bytes")
    if looked_at < len(coded):
        raise CodecError(f"{len(coded) - looked_at} bytes left over after the symbols")
    if len(coded) and not coded[-1] and looked_at < len(coded) + _MAX_PAST_END:
        raise CodecError("symbols end in a byte 0, which an encoder leaves out")
    return np.array(few, dtype=np.int32) if count <= _MAX_UNCOMPILED else symbols


def _first(quarters: int) -> int:
    """Return ``2^16 * 2^(-quarters / 4)``, the prior probability of a nonzero symbol."""
    return _QUARTERS[quarters % 4] >> quarters // 4


class _Coder(Protocol):
    def put(self, p: int, bit: bool) -> bool:
        """Code a decision with probability ``p / 2^16`` of True; a decoder ignores ``bit``."""
        ...

    def goes_on(self) -> bool:
        """Return False if a decoder is far beyond the end of its bytes."""
        ...


def _code(coder: _Coder, symbols: list[int], runs: Sequence[int], first: int) -> bool:
    """Code all symbols in order.

    Args:
        coder: an encoder or a decoder.
        symbols: the symbols to encode, or zeros that a decoder replaces.
        runs: lengths of the subbands.
        first: prior probability of a nonzero symbol, of 2^16.

    Returns:
        Whether all symbols fit in 32 bits; a decoder stops at the first that does not.
    """
    contexts, density, start = _Contexts(coder, first), 0, 0
    for b, length in enumerate(runs):
        own, parents, shift = symbols[start : start + length], [], 0
        if b == 1 or (b > 1 and runs[b - 1] < length):
            parents, shift = symbols[start - runs[b - 1] : start], min(b - 1, 1)
        band, left, left2 = min(b, _BANDS - 1), 0, 0
        for begin in range(0, length, _BLOCK):
            if not coder.goes_on():
                return True
            end = min(begin + _BLOCK, length)
            waiting = False  # whether the block is known to have a nonzero symbol that has not come yet
            if density < _SPARSE:
                above = min(sum(p != 0 for p in parents[begin >> shift : (end - 1 >> shift) + 1]), _ABOVE - 1)
                waiting = contexts.block(density, band, above, left + left2 > 0, any(own[begin:end]))
                if not waiting:
                    density -= density * 13 >> 5
                    left = left2 = 0
                    continue
            for i in range(begin, end):
                k = i >> shift
                near = 2 * left + left2 + 2 * abs(_at(parents, k))
                if k < len(parents):
                    near += abs(_at(parents, k - 1)) + abs(_at(parents, k + 1))
                near = min(near, _NEAR - 1)
                if not waiting:
                    there = contexts.flag(density, band, near, own[i] != 0)
                else:
                    there = i == end - 1 or contexts.late(end - 1 - i, near, own[i] != 0)
                magnitude = 0
                if there:
                    waiting = False
                    signs = _sign(_at(own, i - 1)), _sign(_at(own, i - 2)), _sign(_at(parents, k))
                    negative = contexts.negative(band, signs, own[i] < 0)
                    magnitude = contexts.magnitude(density, near, abs(own[i]))
                    if magnitude > (1 << 31) - 1 + negative:
                        return False
                    own[i] = symbols[start + i] = -magnitude if negative else magnitude
                density += (min(magnitude, 2) << 12) - density >> 5
                left2, left = left, min(magnitude, _NEAR)
        start += length
    return True


def _at(symbols: list[int], i: int) -> int:
    """Return a symbol, or 0 outside of the list."""
    return symbols[i] if 0 <= i < len(symbols) else 0


def _sign(symbol: int) -> int:
    return 0 if symbol == 0 else 1 if symbol > 0 else 2


class _Contexts:
    """Adaptive probabilities of decisions, by kind and context."""

    def __init__(self, coder: _Coder, first: int) -> None:
        self._coder, self._first = coder, first
        self._states: dict[tuple[str | int, ...], list[int]] = {}  # probability, and number of decisions
        self._weights: dict[tuple[int, int], int] = {}

    def block(self, density: int, band: int, above: int, beside: bool, bit: bool) -> bool:
        """Code whether the block has a nonzero symbol."""
        a = self._state(_HALF, 0, "block", _class(density), above)
        b = self._state(_HALF, 0, "block by band", band, above, beside)
        return self._decide(a[0] + b[0] >> 1, bit, a, b)

    def flag(self, density: int, band: int, near: int, bit: bool) -> bool:
        """Code whether the symbol is nonzero."""
        a = self._state((38 << _class(density)) * (3 + near) // 3, _START, "flag", _class(density), near)
        b = self._state(self._first * (3 + near) // 3, _START, "flag by band", band, near)
        return self._decide(a[0] + b[0] >> 1, bit, a, b)

    def late(self, rest: int, near: int, bit: bool) -> bool:
        """Code whether the symbol is nonzero, if it or one of the ``rest`` later ones in its block is."""
        near = min(near, _LATE_NEAR - 1)
        a = self._state((1 << 16) * (3 + near) // (3 * rest + 3), _START, "late", rest, near)
        return self._decide(a[0], bit, a)

    def negative(self, band: int, signs: tuple[int, int, int], bit: bool) -> bool:
        """Code whether the symbol is negative; ``signs``: of the two before and the parent."""
        a = self._state(_HALF, 0, "sign", band, *signs)
        return self._decide(a[0], bit, a)

    def magnitude(self, density: int, near: int, known: int) -> int:
        """Code a magnitude of at least 1, and return it; an encoder passes it as ``known``."""
        for magnitude in range(1, _UNARY + 1):
            later = min(magnitude - 1, 1)
            a = self._state(_HALF >> 1, 0, "larger", near, later)
            b = self._state(_HALF >> 1, 0, "larger by density", _class(density), later)
            weight, p, q = self._weights.get((near, later), _EQUAL), a[0], b[0]
            more = self._decide(weight * p + (2 * _EQUAL - weight) * q >> 6, known > magnitude, a, b)
            if p != q:
                weight += 1 if (p > q) == more else -1
                self._weights[near, later] = min(max(weight, _MIN_WEIGHT), 2 * _EQUAL - _MIN_WEIGHT)
            if not more:
                return magnitude
        rest, exponent = known - _UNARY, 0
        while exponent < _MAX_EXPONENT:
            a = self._state(_HALF, 0, "exponent", exponent)
            if not self._decide(a[0], rest >> exponent + 1 != 0, a):
                break
            exponent += 1
        found = 1
        for digit in range(exponent - 1, -1, -1):
            found = found << 1 | self._coder.put(_HALF, bool(rest >> digit & 1))
        return found + _UNARY

    def _state(self, p: int, count: int, *context: str | int) -> list[int]:
        """Return the state of a context, initially ``p`` and ``count``."""
        return self._states.setdefault(context, [min(p, _MAX_P), count])

    def _decide(self, p: int, bit: bool, *states: list[int]) -> bool:
        """Code a decision, and move the probabilities of its contexts towards it; each step is smaller."""
        bit = self._coder.put(p, bit)
        for state in states:
            p, count = state
            p += ((bit << 16) - p) * ((1 << 16) // (count + 4)) >> 16
            state[:] = min(max(p, _MIN_P), (1 << 16) - _MIN_P), min(count + 1, _SLOWEST)
        return bit


def _class(density: int) -> int:
    return (density >> 3).bit_length()


class _Encoder:
    """Range encoder: narrows a range of numbers below 2^32, and writes the leading byte of a narrow range."""

    def __init__(self) -> None:
        self._low, self._width, self._data = 0, 1 << 32, bytearray()

    def put(self, p: int, bit: bool) -> bool:
        """See :class:`_Coder`."""
        bound = (self._width >> 16) * p
        if bit:
            self._width = bound
        else:
            self._low += bound
            self._width -= bound
        self._carry()
        while self._width < _MIN_WIDTH:
            self._data.append(self._low >> 24)
            self._low = self._low << 8 & (1 << 32) - 1
            self._width <<= 8
        return bit

    def goes_on(self) -> bool:
        """See :class:`_Coder`."""
        return True

    def finished(self) -> bytes:
        """Return all bytes. They end with the number in the range that has the most zero bits at its end.

        Zero bytes at its end are left out.
        """
        zeros, last = 32, self._low + self._width - 1
        while last >> zeros << zeros < self._low:
            zeros -= 1
        self._low = last >> zeros << zeros
        self._carry()
        return bytes(self._data) + self._low.to_bytes(4, "big").rstrip(b"\0")

    def _carry(self) -> None:
        at = len(self._data)
        while self._low >> 32:
            at -= 1
            self._data[at] = self._data[at] + 1 & 255
            if self._data[at]:
                self._low &= (1 << 32) - 1


class _Decoder:
    """Range decoder: keeps the difference between the coded number and the lower end of the range."""

    def __init__(self, data: bytes) -> None:
        self._data, self._width = data, 1 << 32
        self._above, self.at = int.from_bytes((data + bytes(4))[:4], "big"), 4

    def put(self, p: int, bit: bool) -> bool:
        """See :class:`_Coder`."""
        bound = (self._width >> 16) * p
        bit = self._above < bound
        if bit:
            self._width = bound
        else:
            self._above -= bound
            self._width -= bound
        while self._width < _MIN_WIDTH:
            byte = self._data[self.at] if self.at < len(self._data) else 0
            self._above = self._above << 8 | byte
            self._width <<= 8
            self.at += 1
        return bit

    def goes_on(self) -> bool:
        """See :class:`_Coder`."""
        return self.at <= len(self._data) + _MAX_PAST_END
