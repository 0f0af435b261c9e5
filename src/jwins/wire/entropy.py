"""Integer levels, most of them 0, in little more bits than their entropy: an ANS coder of binary decisions.

A level is taken apart into decisions. Is it 0? Which sign? Is its magnitude 2 or more, 4 or more, ...? Then the
binary digits below the first, from the top. All decisions of one kind (a *node*) are coded together, run by
run, with a probability that the encoder found by counting and that travels with them: one for all runs, or one
for each. Eight decisions are one symbol of the coder, so a vector of zeros takes an eighth of a symbol per level.

Probabilities are odds of 2^(t/4) for a whole number t, and tables of frequencies are computed from them in
exact integers, so every machine makes the same bytes. The coder is that of ``constriction``
(https://bamler-lab.github.io/constriction): R. Bamler, "Understanding Entropy Coding With Asymmetric Numeral
Systems (ANS): a Statistician's Perspective", arXiv 2201.01741, 2022. It ends in the state that the encoder
started from; bytes that do not lead there are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import constriction
import numpy as np
import numpy.typing as npt

from jwins.errors import CodecError

__all__ = ["decode_levels", "encode_levels"]

Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

_PRECISION = 24  # constriction's: frequencies sum to 2**24
_ODDS = 64  # t is -64 to 63: odds of 2^-16 to 2^15.75
_QUARTERS = (65536, 77936, 92682, 110218)  # 2^16 * 2^(i/4)
_GROUP = 8  # decisions per symbol
_MODELLED_DIGITS = 3  # below the first; further ones are 0 or 1 with even odds
_HALF, _ONE, _EACH = range(3)  # probabilities of a node: even odds, one for all runs, one for each


def encode_levels(levels: npt.NDArray[np.int32], runs: Sequence[int]) -> bytes:
    """(k,) int32 in runs whose lengths sum to k, as bytes; none for no levels."""
    if not len(levels):
        return b""
    writer = _Writer()
    magnitudes = np.abs(levels.astype(np.int64))
    top = int(magnitudes.max()).bit_length()
    run_of = np.repeat(np.arange(len(runs)), runs)
    _code(writer, len(runs), run_of, top, magnitudes, levels < 0)
    return bytes([top]) + writer.data()


def decode_levels(data: memoryview, *, count: int, runs: Sequence[int]) -> npt.NDArray[np.int32]:
    """(count,) int32, or CodecError.

    Args:
        data: any bytes.
        count: how many levels are expected; memory is taken for so many.
        runs: lengths of their runs, which sum to ``count``.
    """
    if count == 0:
        if len(data):
            raise CodecError(f"{len(data)} bytes for no levels")
        return np.empty(0, dtype=np.int32)
    if not len(data) or data[0] > 32:
        raise CodecError("levels without their number of binary digits, at most 32")
    reader = _Reader(data[1:])
    run_of = np.repeat(np.arange(len(runs)), runs)
    magnitudes, negative = _code(reader, len(runs), run_of, data[0], np.zeros(count, np.int64), None)
    reader.finish()
    np.negative(magnitudes, out=magnitudes, where=negative)
    if len(magnitudes) and not -(2**31) <= int(magnitudes.min()) <= int(magnitudes.max()) < 2**31:
        raise CodecError("levels of more than 32 bits")
    return magnitudes.astype(np.int32)


def _code(
    coder: _Coder,
    num_runs: int,
    run_of: npt.NDArray[np.int64],
    top: int,
    magnitudes: npt.NDArray[np.int64],
    negative: Flags | None,
) -> tuple[npt.NDArray[np.int64], Flags]:
    """The decisions in their order, for a writer that knows the levels and a reader that finds them out.

    A reader starts from magnitudes of 0 and ``negative`` None.
    """
    known = negative is not None
    signs = np.zeros(len(magnitudes), dtype=np.bool_) if negative is None else negative
    where = np.arange(len(magnitudes))
    for digits in range(top):  # is the magnitude 2**digits or more?
        more = coder.node(magnitudes[where] >= 1 << digits if known else None, run_of[where], num_runs)
        exactly, where = where[~more], where[more]
        if digits:
            _digits(coder, digits - 1, exactly, magnitudes, run_of, num_runs, known)
        else:
            signs[where] = coder.node(signs[where] if known else None, run_of[where], num_runs)
        if not known:
            magnitudes[where] = 1 << digits
    if top:
        _digits(coder, top - 1, where, magnitudes, run_of, num_runs, known)
    return magnitudes, signs


def _digits(
    coder: _Coder,
    digits: int,
    where: npt.NDArray[np.int64],
    magnitudes: npt.NDArray[np.int64],
    run_of: npt.NDArray[np.int64],
    num_runs: int,
    known: bool,
) -> None:
    """The ``digits`` binary digits below the first, of the magnitudes ``where``."""
    for below in range(digits - 1, -1, -1):
        flags = (magnitudes[where] >> below & 1).astype(np.bool_) if known else None
        modelled = below >= digits - _MODELLED_DIGITS
        found = coder.node(flags, run_of[where], num_runs, modelled)
        if not known:
            magnitudes[where] |= found.astype(np.int64) << below


class _Coder(Protocol):
    def node(self, flags: Flags | None, run_of: Counts, num_runs: int, modelled: bool = True) -> Flags: ...


class _Writer:
    """Notes what is to be coded, in the order of reading; a stack is filled from the other end."""

    def __init__(self) -> None:
        self._steps: list[tuple[npt.NDArray[np.int32] | int, Any]] = []

    def node(self, flags: Flags | None, run_of: Counts, num_runs: int, modelled: bool = True) -> Flags:
        assert flags is not None
        if not len(flags):
            return flags
        if not modelled:
            self._flags(flags, 0)
            return flags
        totals = np.bincount(run_of, minlength=num_runs)
        ones = np.bincount(run_of[flags], minlength=num_runs)
        kind, odds = _chosen(ones, totals)
        self._steps.append((kind, _uniform(3)))
        if kind == _HALF:
            self._flags(flags, 0)
        elif kind == _ONE:
            self._steps.append((odds[0] + _ODDS, _uniform(2 * _ODDS)))
            self._flags(flags, odds[0])
        else:
            low, high = min(odds), max(odds)
            self._steps.append((low + _ODDS, _uniform(2 * _ODDS)))
            self._steps.append((high + _ODDS, _uniform(2 * _ODDS)))
            if high > low:
                self._steps.append((np.array(odds, dtype=np.int32) - low, _uniform(high - low + 1)))
            for t, slices in _by_odds(odds, totals):
                self._flags(np.concatenate([flags[part] for part in slices]), t)
        return flags

    def _flags(self, flags: Flags, odds: int) -> None:
        whole = len(flags) // _GROUP * _GROUP
        if whole:
            self._steps.append((np.packbits(flags[:whole]).astype(np.int32), _table(odds, _GROUP)))
        if whole < len(flags):
            rest = flags[whole:]
            self._steps.append((int(np.packbits(rest)[0]) >> _GROUP - len(rest), _table(odds, len(rest))))

    def data(self) -> bytes:
        coder = constriction.stream.stack.AnsCoder()
        for symbols, model in reversed(self._steps):
            coder.encode_reverse(symbols, model)
        words: bytes = coder.get_compressed().astype("<u4").tobytes()
        return words.rstrip(b"\0")


class _Reader:
    """Reads what a :class:`_Writer` wrote."""

    def __init__(self, data: memoryview) -> None:
        if len(data) and not data[-1]:
            raise CodecError("levels end in a byte 0, which no encoder writes")
        words = np.frombuffer(bytes(data) + bytes(-len(data) % 4), dtype="<u4").astype(np.uint32)
        self._coder = constriction.stream.stack.AnsCoder(words)

    def node(self, flags: Flags | None, run_of: Counts, num_runs: int, modelled: bool = True) -> Flags:
        count = len(run_of)
        if not count:
            return np.zeros(0, dtype=np.bool_)
        kind = self._coder.decode(_uniform(3)) if modelled else _HALF
        if kind == _HALF:
            return self._flags(count, 0)
        low = self._coder.decode(_uniform(2 * _ODDS)) - _ODDS
        if kind == _ONE:
            return self._flags(count, low)
        high = self._coder.decode(_uniform(2 * _ODDS)) - _ODDS
        if high < low:
            raise CodecError("odds of levels: expected the smaller first")
        totals = np.bincount(run_of, minlength=num_runs)
        told = int(np.count_nonzero(totals))
        odds = [low] * told
        if high > low:
            odds = (self._coder.decode(_uniform(high - low + 1), told) + low).tolist()
        found = np.empty(count, dtype=np.bool_)
        for t, slices in _by_odds(odds, totals):
            flags = self._flags(sum(part.stop - part.start for part in slices), t)
            start = 0
            for part in slices:
                end = start + part.stop - part.start
                found[part] = flags[start:end]
                start = end
        return found

    def _flags(self, count: int, odds: int) -> Flags:
        whole, rest = divmod(count, _GROUP)
        found = np.empty(count, dtype=np.bool_)
        if whole:
            symbols = self._coder.decode(_table(odds, _GROUP), whole)
            found[: whole * _GROUP] = np.unpackbits(symbols.astype(np.uint8)).view(np.bool_)
        if rest:
            symbol = self._coder.decode(_table(odds, rest)) << _GROUP - rest
            found[whole * _GROUP :] = np.unpackbits(np.array([symbol], dtype=np.uint8))[:rest].view(np.bool_)
        return found

    def finish(self) -> None:
        if not self._coder.is_empty():
            raise CodecError("levels: bytes are left, or some are missing")


def _by_odds(odds: Sequence[int], totals: Counts) -> list[tuple[int, list[slice]]]:
    """Slices of the decisions of the runs that have any, with the same odds together."""
    ends = np.cumsum(totals)
    there = np.flatnonzero(totals)
    slices: dict[int, list[slice]] = {}
    for t, start, end in zip(odds, (ends - totals)[there].tolist(), ends[there].tolist(), strict=True):
        slices.setdefault(t, []).append(slice(start, end))
    return sorted(slices.items())


def _chosen(ones: Counts, totals: Counts) -> tuple[int, list[int]]:
    """The probabilities that take the fewest bits, those that tell them included."""
    of_one, of_zero = _lengths()
    pooled = int(ones.sum()) * of_one + int(totals.sum() - ones.sum()) * of_zero
    costs = {_HALF: _UNIT * int(totals.sum()), _ONE: int(pooled.min()) + 7 * _UNIT}
    choices = {_HALF: [0], _ONE: [int(pooled.argmin()) - _ODDS]}
    there = np.flatnonzero(totals)
    if 1 < len(there) <= _MOST_EACH:
        ones, zeros = ones[there], (totals - ones)[there]
        each = ones[:, None] * of_one + zeros[:, None] * of_zero
        best = each.argmin(axis=1)
        spread = int(best.max() - best.min()) + 1
        told = 14 * _UNIT + len(there) * _log2(spread)
        costs[_EACH] = int(each.min(axis=1).sum()) + told
        choices[_EACH] = (best - _ODDS).tolist()
    kind = min(costs, key=lambda k: (costs[k], k))
    return kind, choices[kind]


_UNIT = 256
_MOST_EACH = 1024


def _log2(number: int) -> int:
    """The logarithm in units of 1/256, rounded down, in integers."""
    return int((number**_UNIT).bit_length()) - 1


@lru_cache(maxsize=1)
def _lengths() -> tuple[Counts, Counts]:
    """Bits, in units of 1/256, that a decision takes for each of the odds if it is true, and if it is false."""
    true, false = [], []
    for t in range(-_ODDS, _ODDS):
        for_, against = _odds(t)
        true.append(_log2(for_ + against) - _log2(for_))
        false.append(_log2(for_ + against) - _log2(against))
    return np.array(true), np.array(false)


def _odds(t: int) -> tuple[int, int]:
    """2^(t/4) as a ratio of whole numbers."""
    whole, quarter = divmod(abs(t), 4)
    ratio = _QUARTERS[quarter] << whole, 1 << 16
    return ratio if t >= 0 else ratio[::-1]


@lru_cache(maxsize=2 * _ODDS * _GROUP)
def _table(t: int, width: int) -> Any:
    """The model of ``width`` decisions with odds 2^(t/4), the first being the most significant bit."""
    for_, against = _odds(t)
    ones = np.array([i.bit_count() for i in range(1 << width)])
    weights = [for_**k * against ** (width - k) for k in range(width + 1)]
    return _model([weights[k] for k in ones.tolist()])


@lru_cache(maxsize=2 * _ODDS)
def _uniform(size: int) -> Any:
    return _model([1] * size)


def _model(weights: Sequence[int]) -> Any:
    """The model of constriction for symbols with these weights.

    It gives each symbol 1 of 2^24, divides the rest in proportion to floating-point weights, and rounds down
    what all symbols before one have got. Weights that are whole numbers and sum to that rest are divided without
    any rounding: sums and products are exact in float32.
    """
    free = (1 << _PRECISION) - len(weights)
    total = sum(weights)
    shares = [weight * free // total for weight in weights]
    shares[shares.index(max(shares))] += free - sum(shares)
    return constriction.stream.model.Categorical(np.array(shares, dtype=np.float32), perfect=False, lazy=False)
