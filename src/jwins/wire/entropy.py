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
started from; bytes that do not lead there are refused. All of it is part of the wire format
(docs/reference/wire.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Protocol

import constriction
import numpy as np
import numpy.typing as npt

from jwins.errors import CodecError

__all__ = ["decode_symbols", "encode_symbols"]

Flags = npt.NDArray[np.bool_]
Where = npt.NDArray[np.signedinteger[Any]]  # positions among the levels, increasing
Counts = npt.NDArray[np.int64]
Magnitudes = npt.NDArray[np.uint32]
_Step = tuple[Any, Any]  # symbols, or one, and their model
_NONE: Counts = np.empty(0, dtype=np.int64)

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
_SHORT = 1 << 18  # fewer levels may take 8 bytes each where more take 4
_MOST_HELD = 1 << 20  # the odds of so many decisions are chosen at once
_BLOCK = 1 << 16  # of more levels than this, intermediate arrays are not held whole
_BITS = 4096  # costs are in units of 1/4096 bit


def encode_symbols(levels: npt.NDArray[np.int32], runs: Sequence[int], word: int) -> bytes:
    """Levels and a word as bytes.

    Args:
        levels: (k,) int32.
        runs: lengths of their runs, which sum to k.
        word: 1 to 2**32 - 1, which the coder starts from. It starts from something in any case, so this takes
            a byte or two, not four.
    """
    writer = _Writer(runs)
    if len(levels):
        digits = max(int(levels.max()), -int(levels.min())).bit_length()
        writer.digits(digits)
        for _ in _code(writer, digits, len(levels), levels):
            pass
    return writer.data(word)


def decode_symbols(data: memoryview, *, count: int, runs: Sequence[int]) -> tuple[npt.NDArray[np.int32], int]:
    """(count,) int32 and the word, or CodecError.

    Args:
        data: any bytes.
        count: how many levels are expected; memory is taken for so many.
        runs: lengths of their runs, which sum to ``count``.
    """
    reader = _Reader(data, runs)
    levels = np.zeros(count, dtype=np.int32)
    digits = reader.digits() if count else 0
    fit = True
    for where, magnitudes, negative in _code(reader, digits, count, None):
        for start in range(0, len(where), _BLOCK):
            block = slice(start, start + _BLOCK)
            signs = negative[block].astype(np.int32) * -2 + 1
            values = magnitudes[block].view(np.int32) * signs
            levels[where[block]] = values
            if digits == _MOST_DIGITS:
                fit = fit and bool(((values < 0) == negative[block]).all())
        del where, magnitudes, negative
    word = reader.word()
    if not fit:
        raise CodecError("levels of more than 32 bits")
    return levels, word


def _code(
    coder: _Coder, digits: int, count: int, levels: npt.NDArray[np.int32] | None
) -> Iterator[tuple[Where, Magnitudes, Flags]]:
    """All decisions in their order.

    Args:
        coder: a writer or a reader.
        digits: how many binary digits the largest magnitude has.
        count: k, how many levels there are.
        levels: (k,) for a writer; None for a reader.

    Yields:
        Where levels with one binary digit are, their magnitudes, and whether they are negative; then those
        with two, and so on.
    """
    if not digits:
        return
    everything, known = _Some(coder.parts, None, count), None if levels is None else levels != 0
    some = everything.true(coder.decide(known, everything, _KINDS_OF_ZEROS))
    del everything  # what is deleted here and below may be as long as the levels
    values = None if levels is None else levels[some.where]
    negative = coder.decide(None if values is None else values < 0, some, _KINDS_OF_SIGNS)
    magnitudes = None if values is None else np.abs(values).view(np.uint32)
    for number in range(1, digits):  # which of those with ``number`` digits or more have more?
        known = None if magnitudes is None else magnitudes >= 1 << number
        more = coder.decide(known, some, _KINDS_OF_DIGITS)
        chosen = _chosen(~more)
        shorter, signs = some.those(chosen), negative[chosen]
        found = None if magnitudes is None else magnitudes[chosen]
        del known, chosen
        some, chosen = some.true(more), _chosen(more)
        negative = negative[chosen]
        magnitudes = None if magnitudes is None else magnitudes[chosen]
        del more, chosen
        yield shorter.where, _code_digits(coder, number - 1, shorter, found), signs
        del shorter, signs, found
    yield some.where, _code_digits(coder, digits - 1, some, magnitudes), negative


def _code_digits(coder: _Coder, digits: int, some: _Some, magnitudes: Magnitudes | None) -> Magnitudes:
    """The ``digits`` binary digits below the first, of ``some`` levels; returns their magnitudes."""
    found = np.full(some.count, 1 << digits, dtype=np.uint32) if magnitudes is None else magnitudes
    for place in reversed(range(digits)):
        known = None if magnitudes is None else (magnitudes >> place & 1).astype(np.bool_)
        ones = coder.decide(known, some, _KINDS_OF_DIGITS if place >= digits - _MODELLED_DIGITS else None)
        if magnitudes is None:
            for start in range(0, some.count, _BLOCK):
                block = slice(start, start + _BLOCK)
                found[block] |= ones[block].astype(np.uint32) << place
    return found


# --- Some of the levels -----------------------------------------------------------------------------------


class _Parts:
    """Runs, and the equal parts that they may be cut into."""

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
        # they begin, and where they end; for each depth, how many they are and where they begin in this list.
        self.steps = np.array(steps, dtype=np.int64)
        self.begins = np.concatenate(
            [np.arange(0, last, step) for step in steps] or [np.empty(0, dtype=np.int64)]
        )
        self.ends = np.concatenate([np.arange(step, last + 1, step) for step in steps] or [self.begins])
        self.counts = np.array([last // step for step in steps], dtype=np.int64)
        self.firsts = np.cumsum(self.counts) - self.counts

    def before(self, where: Where | None, depth: int) -> Counts:
        """How many of the levels ``where``, or of all, are before each bound of the parts of a depth."""
        bounds = self._bounds[:: 1 << self.depth - depth]
        return bounds if where is None else where.searchsorted(bounds.astype(where.dtype, copy=False))


def _parts_of(runs: Sequence[int]) -> _Parts:
    """Kept for the next time where runs are few, as those of wavelets: nobody may fill memory with them."""
    return _kept_parts(tuple(runs)) if len(runs) <= _FEW_RUNS else _Parts(runs)


@lru_cache(maxsize=16)
def _kept_parts(runs: tuple[int, ...]) -> _Parts:
    return _Parts(runs)


class _Some:
    """Some of the levels.

    Args:
        parts: of all levels.
        where: positions, increasing; None for all levels.
        count: how many they are.
    """

    def __init__(self, parts: _Parts, where: Where | None, count: int) -> None:
        self.parts, self._where, self.count = parts, where, count
        self._before: Counts | None = None
        self._true: tuple[Flags, _Some] | None = None

    @property
    def where(self) -> Where:
        """Their positions, increasing."""
        assert self._where is not None
        return self._where

    @property
    def before(self) -> Counts:
        """How many of them are before each bound of the smallest parts."""
        if self._before is None:
            self._before = self.parts.before(self._where, self.parts.depth)
        return self._before

    def before_parts(self, depth: int) -> Counts:
        """How many of them are before each bound of the parts of a depth."""
        return self.parts.before(self._where, depth)

    def true(self, flags: Flags) -> _Some:
        """Those whose flags are true."""
        if self._true is None or self._true[0] is not flags:  # of a writer asked for twice
            where = _true(flags) if self._where is None else self._where[_chosen(flags)]
            self._true = flags, _Some(self.parts, where, len(where))
        return self._true[1]

    def those(self, chosen: Where | Flags) -> _Some:
        """Those that :func:`_chosen` has chosen of them."""
        where = self.where[chosen]
        return _Some(self.parts, where, len(where))


def _chosen(flags: Flags) -> Where | Flags:
    """An index of what is flagged; short ones as numbers, which index several arrays in less time."""
    return flags.nonzero()[0] if len(flags) < _SHORT else flags


def _true(flags: Flags) -> Where:
    """Where the flags are true, in memory of few bytes per flag."""
    if len(flags) < _SHORT:
        return flags.nonzero()[0]
    found: Where = np.empty(np.count_nonzero(flags), dtype=np.int32 if len(flags) < 1 << 31 else np.int64)
    end = 0
    for start in range(0, len(flags), _BLOCK):
        block = np.flatnonzero(flags[start : start + _BLOCK])
        found[end : end + len(block)] = block + start
        end += len(block)
    return found


# --- Decisions of one kind --------------------------------------------------------------------------------


class _Coder(Protocol):
    parts: _Parts

    def decide(self, known: Flags | None, some: _Some, kinds: _Weights | None) -> Flags:
        """Codes decisions, and returns them.

        Args:
            known: the decisions, for a writer.
            some: of which levels they are.
            kinds: how probable each way to tell their odds is; None if these are even and nothing is told.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Line:
    """Decisions whose odds are to be chosen.

    Attributes:
        flags: the decisions.
        kinds: see :meth:`_Coder.decide`.
        count: how many they are.
        ones: how many are true.
        totals: how many they are before each bound of the smallest parts, where there are any.
        ones_of: how many of these are true.
        steps: their coding, once the odds are chosen.
    """

    flags: Flags
    kinds: _Weights
    count: int
    ones: int
    totals: Counts
    ones_of: Counts
    steps: list[_Step]


class _Writer:
    """Notes what is to be coded, in the order of reading; a stack is filled from the other end."""

    def __init__(self, runs: Sequence[int]) -> None:
        self.parts = _parts_of(runs)
        self._steps: list[list[_Step]] = []
        self._lines: list[_Line] = []
        self._held = 0

    def digits(self, number: int) -> None:
        self._steps.append([(number, _symbols(_DIGITS))])

    def decide(self, known: Flags | None, some: _Some, kinds: _Weights | None) -> Flags:
        assert known is not None
        if kinds is None or some.count < _FEW:
            self._steps.append(_coded(known, _in_order(0, some.count)))
            return known
        true = some.true(known)
        before = (some.before, true.before) if self.parts.tried else (_NONE, _NONE)
        line = _Line(known, kinds, some.count, true.count, *before, [])
        self._lines.append(line)
        self._steps.append(line.steps)
        self._held += some.count
        if self._held > _MOST_HELD:
            self._choose()
        return known

    def _choose(self) -> None:
        """The odds of all lines that are open."""
        for line, choice in zip(self._lines, _choices(self._lines, self.parts), strict=True):
            line.steps.append((choice.kind, _symbols(line.kinds)))
            order = _in_order(choice.odds[0] if choice.kind == _ONE else 0, line.count)
            if choice.kind == _ONE:
                unit = _unit_of_one(line.count)
                line.steps.append(((choice.odds[0] + _ODDS) // unit, _uniform(2 * _ODDS // unit)))
            elif choice.kind != _EVEN:
                line.steps.append((choice.unit, _uniform(len(_UNITS))))
                line.steps.append((choice.rate, _uniform(len(_RATES))))
                line.steps.append((choice.odds[0] + _ODDS, _uniform(2 * _ODDS)))
                if len(choice.odds) > 1:
                    unit = _UNITS[choice.unit]
                    steps = [(after - t) // unit + 2 * _ODDS for t, after in pairwise(choice.odds)]
                    line.steps.append((np.array(steps, dtype=np.int32), _differences(choice.rate)[0]))
                before = line.totals[:: 1 << self.parts.depth - (choice.kind - _PARTS)]
                order = _by_odds(choice.odds, _told(before))
            line.steps.extend(_coded(line.flags, order))
        self._lines.clear()
        self._held = 0

    def data(self, word: int) -> bytes:
        if self._lines:
            self._choose()
        coder = constriction.stream.stack.AnsCoder(np.array([word], dtype=np.uint32))
        for steps in reversed(self._steps):
            for symbols, model in reversed(steps):
                coder.encode_reverse(symbols, model)
        words: bytes = coder.get_compressed().astype("<u4").tobytes()
        return words.rstrip(b"\0")


def _coded(flags: Flags, order: _Order) -> list[_Step]:
    """Symbols of decisions, and their models."""
    if order.places:
        padded, given = bytearray(order.size), flags.view(np.uint8).data
        for (start, end), (first, last) in zip(pairwise(order.bounds), order.places, strict=True):
            padded[first:last] = given[start:end]
        flags = np.frombuffer(padded, dtype=np.bool_)
    steps: list[_Step] = []
    packed, at = np.packbits(flags).astype(np.int32), 0
    for t, count in order.groups:
        whole, rest = divmod(count, _GROUP)
        if whole:
            steps.append((packed[at : at + whole], _table(t, _GROUP)))
        at += whole
        if rest:
            steps.append((int(packed[at]) >> _GROUP - rest, _table(t, rest)))
            at += 1
    return steps


class _Reader:
    """Reads what a :class:`_Writer` wrote."""

    def __init__(self, data: memoryview, runs: Sequence[int]) -> None:
        self.parts = _parts_of(runs)
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
        except BaseException as error:  # a Rust panic is a BaseException, but not an Exception
            raise CodecError(f"no levels: {error}") from None

    def digits(self) -> int:
        return int(self._decode(_symbols(_DIGITS)))

    def decide(self, known: Flags | None, some: _Some, kinds: _Weights | None) -> Flags:
        count = some.count
        kind = _EVEN if kinds is None or count < _FEW else self._decode(_symbols(kinds))
        if kind == _EVEN:
            return self._flags(_in_order(0, count))
        if kind == _ONE:
            unit = _unit_of_one(count)
            return self._flags(_in_order(self._decode(_uniform(2 * _ODDS // unit)) * unit - _ODDS, count))
        depth = kind - _PARTS
        if depth > self.parts.depth:
            raise CodecError(f"levels in parts of depth {depth}: expected at most {self.parts.depth}")
        starts = _told(some.before_parts(depth))
        unit = _UNITS[self._decode(_uniform(len(_UNITS)))]
        rate = self._decode(_uniform(len(_RATES)))
        odds = [self._decode(_uniform(2 * _ODDS)) - _ODDS]
        if len(starts) > 2:
            steps = (self._decode(_differences(rate)[0], len(starts) - 2) - 2 * _ODDS) * unit
            odds = list(accumulate(steps.tolist(), initial=odds[0]))
        order = _by_odds(odds, starts)
        if order.groups[0][0] < -_ODDS or order.groups[-1][0] >= _ODDS:
            raise CodecError("odds of levels: out of range")
        return self._flags(order)

    def _flags(self, order: _Order) -> Flags:
        packed, at = np.empty(order.size // _GROUP, dtype=np.uint8), 0
        for t, count in order.groups:
            whole, rest = divmod(count, _GROUP)
            if whole:
                packed[at : at + whole] = self._decode(_table(t, _GROUP), whole)
            at += whole
            if rest:
                packed[at] = self._decode(_table(t, rest)) << _GROUP - rest
                at += 1
        flags: Flags = np.unpackbits(packed).view(np.bool_)
        if not order.places:
            return flags[: order.groups[0][1]]
        padded = flags.data
        return np.frombuffer(b"".join([padded[first:last] for first, last in order.places]), dtype=np.bool_)

    def word(self) -> int:
        words = self._coder.get_compressed()
        if len(words) != 1:
            raise CodecError("symbols: bytes are left, or some are missing")
        return int(words[0])


def _told(before: Counts) -> list[int]:
    """How many decisions are before each part whose odds are told, and in all.

    These parts are the first with decisions, and all further ones with more than a few. As parts are few, lists
    take less time here than arrays.

    Args:
        before: (p + 1,) how many decisions there are before each of p parts, and in all.
    """
    bounds = before.tolist()
    told = [start for start, end in pairwise(bounds) if end - start >= _FEW_OF_PART or end > start == 0]
    told.append(bounds[-1])
    return told


@dataclass(frozen=True, slots=True)
class _Order:
    """The order in which decisions are coded: by their odds, the smallest first.

    Attributes:
        groups: odds, and how many decisions have them.
        size: how many decisions are coded, with those that fill the last symbol of each group.
        bounds: spans of decisions with the same odds: where each begins, and where the last ends.
        places: from where to where each span is among what is coded; empty if that is in order.
    """

    groups: list[tuple[int, int]]
    size: int
    bounds: Sequence[int] = ()
    places: Sequence[tuple[int, int]] = ()


def _in_order(odds: int, count: int) -> _Order:
    """All decisions have the same odds."""
    return _Order([(odds, count)], count + -count % _GROUP)


def _by_odds(odds: Sequence[int], starts: Sequence[int]) -> _Order:
    """Decisions in p parts.

    Args:
        odds: p, of the parts.
        starts: p + 1, how many decisions are before each part, and in all.
    """
    of, bounds, last = list[int](), list[int](), None
    for t, start in zip(odds, starts, strict=False):
        if t != last:
            of.append(t)
            bounds.append(start)
            last = t
    bounds.append(starts[-1])
    places = [(0, 0)] * len(of)
    groups: list[tuple[int, int]] = []
    at = first = 0
    order = sorted(range(len(of)), key=of.__getitem__)
    last = of[order[0]]
    for i in order:
        if of[i] != last:
            groups.append((last, at - first))
            at = first = at + -at % _GROUP
            last = of[i]
        end = at + bounds[i + 1] - bounds[i]
        places[i] = at, end
        at = end
    groups.append((last, at - first))
    return _Order(groups, at + -at % _GROUP, bounds, places)


def _unit_of_one(count: int) -> int:
    return _UNITS[-1] if count < _FEW_OF_ONE else _UNITS[0]


# --- What the encoder chooses -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Choice:
    """The odds of one kind of decision: ``odds`` are one for all, or one for each part that has any."""

    kind: int
    odds: list[int]
    unit: int = 0
    rate: int = 0


def _choices(lines: Sequence[_Line], parts: _Parts) -> list[_Choice]:
    """The odds of each line that take the fewest bits, those that tell them included.

    Of all lines at once, and of all depths of parts worth trying: each has few parts.
    """
    counts = np.array([line.count for line in lines])
    kinds = np.stack([_lengths(line.kinds) for line in lines])
    costs = np.full((len(lines), _PARTS + _MOST_DEPTH + 1), np.iinfo(np.int64).max)
    costs[:, _EVEN] = counts * _BITS + kinds[:, _EVEN]
    units = [_unit_of_one(line.count) for line in lines]
    odds_of_one, bits = _fitting(np.array([line.ones for line in lines]), counts, np.array(units))
    told = np.array([(2 * _ODDS // unit - 1).bit_length() * _BITS for unit in units])
    costs[:, _ONE] = bits + told + kinds[:, _ONE]
    cuts = _by_parts(lines, counts, parts) if parts.tried else None
    if cuts is not None:
        which = cuts.lines, _PARTS + cuts.depths
        costs[which] = cuts.costs + kinds[which]
    choices = []
    for i, kind in enumerate(costs.argmin(axis=1).tolist()):  # the first of those that cost the least
        if kind == _EVEN:
            choices.append(_Choice(kind, []))
        elif kind == _ONE:
            choices.append(_Choice(kind, [int(odds_of_one[i])]))
        else:
            assert cuts is not None
            choices.append(cuts.choice(i, kind))
    return choices


@dataclass(frozen=True, slots=True)
class _Cuts:
    """What odds of parts take: of each of c lines cut at one depth.

    Attributes:
        lines: (c,) numbers of the lines.
        depths: (c,) of the parts.
        costs: (c,) of all decisions and of telling their odds, but for the kind.
        units: (c,) of the odds.
        rates: (c,) indices of the rates.
        firsts: (c,) where the odds of a line begin.
        odds: of all lines.
    """

    lines: Counts
    depths: Counts
    costs: Counts
    units: Counts
    rates: Counts
    firsts: Counts
    odds: Counts

    def choice(self, line: int, kind: int) -> _Choice:
        """What a line chooses."""
        i = list(zip(self.lines.tolist(), self.depths.tolist(), strict=True)).index((line, kind - _PARTS))
        until = self.firsts[i + 1] if i + 1 < len(self.firsts) else None
        unit = _UNITS.index(int(self.units[i]))
        return _Choice(kind, self.odds[self.firsts[i] : until].tolist(), unit, int(self.rates[i]))


def _by_parts(lines: Sequence[_Line], counts: Counts, parts: _Parts) -> _Cuts | None:
    """What odds for parts take, for each line and depth worth trying."""
    totals, ones = (np.array(b) for b in zip(*[(line.totals, line.ones_of) for line in lines], strict=True))
    each = totals[:, parts.ends] - totals[:, parts.begins]
    enough = each >= _FEW_OF_PART
    first = (totals[:, 1:] > 0).argmax(axis=1)[:, None]
    enough[np.arange(len(lines))[:, None], parts.firsts + first // parts.steps] = True
    numbers = np.add.reduceat(enough, parts.firsts, axis=1, dtype=np.int64)
    worth = np.logical_and.accumulate((numbers > 1) & (counts[:, None] >= 32 * numbers), axis=1)
    cut, tried = worth.nonzero()
    if not len(cut):
        return None
    enough &= np.repeat(worth, parts.counts, axis=1)
    sizes = numbers[worth]
    firsts = np.cumsum(sizes) - sizes
    line, part = enough.nonzero()
    begins = line * totals.shape[1] + parts.begins[part]
    totals_of, ones_of = (_until_next(n, begins, firsts, cut) for n in (totals, ones))
    rarer = np.add.reduceat(np.minimum(ones_of, totals_of - ones_of), firsts) // sizes
    units = np.where(rarer >= 512, _UNITS[0], np.where(rarer >= 64, _UNITS[1], _UNITS[2]))
    unit_of = np.repeat(units, sizes)
    odds, costs = _fitting(ones_of, totals_of, unit_of)
    steps = np.abs(np.diff(odds, prepend=0)) // unit_of
    bits = _bits_of_differences()[:, steps]
    bits[:, firsts] = 0  # told outright
    by_rate = np.add.reduceat(bits, firsts, axis=1)
    return _Cuts(
        cut,
        np.array(parts.tried)[tried],
        np.add.reduceat(costs, firsts) + by_rate.min(axis=0) + 11 * _BITS,  # log2(3 * 4 * 128) = 10.6
        units,
        by_rate.argmin(axis=0),
        firsts,
        odds,
    )


def _until_next(before: Counts, begins: Where, firsts: Where, cut: Where) -> Counts:
    """How many are between each of ``begins`` and the next, or the end if the next is of another cut."""
    at = before.reshape(-1)[begins]
    until = np.append(at[1:], 0)
    until[np.append(firsts[1:], len(at)) - 1] = before[cut, -1]
    found: Counts = until - at
    return found


def _fitting(ones: Counts, totals: Counts, unit: Counts) -> tuple[Counts, Counts]:
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
    if t == 0:
        return _uniform(1 << width)
    of_true, of_false = _odds(t)
    weights = [of_true**k * of_false ** (width - k) for k in range(width + 1)]
    return _model([weights[symbol.bit_count()] for symbol in range(1 << width)])


@lru_cache(maxsize=2 * _ODDS)
def _uniform(size: int) -> Any:
    if size & size - 1 == 0:  # the same model, in which a symbol is found without a search
        return constriction.stream.model.Uniform(size)
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
