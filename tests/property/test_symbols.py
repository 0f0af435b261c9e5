"""Coded symbols: the compiled coder is its specification; close to the entropy; the same bytes everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jwins.errors import CodecError
from jwins.ops.wavelet import Wavelet
from jwins.sharing.update import Quantized, Update
from jwins.wire import codec, quantized, symbols
from jwins.wire.symbols import decode_symbols, encode_symbols

quick = settings(max_examples=60, deadline=None)
MOST = 2**31 - 1


@contextmanager
def compiled(always: bool) -> Iterator[None]:
    """All through machine code, or nothing."""
    before = symbols._MAX_UNCOMPILED
    symbols._MAX_UNCOMPILED = -1 if always else 2**40
    try:
        yield
    finally:
        symbols._MAX_UNCOMPILED = before


def laplacian(runs: list[int], scale: float, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).laplace(size=sum(runs))
    values *= np.repeat(scale * 0.5 ** np.arange(len(runs)), runs)
    return np.clip(np.round(values), -(2**31), MOST).astype(np.int32)


def both(found: np.ndarray, runs: list[int]) -> bytes:
    """The bytes, which both make and both read."""
    made = []
    for always in (False, True):
        with compiled(always):
            made.append(encode_symbols(found, runs))
            back = decode_symbols(memoryview(made[0]), count=len(found), runs=runs)
        assert back.dtype == np.int32
        assert np.array_equal(back, found)
    assert made[0] == made[1]
    return made[0]


# --- The same, compiled or not ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.5, 8.0, 1e9])
def test_the_same_bytes_compiled_or_not_for_all_lengths(scale: float) -> None:
    for dim in [*range(70), 128, 333]:
        for levels in (0, 1, 4):
            runs = list(Wavelet("haar", levels, "periodization").subbands(dim)) if levels and dim else [dim]
            both(laplacian(runs, scale, dim), runs)


@pytest.mark.parametrize(
    "runs", [[], [0, 0], [0, 150, 5, 0, 400], [3] * 50, [1] * 300, [64, 32, 16], [16, 16, 32, 64, 1], [700]]
)
def test_the_same_bytes_compiled_or_not_for_all_kinds_of_runs(runs: list[int]) -> None:
    for seed, scale in enumerate((0.02, 0.3, 3.0, 1e5)):
        both(laplacian(runs, scale, seed), runs)


@given(
    st.lists(
        st.sampled_from([0, 0, 0, 1, -1, 2, 13, 14, 15, -16, 17, MOST, -MOST, -MOST - 1, 2**30]), max_size=90
    )
)
@quick
def test_the_same_bytes_compiled_or_not_for_special_values(some: list[int]) -> None:
    both(np.array(some, dtype=np.int32), [len(some)])
    both(np.array(some * 3, dtype=np.int32), [len(some), len(some) * 2])


@given(st.integers(0, 2**32 - 1), st.floats(-1.5, 9.4), st.lists(st.integers(0, 60), min_size=1, max_size=8))
@quick
def test_damaged_bytes_are_the_same_compiled_or_not(seed: int, power: float, runs: list[int]) -> None:
    rng = np.random.default_rng(seed)
    some = laplacian(runs, 10**power, seed)
    data = bytearray(encode_symbols(some, runs))
    for _ in range(4):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        wrong = bytes(data[: int(rng.integers(1, len(data) + 1))]) + rng.bytes(int(rng.integers(3)))
        outcomes = []
        for always in (False, True):
            with compiled(always):
                try:
                    outcomes.append(decode_symbols(memoryview(wrong), count=len(some), runs=runs).tobytes())
                except CodecError as error:
                    outcomes.append(str(error).encode())
        assert outcomes[0] == outcomes[1]


# --- Round trips and refusals -----------------------------------------------------------------------------


def size_by_run(some: np.ndarray, runs: list[int]) -> float:
    """Entropy of each run's histogram, in bytes."""
    bits = 0.0
    for part in np.split(some, np.cumsum(runs)[:-1]):
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
    most = draw(st.sampled_from([0, 1, 2, 20, MOST]))
    some = draw(st.lists(st.integers(-most - (most == MOST), most), min_size=sum(runs), max_size=sum(runs)))
    patterns = draw(
        st.one_of(
            st.integers(1, 254).map(lambda x: [x << 23] * len(runs)),
            st.integers(1, 0x7F7FFFFF).map(lambda x: [x] * len(runs)),
            st.lists(st.integers(1, 0x7F7F).map(lambda x: x << 16), min_size=len(runs), max_size=len(runs)),
            st.lists(st.integers(1, 0x7F7FFFFF), min_size=len(runs), max_size=len(runs)),
        )
    )
    return np.array(some, np.int32), np.array(patterns, np.uint32).view(np.float32), tuple(runs)


@given(sections())
@quick
def test_sections_come_back(section: Any) -> None:
    some, scales, runs = section
    before = some.copy()
    data = quantized.encode(some, scales, runs)
    assert np.array_equal(some, before)
    found = quantized.decode(memoryview(data), count=len(some), max_runs=len(runs))
    assert np.array_equal(found[0], some)
    assert found[0].dtype == np.int32
    assert found[1].tobytes() == scales.tobytes()
    assert found[2] == runs
    for cut in range(0, len(data), 7):
        with pytest.raises(CodecError):
            quantized.decode(memoryview(data[:cut]), count=len(some), max_runs=len(runs))
    if len(runs):
        with pytest.raises(CodecError):
            quantized.decode(memoryview(data), count=len(some), max_runs=len(runs) - 1)
    with pytest.raises(CodecError):
        quantized.decode(memoryview(data + b"\1"), count=len(some), max_runs=len(runs))


@given(st.binary(max_size=200), st.integers(0, 3000))
@quick
def test_any_bytes_are_symbols_or_refused(data: bytes, count: int) -> None:
    runs = (count // 2, count - count // 2)
    try:
        found = decode_symbols(memoryview(data), count=count, runs=runs)
    except CodecError:
        return
    assert found.dtype == np.int32
    assert len(found) == count


@pytest.mark.parametrize("always", [False, True])
def test_bytes_that_no_encoder_makes_are_refused(always: bool) -> None:
    runs = [40, 40]
    some = laplacian(runs, 3.0, 1)
    data = encode_symbols(some, runs)
    with compiled(always):
        for wrong, reason in (
            (b"", "unknown share"),
            (b"\x2c" + data[1:], "unknown share"),
            (data[:-6], "cut off"),
            (data + bytes(5), "left"),
            (data + b"\0", "byte 0|left"),
        ):
            with pytest.raises(CodecError, match=reason):
                decode_symbols(memoryview(wrong), count=80, runs=runs)


@pytest.mark.parametrize("always", [False, True])
def test_magnitudes_of_more_than_31_bits_are_refused(always: bool) -> None:
    """But for -2^31 there is no symbol of 32 binary digits."""

    encoder = symbols._Encoder()
    assert not symbols._code(
        encoder, [0, 2**31, 5], [3], symbols._first(24)
    )  # two's complement has no such number
    data = bytes([24]) + encoder.finished()
    with compiled(always), pytest.raises(CodecError, match="more than 32 bits"):
        decode_symbols(memoryview(data), count=3, runs=[3])


@pytest.mark.parametrize("body", [b"", b"\xff" * 50, b"\0\0\0\1", bytes(range(1, 200))])
def test_a_decoder_stops_soon_behind_the_end_of_its_bytes(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many symbols are announced: counted in decisions, which are what takes time."""
    count, decisions, put = 50_000, [0], symbols._Decoder.put

    def counted(self: Any, p: int, bit: bool) -> bool:
        decisions[0] += 1
        return put(self, p, bit)

    monkeypatch.setattr(symbols._Decoder, "put", counted)
    for quarters in (0, 43):
        decisions[0] = 0
        with compiled(False), suppress(CodecError):
            decode_symbols(memoryview(bytes([quarters]) + body), count=count, runs=[count])
        of_a_block = 16 * 77
        assert decisions[0] <= 11_500 * (len(body) + 4) + of_a_block
        assert decisions[0] <= 17 * count + count // 16 + 16 * (len(body) + 4) + of_a_block


# --- How short, and that it stays the same ----------------------------------------------------------------


@pytest.mark.parametrize(("count", "excess"), [(10_000, 0.05), (50_000, 0.02), (500_000, 0.008)])
def test_close_to_the_entropy_given_the_subband(count: int, excess: float) -> None:
    """Of independent symbols: the surroundings tell nothing, and what is learned of them is the price."""
    runs = [count // 8, count // 8, count // 4, count // 2]
    for seed in (count, 1, 2):
        values = np.random.default_rng(seed).laplace(size=count) * np.repeat(1.55 ** -np.arange(4.0), runs)
        some = np.round(values / (2 * np.quantile(np.abs(values), 0.92))).astype(np.int32)
        assert (some == 0).mean() == pytest.approx(0.92, abs=0.001)
        assert len(encode_symbols(some, runs)) <= (1 + excess) * size_by_run(some, runs)


def test_zeros_take_a_byte_per_ten_thousand() -> None:
    assert len(encode_symbols(np.zeros(1_000_000, np.int32), [1_000_000])) <= 100


def test_runs_with_statistics_of_their_own_make_symbols_shorter() -> None:
    runs = [4000, 4000]
    some = np.concatenate([laplacian([4000], 2.0, 1), laplacian([4000], 0.2, 2)])
    one = len(encode_symbols(np.random.default_rng(3).permutation(some), [8000]))
    two = len(encode_symbols(some, runs))
    assert two < 0.9 * one


def test_neighbours_and_parents_that_are_alike_make_symbols_shorter() -> None:
    """Zeros that gather, at the same place in each subband."""
    rng, runs = np.random.default_rng(1), [1000, 1000, 2000, 4000]
    scale = np.where(rng.random(50) < 0.1, 3.0, 0.05)
    parts = [np.round(rng.laplace(size=n) * scale.repeat(n // 50)).astype(np.int32) for n in runs]
    shuffled = np.concatenate([rng.permutation(part) for part in parts])
    assert len(encode_symbols(np.concatenate(parts), runs)) < 0.7 * len(encode_symbols(shuffled, runs))


def test_signs_that_go_on_make_symbols_shorter() -> None:
    some = np.abs(laplacian([4000], 3.0, 1))
    going_on = some * np.sign(np.sin(np.arange(4000) / 20)).astype(np.int32)
    changing = some * np.random.default_rng(2).choice([-1, 1], 4000).astype(np.int32)
    saved = len(encode_symbols(changing, [4000])) - len(encode_symbols(going_on, [4000]))
    assert saved > 0.8 * np.count_nonzero(some) / 8


def test_coded_symbols_never_change() -> None:
    """Integers all the way: another machine, numpy or numba makes the same bytes."""
    digest = hashlib.sha256()
    for seed, scale in enumerate((0.1, 0.5, 4.0, 1e3)):
        for runs in ([1000, 1000, 2000], [256] * 9 + [100], [5000]):
            some = np.random.Generator(np.random.Philox(key=seed)).integers(-1000, 1001, sum(runs))
            some = (some**3 * int(1000 * scale) // 10**12).astype(np.int32)
            digest.update(encode_symbols(some, runs))
    assert digest.hexdigest()[:32] == "6bb719cf7056b2b97a285e31ae1ea039"


def test_symbols_that_fill_more_than_was_thought_are_coded_again() -> None:
    some = np.random.default_rng(1).integers(-(2**31), 2**31, 30_000).astype(np.int32)
    with compiled(True):
        data = encode_symbols(some, [30_000])
        assert len(data) > 2 * len(some) + 2**14
        assert np.array_equal(decode_symbols(memoryview(data), count=30_000, runs=[30_000]), some)


def test_the_codec_takes_the_shorter_way() -> None:
    rng = np.random.default_rng(1)
    rare = torch.from_numpy((rng.random(4000) < 0.05).astype(np.int32))
    wide = torch.from_numpy(
        (rng.integers(0, 3, 4000) * 10**8).astype(np.int32)
    )  # what pcodec finds a pattern in
    for some, layout in ((rare, 0x0C), (wide, 0x08)):
        data = codec("pco").encode(Update(4000, None, Quantized(some, torch.ones(1), (4000,)))).data
        assert data[0] == layout
    with pytest.raises(CodecError, match="makes none"):
        codec("raw").decode(
            codec("pco").encode(Update(4000, None, Quantized(rare, torch.ones(1), (4000,)))).data, dim=4000
        )
