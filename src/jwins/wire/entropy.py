"""Integer levels, most of them 0, in little more bits than their entropy: an ANS coder of binary decisions.

A level is taken apart into decisions. Is it 0? Which sign? Is its magnitude 2 or more, 4 or more, ...? Then the
binary digits below the first, from the top. All decisions of one kind are coded together, run by run, with
probabilities that the encoder found by counting and that travel with them: one for all runs, one for each run,
or one for each of 2 to 64 equal parts of a run, as levels of like size are neighbours. Eight decisions are one
symbol of the coder, so a vector of zeros takes an eighth of a symbol per level.

Probabilities are odds of 2^(t/4) for a whole number t, and tables of frequencies are computed from them in
exact integers, so every machine makes the same bytes. The coder is that of ``constriction``
(https://bamler-lab.github.io/constriction): R. Bamler, "Understanding Entropy Coding With Asymmetric Numeral
Systems (ANS): a Statistician's Perspective", arXiv 2201.01741, 2022. It ends in the state that the encoder
started from; bytes that do not lead there are refused. All of it is part of the wire format (docs/wire.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import constriction
import numpy as np
import numpy.typing as npt

from jwins.errors import CodecError

__all__ = ["decode_levels", "encode_levels"]

Flags = npt.NDArray[np.bool_]
Where = npt.NDArray[np.signedinteger[Any]]  # positions among the levels, increasing
Counts = npt.NDArray[np.int64]

_PRECISION = 24  # constriction's: frequencies sum to 2**24
_ODDS = 64  # t is -64 to 63: odds of 2^-16 to 2^15.75
_QUARTERS = (65536, 77936, 92682, 110218)  # 2^16 * 2^(i/4)
_GROUP = 8  # decisions per symbol
_MODELLED_DIGITS = 3  # below the first; further ones are 0 or 1 with even odds
_MOST_DIGITS = 32

# Which odds decisions have: even ones, the same for all, or those of their part of a run, which is cut into
# 2**depth parts (_PARTS + depth). The weights of these ways make the usual ones short to tell.
_EVEN, _ONE, _PARTS = 0, 1, 2
_MOST_DEPTH = 6
_MOST_PARTS = 4096  # of all runs together
_FEW_RUNS = 32
_Weights = tuple[int, ...]
_KINDS_OF_ZEROS: _Weights = (1, 2, 10, 1, 3, 8, 4, 2, 1)  # is it 0?
_KINDS_OF_SIGNS: _Weights = (20, 3, 4, 1, 1, 1, 1, 1, 1)
_KINDS_OF_DIGITS: _Weights = (3, 9, 9, 1, 2, 4, 2, 1, 1)
_DIGITS = tuple(1 << max(18 - number, 0) for number in range(_MOST_DIGITS + 1))
_TRIED_DEPTHS = (0, 2, 3, 4, 5)
_UNITS = (1, 2, 4)  # t is a multiple of one of these: few decisions need no fine odds
_FEW = 8  # fewer decisions of a kind have even odds
_FEW_OF_PART = 8  # a part with fewer decisions has the odds of the part before
_FEW_OF_ONE = 256  # odds of fewer decisions are told in the largest unit
_RATES = (8, 4, 2, 1)  # differences d of t, in units, have weights 2^(-|d| rate / 4)
_BLOCK = 1 << 16  # of more levels than this, intermediate arrays are not held whole
_BITS = 4096  # costs are in units of 1/4096 bit


def encode_levels(levels: npt.NDArray[np.int32], runs: Sequence[int], word: int) -> bytes:
    """Levels and a word as bytes.

    Args:
        levels: (k,) int32.
        runs: lengths of their runs, which sum to k.
        word: 1 to 2**32 - 1, which the coder starts from. It starts from something in any case, so this takes
            a byte or two, not four.
    """
    writer = _Writer(runs)
    if len(levels):
        negative = levels < 0
        magnitudes = levels.astype(np.uint32)
        np.negative(magnitudes, out=magnitudes, where=negative)
        digits = int(magnitudes.max()).bit_length()
        writer.digits(digits)
        _code(writer, digits, magnitudes, negative)
    return writer.data(word)


def decode_levels(data: memoryview, *, count: int, runs: Sequence[int]) -> tuple[npt.NDArray[np.int32], int]:
    """(count,) int32 and the word, or CodecError.

    Args:
        data: any bytes.
        count: how many levels are expected; memory is taken for so many.
        runs: lengths of their runs, which sum to ``count``.
    """
    reader = _Reader(data, runs)
    magnitudes = np.zeros(count, dtype=np.uint32)
    negative = np.zeros(count, dtype=np.bool_)
    digits = reader.digits() if count else 0
    _code(reader, digits, magnitudes, negative)
    word = reader.word()
    if digits == _MOST_DIGITS and bool((magnitudes - negative > 2**31 - 1).any()):
        raise CodecError("levels of more than 32 bits")
    np.negative(magnitudes, out=magnitudes, where=negative)
    return magnitudes.view(np.int32), word


def _code(coder: _Coder, digits: int, magnitudes: npt.NDArray[np.uint32], negative: Flags) -> None:
    """All decisions in their order; a reader fills in what it finds.

    Args:
        coder: a writer, which knows the levels, or a reader, to which they are 0 so far.
        digits: how many binary digits the largest magnitude has.
        magnitudes: (k,) of the levels.
        negative: (k,) whether they are below 0.
    """
    if not digits:
        return
    where = _true(coder.decide(partial(np.greater, magnitudes, 0), len(magnitudes), None, _KINDS_OF_ZEROS))
    negative[where] = coder.decide(partial(np.take, negative, where), len(where), where, _KINDS_OF_SIGNS)
    if coder.reads:
        magnitudes[where] = 1
    for number in range(1, digits):  # which of those with ``number`` digits or more have more?
        more = coder.decide(
            partial(_at_least, magnitudes, where, 1 << number), len(where), where, _KINDS_OF_DIGITS
        )
        _code_digits(coder, number - 1, magnitudes, where[~more])
        where = where[more]
        if coder.reads:
            magnitudes[where] = 1 << number
    _code_digits(coder, digits - 1, magnitudes, where)


def _code_digits(coder: _Coder, digits: int, magnitudes: npt.NDArray[np.uint32], where: Where) -> None:
    """The ``digits`` binary digits below the first, of the magnitudes ``where``."""
    for place in reversed(range(digits)):
        kinds = _KINDS_OF_DIGITS if place >= digits - _MODELLED_DIGITS else None
        ones = coder.decide(partial(_digit, magnitudes, where, place), len(where), where, kinds)
        if coder.reads:
            for start in range(0, len(where), _BLOCK):
                block = slice(start, start + _BLOCK)
                magnitudes[where[block][ones[block]]] |= np.uint32(1 << place)


def _at_least(magnitudes: npt.NDArray[np.uint32], where: Where, least: int) -> Flags:
    found: Flags = magnitudes[where] >= least
    return found


def _digit(magnitudes: npt.NDArray[np.uint32], where: Where, place: int) -> Flags:
    return (magnitudes[where] >> place & 1).astype(np.bool_)


def _true(flags: Flags) -> Where:
    """Where the flags are true, in memory of few bytes per flag."""
    if len(flags) < _BLOCK:
        return np.flatnonzero(flags)
    found: Where = np.empty(np.count_nonzero(flags), dtype=np.int32 if len(flags) < 1 << 31 else np.int64)
    end = 0
    for start in range(0, len(flags), _BLOCK):
        block = np.flatnonzero(flags[start : start + _BLOCK])
        found[end : end + len(block)] = block + start
        end += len(block)
    return found


# --- Decisions of one kind --------------------------------------------------------------------------------


class _Coder(Protocol):
    reads: bool

    def decide(
        self, known: Callable[[], Flags], count: int, where: Where | None, kinds: _Weights | None
    ) -> Flags:
        """Codes decisions, and returns them.

        Args:
            known: gives a writer the decisions, in order.
            count: how many they are, n.
            where: (n,) of which levels they are, increasing; None for all.
            kinds: how probable each way to tell their odds is; None if these are even and nothing is told.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Choice:
    """The odds of one kind of decision: ``odds`` are one for all, or one for each part that has any."""

    cost: int
    kind: int
    odds: list[int]
    unit: int = 0
    rate: int = 0


class _Parts:
    """Runs, and the equal parts that they may be cut into.

    How many of some levels are in parts of any size is told by how many there are before the bounds of the
    smallest ones: ``before``, of which :meth:`at` gives those of larger parts.
    """

    def __init__(self, runs: Sequence[int]) -> None:
        self.depth = _MOST_DEPTH  # -1: runs are so many that they have no odds of their own
        while self.depth >= 0 and len(runs) << self.depth > _MOST_PARTS:
            self.depth -= 1
        lengths = np.array(runs, dtype=np.int64)
        ends = np.cumsum(lengths)
        finest = max(self.depth, 0)
        parts = np.arange(1, (1 << finest) + 1)
        inside = -(-lengths[:, None] * parts >> finest)  # rounded up
        self._bounds = np.concatenate([[0], ((ends - lengths)[:, None] + inside).reshape(-1)])
        self.tried = [depth for depth in _TRIED_DEPTHS if depth <= self.depth]
        steps = [1 << self.depth - depth for depth in self.tried]
        last = len(self._bounds) - 1
        # Of the parts of all depths that are tried, one depth behind the other: where among the smallest
        # they begin, and where they end; and for each depth, where its parts begin in this list.
        self.steps = np.array(steps, dtype=np.int64)
        self.begins = np.concatenate(
            [np.arange(0, last, step) for step in steps] or [np.empty(0, dtype=np.int64)]
        )
        self.ends = np.concatenate([np.arange(step, last + 1, step) for step in steps] or [self.begins])
        counts = [last // step for step in steps]
        self.firsts = np.cumsum([0, *counts[:-1]]) if counts else np.empty(0, dtype=np.int64)

    def before(self, where: Where | None) -> Counts:
        """How many of the levels ``where`` are before each bound of the smallest parts; None for all levels."""
        if where is None:
            return self._bounds
        found: Counts = np.searchsorted(where, self._bounds.astype(where.dtype))
        return found

    def at(self, depth: int, before: Counts) -> Counts:
        """The same of the parts of another depth."""
        return before[:: 1 << self.depth - depth]


def _parts_of(runs: Sequence[int]) -> _Parts:
    """Kept for the next time where runs are few, as those of wavelets: nobody may fill memory with them."""
    return _kept_parts(tuple(runs)) if len(runs) <= _FEW_RUNS else _Parts(runs)


@lru_cache(maxsize=16)
def _kept_parts(runs: tuple[int, ...]) -> _Parts:
    return _Parts(runs)


class _Writer:
    """Notes what is to be coded, in the order of reading; a stack is filled from the other end."""

    reads = False

    def __init__(self, runs: Sequence[int]) -> None:
        self._parts = _parts_of(runs)
        self._steps: list[tuple[npt.NDArray[np.int32] | int, Any]] = []

    def digits(self, number: int) -> None:
        self._steps.append((number, _symbols(_DIGITS)))

    def decide(
        self, known: Callable[[], Flags], count: int, where: Where | None, kinds: _Weights | None
    ) -> Flags:
        flags = known()
        if len(flags) < _FEW or kinds is None:
            self._flags(flags, 0)
            return flags
        totals = self._parts.before(where)
        ones = self._parts.before(_true(flags) if where is None else where[flags])
        choice = _chosen(ones, totals, self._parts, kinds)
        self._steps.append((choice.kind, _symbols(kinds)))
        if choice.kind == _EVEN:
            self._flags(flags, 0)
        elif choice.kind == _ONE:
            unit = _unit_of_one(len(flags))
            self._steps.append(((choice.odds[0] + _ODDS) // unit, _uniform(2 * _ODDS // unit)))
            self._flags(flags, choice.odds[0])
        else:
            self._steps.append((choice.unit, _uniform(len(_UNITS))))
            self._steps.append((choice.rate, _uniform(len(_RATES))))
            self._steps.append((choice.odds[0] + _ODDS, _uniform(2 * _ODDS)))
            odds = np.array(choice.odds, dtype=np.int32)
            if len(odds) > 1:
                steps = np.diff(odds) // _UNITS[choice.unit] + 2 * _ODDS
                self._steps.append((steps, _differences(choice.rate)[0]))
            before = self._parts.at(choice.kind - _PARTS, totals)
            for t, slices in _by_odds(odds, before[_told(before)], len(flags)):
                self._flags(np.concatenate([flags[part] for part in slices]), t)
        return flags

    def _flags(self, flags: Flags, odds: int) -> None:
        whole = len(flags) // _GROUP * _GROUP
        if whole:
            self._steps.append((np.packbits(flags[:whole]).astype(np.int32), _table(odds, _GROUP)))
        if whole < len(flags):
            rest = flags[whole:]
            self._steps.append((int(np.packbits(rest)[0]) >> _GROUP - len(rest), _table(odds, len(rest))))

    def data(self, word: int) -> bytes:
        coder = constriction.stream.stack.AnsCoder(np.array([word], dtype=np.uint32))
        for symbols, model in reversed(self._steps):
            coder.encode_reverse(symbols, model)
        words: bytes = coder.get_compressed().astype("<u4").tobytes()
        return words.rstrip(b"\0")


class _Reader:
    """Reads what a :class:`_Writer` wrote."""

    reads = True

    def __init__(self, data: memoryview, runs: Sequence[int]) -> None:
        self._parts = _parts_of(runs)
        if len(data) and not data[-1]:
            raise CodecError("levels end in a byte 0, which no encoder writes")
        words = np.frombuffer(bytes(data) + bytes(-len(data) % 4), dtype="<u4").astype(np.uint32)
        self._coder = constriction.stream.stack.AnsCoder(words)

    def _decode(self, model: Any, *count: int) -> Any:
        """One symbol, or so many as an array."""
        try:
            return self._coder.decode(model, *count)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a Rust panic arrives as a BaseException that is no Exception
            raise CodecError(f"no levels: {error}") from None

    def digits(self) -> int:
        return int(self._decode(_symbols(_DIGITS)))

    def decide(
        self, known: Callable[[], Flags], count: int, where: Where | None, kinds: _Weights | None
    ) -> Flags:
        kind = _EVEN if kinds is None or count < _FEW else self._decode(_symbols(kinds))
        if kind == _EVEN:
            return self._flags(count, 0)
        if kind == _ONE:
            unit = _unit_of_one(count)
            return self._flags(count, self._decode(_uniform(2 * _ODDS // unit)) * unit - _ODDS)
        if kind - _PARTS > self._parts.depth:
            raise CodecError(f"levels in parts of depth {kind - _PARTS}: expected at most {self._parts.depth}")
        before = self._parts.at(kind - _PARTS, self._parts.before(where))
        starts = before[_told(before)]
        unit = _UNITS[self._decode(_uniform(len(_UNITS)))]
        rate = self._decode(_uniform(len(_RATES)))
        odds = np.full(len(starts), self._decode(_uniform(2 * _ODDS)) - _ODDS)
        if len(odds) > 1:
            steps = self._decode(_differences(rate)[0], len(odds) - 1) - 2 * _ODDS
            odds[1:] += np.cumsum(steps.astype(np.int64)) * unit
        if int(odds.min()) < -_ODDS or int(odds.max()) >= _ODDS:
            raise CodecError("odds of levels: out of range")
        found = np.empty(count, dtype=np.bool_)
        for t, slices in _by_odds(odds, starts, count):
            read = self._flags(sum(part.stop - part.start for part in slices), t)
            start = 0
            for part in slices:
                end = start + part.stop - part.start
                found[part] = read[start:end]
                start = end
        return found

    def _flags(self, count: int, odds: int) -> Flags:
        whole, rest = divmod(count, _GROUP)
        found = np.empty(count, dtype=np.bool_)
        if whole:
            symbols = self._decode(_table(odds, _GROUP), whole)
            found[: whole * _GROUP] = np.unpackbits(symbols.astype(np.uint8)).view(np.bool_)
        if rest:
            symbol = self._decode(_table(odds, rest)) << _GROUP - rest
            found[whole * _GROUP :] = np.unpackbits(np.array([symbol], dtype=np.uint8))[:rest].view(np.bool_)
        return found

    def word(self) -> int:
        words = self._coder.get_compressed()
        if len(words) != 1:
            raise CodecError("levels: bytes are left, or some are missing")
        return int(words[0])


def _told(before: Counts) -> Where:
    """The first part with decisions, and all further ones with more than a few: those whose odds are told.

    Args:
        before: (p + 1,) how many decisions there are before each of p parts, and in all.
    """
    totals = before[1:] - before[:-1]
    enough = totals >= _FEW_OF_PART
    enough[(totals > 0).argmax()] = True
    return enough.nonzero()[0]


def _by_odds(odds: npt.NDArray[Any], starts: Counts, count: int) -> list[tuple[int, list[slice]]]:
    """Slices of ``count`` decisions, those with the same odds together; odds are of the parts that are told."""
    slices: dict[int, list[slice]] = {}
    ends = [*starts[1:].tolist(), count]
    for t, start, end in zip(odds.tolist(), starts.tolist(), ends, strict=True):
        slices.setdefault(t, []).append(slice(start, end))
    return sorted(slices.items())


def _unit_of_one(count: int) -> int:
    return _UNITS[-1] if count < _FEW_OF_ONE else _UNITS[0]


# --- What the encoder chooses -----------------------------------------------------------------------------


def _chosen(ones: Counts, totals: Counts, parts: _Parts, weights: _Weights) -> _Choice:
    """The odds that take the fewest bits, those that tell them included; counts are before each bound."""
    kinds = _lengths(weights)
    count = int(totals[-1])
    best = _Choice(count * _BITS + int(kinds[_EVEN]), _EVEN, [])
    unit = _unit_of_one(count)
    odds, costs = _fitting(ones[-1:], totals[-1:], unit)
    told = int(kinds[_ONE]) + (2 * _ODDS // unit - 1).bit_length() * _BITS
    if int(costs[0]) + told < best.cost:
        best = _Choice(int(costs[0]) + told, _ONE, odds.tolist())
    for choice in _by_parts(ones, totals, parts, kinds):
        if choice.cost < best.cost:
            best = choice
    return best


def _by_parts(ones: Counts, totals: Counts, parts: _Parts, kinds: Counts) -> list[_Choice]:
    """What odds for parts take, for each depth worth trying: all at once, as each has few parts."""
    if not parts.tried:
        return []
    count, begins, ends = int(totals[-1]), totals[parts.begins], totals[parts.ends]
    enough = ends - begins >= _FEW_OF_PART
    enough[parts.firsts + (totals[1:] > 0).argmax() // parts.steps] = True
    numbers = np.add.reduceat(enough, parts.firsts, dtype=np.int64).tolist()
    depths = 0
    while depths < len(numbers) and numbers[depths] > 1 and count >= 32 * numbers[depths]:
        depths += 1
    if not depths:
        return []
    firsts = np.cumsum([0, *numbers[: depths - 1]])
    told = enough.nonzero()[0][: sum(numbers[:depths])]
    totals_of, ones_of = (_until_next(n, parts.begins[told], firsts) for n in (totals, ones))
    rarer = np.add.reduceat(np.minimum(ones_of, totals_of - ones_of), firsts).tolist()
    units = [_unit_for(each // number) for each, number in zip(rarer, numbers, strict=False)]
    unit_of = np.repeat([_UNITS[unit] for unit in units], numbers[:depths])
    odds, costs = _fitting(ones_of, totals_of, unit_of)
    steps = np.abs(np.diff(odds, prepend=0)) // unit_of
    bits = _bits_of_differences()[:, steps]
    bits[:, firsts] = 0  # told outright
    by_rate = np.add.reduceat(bits, firsts, axis=1)
    rates = by_rate.argmin(axis=0)
    costs_of = np.add.reduceat(costs, firsts) + by_rate.min(axis=0)
    return [
        _Choice(
            int(costs_of[i] + kinds[_PARTS + parts.tried[i]]) + 11 * _BITS,  # log2(3 * 4 * 128) = 10.6
            _PARTS + parts.tried[i],
            odds[firsts[i] : firsts[i] + numbers[i]].tolist(),
            units[i],
            int(rates[i]),
        )
        for i in range(depths)
    ]


def _until_next(before: Counts, begins: Where, firsts: Where) -> Counts:
    """How many are between each of ``begins`` and the next, or the end if the next is of another depth."""
    at = before[begins]
    until = np.append(at[1:], before[-1])
    until[firsts[1:] - 1] = before[-1]
    return until - at


def _unit_for(rarer: int) -> int:
    """Index of the unit of the odds of parts in which the rarer outcome is that often."""
    return 0 if rarer >= 512 else 1 if rarer >= 64 else 2


def _fitting(ones: Counts, totals: Counts, unit: Counts | int) -> tuple[Counts, Counts]:
    """The odds of parts in which ``ones`` of ``totals`` decisions are true, and what these take then."""
    true, false, thresholds = _decisions()
    zeros = totals - ones
    ratio = (2 * ones + 1 << 20) // (2 * zeros + 1)
    t = thresholds.searchsorted(ratio, side="right")  # counted from the smallest odds
    t = np.minimum((2 * t + unit) // (2 * unit) * unit, 2 * _ODDS - unit)
    return t - _ODDS, ones * true[t] + zeros * false[t]


# --- Tables, in exact integers ----------------------------------------------------------------------------


def _power(quarters: int) -> int:
    """2^16 * 2^(quarters / 4), quarters >= 0."""
    return _QUARTERS[quarters % 4] << quarters // 4


def _odds(t: int) -> tuple[int, int]:
    """2^(t/4) as a ratio of whole numbers."""
    return (_power(t), 1 << 16) if t >= 0 else (1 << 16, _power(-t))


def _log2(number: int) -> int:
    """The logarithm in units of 1/4096, rounded down."""
    logarithm = number.bit_length() - 1
    mantissa = (number << 64) >> logarithm  # in [1, 2), with 64 bits behind the point
    for _ in range(_BITS.bit_length() - 1):
        mantissa = mantissa * mantissa >> 64
        logarithm = logarithm << 1 | mantissa >> 65
        mantissa >>= mantissa >> 65
    return logarithm


@lru_cache(maxsize=1)
def _decisions() -> tuple[Counts, Counts, Counts]:
    """For each t: bits that a decision takes if true, and if false; then the odds between t and t + 1.

    Bits are in units of 1/4096, odds in units of 2^-20.
    """
    true, false, between = [], [], []
    for t in range(-_ODDS, _ODDS):
        of_true, of_false = _odds(t)
        true.append(_log2(of_true + of_false) - _log2(of_true))
        false.append(_log2(of_true + of_false) - _log2(of_false))
        above, below = _odds(t + 1)
        between.append((of_true * below + above * of_false << 20) // (2 * of_false * below))
    return np.array(true), np.array(false), np.array(between[:-1])


@lru_cache(maxsize=2 * _ODDS * _GROUP)
def _table(t: int, width: int) -> Any:
    """The model of ``width`` decisions with odds 2^(t/4), the first being the most significant bit."""
    of_true, of_false = _odds(t)
    weights = [of_true**k * of_false ** (width - k) for k in range(width + 1)]
    return _model([weights[symbol.bit_count()] for symbol in range(1 << width)])


@lru_cache(maxsize=2 * _ODDS)
def _uniform(size: int) -> Any:
    return _model([1] * size)


@lru_cache(maxsize=4)
def _symbols(weights: tuple[int, ...]) -> Any:
    return _model(weights)


@lru_cache(maxsize=len(_RATES))
def _differences(rate: int) -> tuple[Any, Counts]:
    """The model of differences of t, plus 128; and the bits that differences of 0, 1, ... take."""
    weights = [(1 << 64) // _power(abs(d) * _RATES[rate]) for d in range(-2 * _ODDS, 2 * _ODDS + 1)]
    return _model(weights), _lengths(tuple(weights))[2 * _ODDS :]


@lru_cache(maxsize=1)
def _bits_of_differences() -> Counts:
    """By rate and difference, 0 to 128."""
    return np.stack([_differences(rate)[1] for rate in range(len(_RATES))])


@lru_cache(maxsize=3 + len(_RATES))
def _lengths(weights: tuple[int, ...]) -> Counts:
    """Bits, in units of 1/4096, that each symbol takes."""
    return np.array([_BITS * _PRECISION - _log2(share + 1) for share in _shares(weights)])


def _shares(weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights; what rounding leaves goes to the first of the largest."""
    free = (1 << _PRECISION) - len(weights)
    total = sum(weights)
    shares = [weight * free // total for weight in weights]
    shares[shares.index(max(shares))] += free - sum(shares)
    return shares


def _model(weights: Sequence[int]) -> Any:
    """The model of symbols with these weights.

    Given floating-point weights, ``constriction`` first gives each symbol 1 of 2^24, then divides the rest in
    proportion, rounding down what all symbols before one get. Weights that are whole numbers and sum to that
    rest are divided without any rounding: sums, and products with a scale of 1, are exact in float32.
    """
    shares = np.array(_shares(weights), dtype=np.float32)
    return constriction.stream.model.Categorical(shares, perfect=False, lazy=False)
