"""Coded levels: docs/reference/wire.md read literally; close to the entropy; the same bytes everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jwins.errors import CodecError
from jwins.ops.wavelet import Wavelet
from jwins.sharing.update import Quantized, Update
from jwins.wire import codec, entropy, quantized

quick = settings(max_examples=60, deadline=None)


# --- A decoder that follows the document line by line -----------------------------------------------------

QUARTERS = (65536, 77936, 92682, 110218)
A, B, C = (1, 2, 10, 1, 3, 8, 4, 2, 1), (20, 3, 4, 1, 1, 1, 1, 1, 1), (3, 9, 9, 1, 2, 4, 2, 1, 1)


def power(x: int) -> int:
    return QUARTERS[x % 4] * 2 ** (x // 4)


@lru_cache
def frequencies_of(weights: tuple[int, ...]) -> list[int]:
    free = 2**24 - len(weights)
    frequencies = [w * free // sum(weights) + 1 for w in weights]
    frequencies[weights.index(max(weights))] += 2**24 - sum(frequencies)
    return frequencies


class Stack:
    """The ANS coder, as it decodes."""

    def __init__(self, data: bytes) -> None:
        data += bytes(-len(data) % 4)
        self.words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        self.state = self.words.pop()
        if self.words:
            self.state = self.state << 32 | self.words.pop()

    def symbol(self, weights: Any) -> int:
        frequencies = frequencies_of(tuple(weights))
        q, start = self.state & 0xFFFFFF, 0
        for symbol, f in enumerate(frequencies):
            if q < start + f:
                self.state = (self.state >> 24) * f + q - start
                if self.state < 2**32 and self.words:
                    self.state = self.state << 32 | self.words.pop()
                return symbol
            start += f
        raise AssertionError("the frequencies do not sum to 2**24")

    def decisions(self, count: int, t: int) -> list[bool]:
        a, b = (power(t), 65536) if t >= 0 else (65536, power(-t))
        found: list[bool] = []
        while count:
            m = min(8, count)
            powers = [a**k * b ** (m - k) for k in range(m + 1)]
            weights = [powers[s.bit_count()] for s in range(2**m)]
            symbol = self.symbol(weights)
            found += [bool(symbol >> m - 1 - i & 1) for i in range(m)]
            count -= m
        return found


def decide(stack: Stack, which: list[int], runs: list[int], weights: tuple[int, ...] | None) -> list[bool]:
    """Decisions about the levels ``which``."""
    if weights is None or len(which) < 8:
        return stack.decisions(len(which), 0)
    kind = stack.symbol(weights)
    if kind == 0:
        return stack.decisions(len(which), 0)
    if kind == 1:
        t = 4 * stack.symbol([1] * 32) - 64 if len(which) < 256 else stack.symbol([1] * 128) - 64
        return stack.decisions(len(which), t)
    s, parts, start = kind - 2, [], 0
    for n in runs:
        for j in range(2**s):
            low, high = -(-j * n // 2**s), -(-(j + 1) * n // 2**s)
            inside = [i for i in which if start + low <= i < start + high]
            if inside:
                parts.append(inside)
        start += n
    unit, rate = (1, 2, 4)[stack.symbol([1] * 3)], (8, 4, 2, 1)[stack.symbol([1] * 4)]
    odds = [stack.symbol([1] * 128) - 64]
    for part in parts[1:]:
        step = 0
        if len(part) >= 8:
            step = stack.symbol([2**64 // power(rate * abs(x)) for x in range(-128, 129)]) - 128
        odds.append(odds[-1] + step * unit)
    found: dict[int, bool] = {}
    for t in sorted(set(odds)):
        together = [i for part, of in zip(parts, odds, strict=True) if of == t for i in part]
        found |= dict(zip(together, stack.decisions(len(together), t), strict=True))
    return [found[i] for i in which]


def literal(data: bytes, runs: list[int]) -> tuple[list[int], int]:
    """Levels and word."""
    stack, count = Stack(data), sum(runs)
    magnitudes, negative = [0] * count, dict[int, bool]()
    digits = stack.symbol([2 ** max(18 - d, 0) for d in range(33)]) if count else 0

    def below(which: list[int], d: int) -> None:
        for place in range(d - 2, -1, -1):
            bits = decide(stack, which, runs, C if d - 1 - place <= 3 else None)
            for i, bit in zip(which, bits, strict=True):
                magnitudes[i] += bit << place

    if digits:
        nonzero = decide(stack, list(range(count)), runs, A)
        which = [i for i, flag in enumerate(nonzero) if flag]
        negative = dict(zip(which, decide(stack, which, runs, B), strict=True))
        for i in which:
            magnitudes[i] = 1
        for d in range(1, digits):
            more = decide(stack, which, runs, C)
            below([i for i, flag in zip(which, more, strict=True) if not flag], d)
            which = [i for i, flag in zip(which, more, strict=True) if flag]
            for i in which:
                magnitudes[i] = 1 << d
        below(which, digits)
    assert not stack.words
    return [-m if negative.get(i) else m for i, m in enumerate(magnitudes)], stack.state


def laplacian(runs: list[int], scale: float, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).laplace(size=sum(runs))
    values *= np.repeat(scale * 0.5 ** np.arange(len(runs)), runs)
    return np.round(values).astype(np.int32)


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("runs", [[40], [0, 150, 5, 0, 400], [3] * 50])
def test_the_document_read_literally_decodes(scale: float, runs: list[int]) -> None:
    levels = laplacian(runs, scale, 1)
    data = entropy.encode_symbols(levels, runs, 0x3C23D70A)
    assert literal(data, runs) == (levels.tolist(), 0x3C23D70A)


def test_parts_of_runs_read_literally() -> None:
    """Scales that change along a run, so that parts of it have odds of their own."""
    runs = [2048, 4100]
    values = np.random.default_rng(2).laplace(size=sum(runs)) * np.repeat(np.tile([0.1, 2.0], 6), 1025)[:6148]
    levels = np.round(values).astype(np.int32)
    data = entropy.encode_symbols(levels, runs, 1)
    assert literal(data, runs) == (levels.tolist(), 1)
    assert len(data) < 0.9 * size_by_run(levels, runs)


# --- Round trips and refusals -----------------------------------------------------------------------------


def size_by_run(levels: np.ndarray, runs: list[int]) -> float:
    """Entropy of each run's histogram, in bytes."""
    bits = 0.0
    for part in np.split(levels, np.cumsum(runs)[:-1]):
        counts = np.unique(part, return_counts=True)[1]
        bits -= float((counts * np.log2(counts / max(1, len(part)))).sum())
    return bits / 8


@st.composite
def sections(draw: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    runs = draw(
        st.one_of(
            st.lists(st.integers(0, 60), max_size=20),
            st.builds(
                lambda n, k: list(Wavelet("haar", k, "periodization").subbands(n)),
                st.integers(1, 200),
                st.integers(0, 5),
            ),
            st.builds(
                lambda b, k, r: [b] * k + [min(r, b)],
                st.integers(1, 40),
                st.integers(0, 20),
                st.integers(1, 40),
            ),
        )
    )
    most = draw(st.sampled_from([0, 1, 2, 20, 2**31 - 1]))
    levels = draw(
        st.lists(st.integers(-most - (most == 2**31 - 1), most), min_size=sum(runs), max_size=sum(runs))
    )
    patterns = draw(
        st.one_of(
            st.integers(1, 0x7F7FFFFF).map(lambda x: [x] * len(runs)),
            st.lists(st.integers(1, 0x7F7F).map(lambda x: x << 16), min_size=len(runs), max_size=len(runs)),
            st.lists(st.integers(1, 0x7F7FFFFF), min_size=len(runs), max_size=len(runs)),
        )
    )
    return np.array(levels, np.int32), np.array(patterns, np.uint32).view(np.float32), tuple(runs)


@given(sections())
@quick
def test_sections_come_back(section: Any) -> None:
    levels, scales, runs = section
    before = levels.copy()
    data = quantized.encode(levels, scales, runs)
    assert np.array_equal(levels, before)
    found = quantized.decode(memoryview(data), count=len(levels), most_runs=len(runs))
    assert np.array_equal(found[0], levels)
    assert found[0].dtype == np.int32
    assert found[1].tobytes() == scales.tobytes()
    assert found[2] == runs
    for cut in range(0, len(data), 7):
        with pytest.raises(CodecError):
            quantized.decode(memoryview(data[:cut]), count=len(levels), most_runs=len(runs))
    if len(runs):
        with pytest.raises(CodecError):
            quantized.decode(memoryview(data), count=len(levels), most_runs=len(runs) - 1)
    with pytest.raises(CodecError):
        quantized.decode(memoryview(data + b"\1"), count=len(levels), most_runs=len(runs))


@given(st.binary(max_size=200), st.integers(0, 3000))
@quick
def test_any_bytes_are_levels_or_refused(data: bytes, count: int) -> None:
    runs = (count // 2, count - count // 2)
    try:
        levels, _ = entropy.decode_symbols(memoryview(data), count=count, runs=runs)
    except CodecError:
        return
    assert levels.dtype == np.int32
    assert len(levels) == count


def test_a_panic_of_the_coder_is_a_codec_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    class Broken:
        def __init__(self, words: Any) -> None: ...
        def decode(self, *_: Any) -> None:
            raise Panic("as constriction might")

    monkeypatch.setattr(entropy.constriction.stream.stack, "AnsCoder", Broken)
    with pytest.raises(CodecError, match="as constriction might"):
        entropy.decode_symbols(memoryview(b"\1\2\3\4"), count=3, runs=(3,))


# --- How short, and that it stays the same ----------------------------------------------------------------


@pytest.mark.parametrize(("count", "excess"), [(10_000, 0.03), (50_000, 0.007), (500_000, 0.002)])
def test_close_to_the_entropy_given_the_subband(count: int, excess: float) -> None:
    """Models included; the step's four bytes are the word's."""
    runs = [count // 8, count // 8, count // 4, count // 2]
    values = np.random.default_rng(count).laplace(size=count) * np.repeat(1.55 ** -np.arange(4.0), runs)
    levels = np.round(values / (2 * np.quantile(np.abs(values), 0.92))).astype(np.int32)
    assert (levels == 0).mean() == pytest.approx(0.92, abs=0.001)
    data = entropy.encode_symbols(levels, runs, 2**32 - 1)
    assert len(data) - 4 <= (1 + excess) * size_by_run(levels, runs)


def test_runs_with_statistics_of_their_own_make_levels_shorter() -> None:
    runs = [4000, 4000]
    levels = np.concatenate([laplacian([4000], 2.0, 1), laplacian([4000], 0.2, 2)])
    one = len(entropy.encode_symbols(np.random.default_rng(3).permutation(levels), [8000], 1))
    two = len(entropy.encode_symbols(levels, runs, 1))
    assert two < 0.9 * one


def test_coded_levels_never_change() -> None:
    """Integers all the way: another machine, numpy or constriction makes the same bytes."""
    digest = hashlib.sha256()
    for seed, scale in enumerate((0.1, 0.5, 4.0, 1e3)):
        for runs in ([1000, 1000, 2000], [256] * 9 + [100], [5000]):
            levels = np.random.Generator(np.random.Philox(key=seed)).integers(-1000, 1001, sum(runs))
            levels = (levels**3 * int(1000 * scale) // 10**12).astype(np.int32)
            digest.update(entropy.encode_symbols(levels, runs, 1 + seed))
    assert digest.hexdigest()[:32] == "dfebd68c001d9eb54170a3a60bc8e4a6"


@pytest.mark.parametrize("scale", [0.2, 3.0, 1e7])
def test_many_levels_are_coded_as_few_are(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, with positions of 4 bytes, and the odds of each kind of decision chosen by themselves."""
    runs = [700, 1300]
    levels = laplacian(runs, scale, 3)
    levels[:2] = -(2**31), 2**31 - 1
    data = entropy.encode_symbols(levels, runs, 5)
    for name, value in (("_SHORT", 0), ("_BLOCK", 64), ("_MOST_HELD", 0)):
        monkeypatch.setattr(entropy, name, value)
    assert entropy.encode_symbols(levels, runs, 5) == data
    found, word = entropy.decode_symbols(memoryview(data), count=2000, runs=runs)
    assert np.array_equal(found, levels)
    assert word == 5


def test_magnitudes_of_more_than_31_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for -2**31 there is no level of 32 binary digits."""
    levels = np.array([0, -(2**31), 5] * 10, np.int32)
    right, negative = entropy.encode_symbols(levels, [30], 1), entropy._Writer.decide

    def positive(self: Any, known: Any, some: Any, kinds: Any) -> Any:
        return negative(self, np.zeros_like(known) if kinds == entropy._KINDS_OF_SIGNS else known, some, kinds)

    monkeypatch.setattr(entropy._Writer, "decide", positive)
    wrong = entropy.encode_symbols(levels, [30], 1)
    assert np.array_equal(entropy.decode_symbols(memoryview(right), count=30, runs=[30])[0], levels)
    with pytest.raises(CodecError, match="more than 32 bits"):
        entropy.decode_symbols(memoryview(wrong), count=30, runs=[30])


def test_the_codec_takes_the_shorter_way() -> None:
    rng = np.random.default_rng(1)
    rare = torch.from_numpy((rng.random(4000) < 0.05).astype(np.int32))
    wide = torch.from_numpy(
        (rng.integers(0, 3, 4000) * 10**8).astype(np.int32)
    )  # what pcodec finds a pattern in
    for symbols, layout in ((rare, 0x0C), (wide, 0x08)):
        data = codec("pco").encode(Update(4000, None, Quantized(symbols, torch.ones(1), (4000,)))).data
        assert data[0] == layout
    with pytest.raises(CodecError, match="makes none"):
        codec("raw").decode(
            codec("pco").encode(Update(4000, None, Quantized(rare, torch.ones(1), (4000,)))).data, dim=4000
        )
