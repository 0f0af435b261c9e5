"""Each kernel gives the same bits as its twin in numpy, torch or PyWavelets, for numbers of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jwins.kernels import mixing, replicas, select, wavelet
from jwins.kernels.compiler import compiled, fma, kernel
from jwins.ops.wavelet import _taps

quick = settings(max_examples=100, deadline=None)
lengths = st.integers(0, 70) | st.integers(71, 3000)
seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-(2.0**60), 2.0**60, width=32)
weights = st.floats(2.0**-126, 1.0, width=32)


def vector(length: int, seed: int) -> np.ndarray:
    """Normal numbers, zeros of both signs, subnormals and magnitudes of all kinds, many of them equal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(length).astype(np.float32)
    x *= np.float32(2.0) ** rng.choice([-140, -30, 0, 0, 0, 40], length).astype(np.float32)
    special = np.array([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.0, 1.1754944e-38], dtype=np.float32)
    return np.where(rng.random(length) < 0.3, rng.choice(special, length), x).astype(np.float32)


def units(length: int, seed: int, limit: int = 2**30 - 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    few = rng.integers(-3, 4, length)
    return np.where(rng.random(length) < 0.2, rng.integers(-limit, limit + 1, length), few).astype(np.int32)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# --- Wavelets ---------------------------------------------------------------------------------------------


def both_ways(name: str, levels: int, mode: str, rows: np.ndarray, seed: int) -> None:
    """A transform and one back, of other numbers, against PyWavelets one level at a time."""
    w, (count, dim) = pywt.Wavelet(name), rows.shape
    periodic = mode == "periodization"
    coarse = np.pad(rows, ((0, 0), (0, -dim % 2**levels))) if periodic else rows
    steps, details = [], []
    for _ in range(levels):
        steps.append(coarse.shape[1])
        coarse, detail = pywt.dwt(coarse, w, mode)
        details.append(detail)
    expected = np.concatenate([coarse, *reversed(details)], axis=1)
    got = np.empty_like(expected)
    spare = np.empty((2, max(steps) + w.dec_len), dtype=np.float32)
    of = _taps(name, back=False)
    wavelet.forward(rows, of.both, of.low, of.high, periodic, levels, got, spare)
    assert same(got, expected)

    given_ = np.stack([vector(got.shape[1], seed + row) for row in range(count)])
    joined, at = given_[:, : coarse.shape[1]], coarse.shape[1]
    for step, detail in zip(reversed(steps), reversed(details), strict=True):
        joined = pywt.idwt(joined, given_[:, at : at + detail.shape[1]], w, mode)[:, :step]
        at += detail.shape[1]
    of, back = _taps(name, back=True), np.empty_like(rows)
    wavelet.inverse(given_, of.both, of.low, of.high, periodic, np.array(steps), back, spare)
    assert same(back, np.ascontiguousarray(joined[:, :dim]))


@pytest.mark.parametrize("mode", ["symmetric", "periodization"])
@pytest.mark.parametrize("name", ["haar", "sym2", "db3", "coif1", "bior2.2"])  # 2 to 6 taps
def test_wavelets_of_every_length(name: str, mode: str) -> None:
    for dim in [*range(1, 66), 333, 1024, 2001]:
        for levels in (1, 2, 3, 4, 9):
            both_ways(name, levels, mode, vector(2 * dim, dim).reshape(2, dim), dim)


@pytest.mark.slow
@pytest.mark.parametrize("taps", [*range(2, 42, 2), 48, 62, 76, 102])
def test_every_length_of_filter(taps: int) -> None:
    """Each is compiled by itself, those of the longest wavelets for half a minute: of these there are four."""
    for name in pywt.wavelist(kind="discrete"):
        if pywt.Wavelet(name).dec_len == taps:
            for mode in ("symmetric", "periodization"):
                for dim in (1, 2, 17, 64, 333, 1000):
                    both_ways(name, 3, mode, vector(dim, dim).reshape(1, dim), dim)


# --- Selection --------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), seeds, st.floats(0, 1), st.booleans())
@quick
def test_the_largest_k_are_those_of_a_stable_sort(length: int, seed: int, part: float, coarse: bool) -> None:
    x = vector(length, seed)
    x = np.round(x) if coarse else x
    k = max(1, round(part * length))
    positions = np.empty(k + 1, dtype=np.int64)
    assert select.largest_k(x.view(np.uint32), positions)
    expected = np.sort(np.argsort(-np.abs(x), kind="stable")[:k])
    assert np.array_equal(positions[:k], expected)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_nothing_is_selected_of_what_is_not_finite(value: float) -> None:
    x = vector(100, 1)
    x[37] = value
    assert not select.largest_k(x.view(np.uint32), np.empty(11, dtype=np.int64))


# --- Mixing -----------------------------------------------------------------------------------------------


@given(numbers, numbers, numbers)
@quick
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = float(fma(np.float32(a), np.float32(b), np.float32(c)))
    for other in (np.nextafter(np.float32(got), np.float32(side)) for side in (-np.inf, np.inf)):
        assert abs(Fraction(got) - exact) <= abs(Fraction(float(other)) - exact)


@given(lengths, seeds, weights)
@quick
def test_all_values_are_mixed_as_torch_does(length: int, seed: int, weight: float) -> None:
    change, values, own = (vector(length, seed + i) for i in range(3))
    w = np.float32(weight)
    expected = fma(values - own, w, change)
    by_torch = torch.from_numpy(change.copy()).add_(torch.from_numpy(values - own), alpha=weight)
    mixing.add_all(change, values, own, w)
    assert same(change, expected)
    assert same(change, by_torch.numpy())


@given(lengths, seeds, weights, st.floats(0, 1))
@quick
def test_some_values_are_mixed_as_torch_does(length: int, seed: int, weight: float, part: float) -> None:
    start, values, own = (vector(length, seed + i) for i in range(3))
    positions = np.flatnonzero(np.random.default_rng(seed).random(length) < part)
    filled = own.copy()
    filled[positions] = values[positions]
    for change in (start, start + np.float32(0)):  # with -0.0, and without
        expected = torch.from_numpy(change.copy()).add_(torch.from_numpy(filled - own), alpha=weight).numpy()
        assert mixing.add_some(change, positions + 7, 7, values[positions], own, np.float32(weight))
        assert same(change, expected)


@pytest.mark.parametrize("positions", [[1, 1], [2, 1], [0, 9], [-1, 0]])
def test_positions_out_of_order_or_range_are_refused(positions: list[int]) -> None:
    own, values = np.zeros((2, 9), dtype=np.float32)
    at = np.array(positions)
    for zero in (np.float32(0), np.float32(-0.0)):
        assert not mixing.add_some(np.full(9, zero), at, 0, values[:2], own, np.float32(1))


@given(lengths, seeds, weights)
@quick
def test_replicas_are_mixed_as_torch_does(length: int, seed: int, weight: float) -> None:
    change, own = vector(length, seed), units(length, seed + 2)
    one, other = units(length, seed + 1), units(length, seed + 3)
    w, v = np.float32(weight), np.float32(weight / 3)
    expected = fma((other - own).astype(np.float32), v, fma((one - own).astype(np.float32), w, change))
    by_torch = torch.from_numpy(change.copy()).add_(torch.from_numpy(one - own), alpha=weight)
    by_torch.add_(torch.from_numpy(other - own), alpha=weight / 3)
    alone, of_one = change.copy(), fma((one - own).astype(np.float32), w, change)
    mixing.add_replicas(change, one, w, other, v, own)
    assert same(change, expected)
    assert same(change, by_torch.numpy())
    mixing.add_replicas(alone, one, w, own, np.float32(-0.0), own)
    assert same(alone, of_one)


@given(lengths, seeds, weights, st.floats(0, 1))
@quick
def test_what_is_held_back_is_what_torch_holds_back(length: int, seed: int, weight: float, part: float) -> None:
    change, unsent, kept = (vector(length, seed + i) for i in range(3))
    c, k = torch.from_numpy(change.copy()), torch.from_numpy(kept.copy())
    held = torch.from_numpy(unsent) * weight
    c.sub_(held)
    k = held.add_(k)
    c.add_(k, alpha=part)
    k.mul_(1.0 - part)
    after = np.empty_like(kept)
    mixing.hold_back(change, unsent, kept, np.float32(weight), np.float32(part), np.float32(1.0 - part), after)
    assert same(change, c.numpy())
    assert same(after, k.numpy())


# --- Replicas ---------------------------------------------------------------------------------------------


@given(lengths, seeds)
@quick
def test_sum_of_squares(length: int, seed: int) -> None:
    for x in (vector(length, seed), np.tile(vector(length, seed).clip(-1e9, 1e9), 9)):
        with np.errstate(all="ignore"):
            expected = (x * x).astype(np.float64).sum()
        assert same(np.array(replicas.sum_of_squares(x)), np.array(expected))


@given(lengths, seeds, weights)
@quick
def test_error_of_a_replica(length: int, seed: int, unit: float) -> None:
    x, n, out = vector(length, seed), units(length, seed), np.empty(length, dtype=np.float32)
    largest = replicas.error(x, n, np.float32(unit), out)
    assert same(out, x - n.astype(np.float32) * np.float32(unit))
    assert largest == np.abs(x).max(initial=0)
    assert type(largest) is float
    if length:
        x[length // 2] = np.nan
        assert np.isnan(replicas.error(x, n, np.float32(unit), x))


@given(lengths, seeds, st.floats(2.0**-20, 8.0), st.floats(0.5, 1.5), st.integers(0, 20))
@quick
def test_symbols_of_a_dead_zone(length: int, seed: int, step: float, width: float, shift: int) -> None:
    x, n = vector(length, seed), units(length, seed + 1, 2**20)
    x[np.abs(x) > 1e6] = np.float32(step * width)
    threshold, most = width * step, min((2**30 - 1) >> shift, (2**30 - 1 >> shift) - 64 if shift < 6 else 2**31)
    v = torch.from_numpy(x)
    expected = (v.abs() * (1.0 / step)).round_().clamp_(min=1.0, max=float(most))
    expected = expected.mul_(torch.sign(v)).mul_(v.abs().ge_(threshold)).to(torch.int32)
    symbols, after = np.empty_like(n), np.empty_like(n)
    coefficients, unit = vector(length, seed + 2), np.float32(step / 3)
    given_ = unit, np.float32(1.0 / step), np.float32(threshold), np.float32(most), np.int32(1 << shift)
    replicas.quantize(x, coefficients, n, *given_, symbols, after)
    assert same(symbols, expected.numpy())
    with np.errstate(over="ignore"):
        assert same(after, n + symbols * np.int32(1 << shift))
    assert same(x, coefficients - after.astype(np.float32) * unit)


@given(lengths, seeds, st.integers(0, 29), st.integers(1, 2**30 - 1))
@quick
def test_a_replica_advances_within_its_limit(length: int, seed: int, shift: int, most: int) -> None:
    limit, multiple = 2**30 - 1, 1 << shift
    n, symbols = units(length, seed), units(length, seed + 1, min(most, 2 * limit // multiple))
    after = np.empty_like(n)
    exact = n.astype(np.int64) + symbols.astype(np.int64) * multiple
    fits = bool((np.abs(symbols.astype(np.int64)) * multiple <= limit).all() and (np.abs(exact) <= limit).all())
    assert replicas.advance(n, symbols, np.int32(multiple), limit, after) == fits
    if fits:
        assert np.array_equal(after, exact)


@given(lengths, seeds)
@quick
def test_nonzero_symbols(length: int, seed: int) -> None:
    symbols = units(length, seed)
    expected = np.flatnonzero(symbols)
    positions, values = np.empty((2, len(expected) + 1), dtype=np.int32)
    replicas.nonzero(symbols, positions, values)
    assert np.array_equal(positions[:-1], expected)
    assert np.array_equal(values[:-1], symbols[expected])


def test_a_symbol_of_the_largest_magnitude_is_no_step() -> None:
    n, symbols = np.zeros(3, dtype=np.int32), np.array([0, -(2**31), 0], dtype=np.int32)
    for multiple in (1, 2, 2**29):
        assert not replicas.advance(n, symbols, np.int32(multiple), 2**30 - 1, np.empty_like(n))


# --- Compilation ------------------------------------------------------------------------------------------


@kernel
def _multiply_and_add(x: Any, y: Any, z: Any, out: Any) -> None:
    for i in range(len(out)):
        out[i] = x[i] * y[i] + z[i]


def test_nothing_is_contracted() -> None:
    rng = np.random.default_rng(0)
    x, y, z = rng.standard_normal((3, 10_000)).astype(np.float32)
    out = np.empty_like(x)
    _multiply_and_add(x, y, z, out)
    assert same(out, x * y + z)
    assert not same(out, fma(x, y, z))


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout.strip()


def test_numba_is_imported_with_the_first_call_and_few_symbols_need_none() -> None:
    code = """
import sys, jwins, jwins.sharing, jwins.kernels.wavelet
import numpy as np
from jwins.wire.symbols import decode_symbols, encode_symbols
print("numba" in sys.modules)
some = np.arange(-50, 50, dtype=np.int32)
back = decode_symbols(memoryview(encode_symbols(some, [100])), count=100, runs=[100])
print(np.array_equal(back, some), "numba" in sys.modules)
"""
    assert run(code).split() == ["False", "True", "False"]


_SAVE = """
import numpy as np
from jwins.kernels.compiler import compiled
from jwins.kernels.mixing import add_all
x = np.ones(4, dtype=np.float32)
add_all(x, x, x, np.float32(1))
stats = compiled(add_all).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_what_one_process_compiles_others_load(tmp_path: Path) -> None:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(_SAVE, **environment) == "0 1"
    assert run(_SAVE, **environment) == "1 0"


def test_a_damaged_cache_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))

    def loaded() -> bool:
        fresh = kernel(_multiply_and_add.plain)
        x = np.ones(4, dtype=np.float32)
        fresh(x, x, x, x)
        hits, misses = (sum(times.values()) for times in compiled(fresh).stats[1:])
        assert hits + misses == 1
        return bool(hits)

    assert not loaded()
    for ending in ("nbi", "nbc"):
        files = list(tmp_path.rglob(f"*.{ending}"))
        assert files
        for file in files:
            file.write_bytes(b"")
        assert not loaded()
        assert loaded()


_FULL_DISK = """
import resource, signal, tempfile
tempfile.tempdir = "/tmp"  # or Python looks for one by writing files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes")
def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path: Path) -> None:
    assert run(_FULL_DISK + _SAVE, NUMBA_CACHE_DIR=str(tmp_path)) == "0 1"
    assert not list(tmp_path.rglob("*.nbc"))


def test_a_folder_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core import caching

    class Nowhere:
        @classmethod
        def from_function(cls, function: Any, file: str) -> None:
            return None

    usual = caching.CacheImpl._locator_classes
    monkeypatch.setattr(
        caching.CacheImpl, "_locator_classes", [c for c in usual if "UserProvided" in c.__name__]
    )
    monkeypatch.setattr("jwins.kernels.compiler.tempfile.gettempdir", lambda: str(tmp_path))
    fresh = kernel(_multiply_and_add.plain)
    x = np.ones(4, dtype=np.float32)
    fresh(x, x, x, x)
    assert x.tolist() == [2.0] * 4
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert list(folder.rglob("*.nbc"))
    folder.chmod(0o777)  # somebody else could have put code there
    other = kernel(_multiply_and_add.plain)
    other(x, x, x, x)
    assert compiled(other)._cache.cache_path is None
