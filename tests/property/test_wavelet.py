"""The transform inverts for every length, says nothing, and agrees with PyWavelets on both engines."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jwins.errors import ConfigError, UsageError
from jwins.ops.wavelet import Wavelet, forward_torch, inverse_torch

WAVELETS = [
    "haar", "db2", "db4", "db8", "db38", "sym2", "sym4", "sym8", "coif1", "coif5", "bior1.3", "bior2.2",
    "bior4.4", "bior6.8", "rbio2.4", "rbio3.7",
]  # fmt: skip
MODES = ["symmetric", "periodization"]


def vector(length: int, seed: int, rows: tuple[int, ...] = ()) -> torch.Tensor:
    return torch.randn(*rows, length, generator=torch.Generator().manual_seed(seed))


def reference(w: Wavelet, x: torch.Tensor) -> np.ndarray:
    """Return the result of PyWavelets' own multi-level function, in float32."""
    padded = x.numpy()
    if w.mode == "periodization":
        padded = np.pad(padded, (0, -len(padded) % 2**w.levels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.concatenate(pywt.wavedec(padded, w.name, w.mode, w.levels))


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(WAVELETS),
    st.integers(0, 7),
    st.sampled_from(MODES),
    st.integers(1, 64) | st.integers(65, 3000),
    st.integers(0, 2**31),
)
def test_both_engines_agree_with_pywavelets_and_invert(name, levels, mode, length, seed):
    w, x = Wavelet(name, levels, mode), vector(length, seed)
    c = w.forward(x)
    assert c.shape == (w.size(length),)
    assert sum(w.subbands(length)) == w.size(length)
    assert w.subband_counts(None, length) == w.subbands(length)
    positions = torch.arange(0, w.size(length), 3)
    subband = torch.repeat_interleave(torch.tensor(w.subbands(length)))[positions]
    assert w.subband_counts(positions, length) == tuple(
        torch.bincount(subband, minlength=len(w.subbands(length))).tolist()
    )
    expected = reference(w, x)
    np.testing.assert_array_equal(c.numpy(), expected)
    largest = np.abs(expected).max()

    assert np.abs(forward_torch(w, x).numpy() - expected).max() <= 1e-5 * largest
    tolerance = 2e-5 * max(float(largest), float(x.abs().max()))
    assert float((w.inverse(c, length) - x).abs().max()) <= tolerance
    assert float((inverse_torch(w, c, length) - x).abs().max()) <= tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sym2", "bior2.2", "db8"])
def test_every_length_to_64_inverts(name, mode):
    for length in range(1, 65):
        for levels in (1, 4, 9):
            w, x = Wavelet(name, levels, mode), vector(length, length)
            assert float((w.inverse(w.forward(x), length) - x).abs().max()) < 2e-5, (length, levels)


@pytest.mark.parametrize(
    "taps",
    [range(2, 11), pytest.param([*range(12, 42, 2), 48, 62, 76, 102], marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_wavelets_agree_on_an_odd_length(taps):
    """Each length of filter is compiled by itself, the longest for half a minute: of these there are four."""
    x = vector(333, 5)
    names = [name for name in pywt.wavelist(kind="discrete") if pywt.Wavelet(name).dec_len in taps]
    assert len(names) > 20
    for name in names:
        for mode in MODES:
            w = Wavelet(name, 3, mode)
            expected = w.forward(x)
            got = forward_torch(w, x)
            assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), (name, mode)


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_transformed_each_by_itself(mode):
    w, x = Wavelet("sym2", 4, mode), vector(101, 1, (2, 3))
    c = w.forward(x)
    for i in range(2):
        for j in range(3):
            assert torch.equal(c[i, j], w.forward(x[i, j]))
            assert torch.equal(w.inverse(c, 101)[i, j], w.inverse(c[i, j], 101))
    assert torch.equal(w.forward(torch.zeros(0, 5)), torch.zeros(0, w.size(5)))


@pytest.mark.parametrize("mode", MODES)
def test_results_are_new_tensors_and_arguments_stay(mode):
    w, x = Wavelet("haar", 0, mode), vector(8, 2)
    before = x.clone()
    c = w.forward(x)
    c += 1
    assert torch.equal(x, before)
    back = w.inverse(c, 8)
    back += 1
    assert torch.equal(c, before + 1)
    noncontiguous = torch.stack([x, x], dim=1)[:, 0]
    assert torch.equal(Wavelet().forward(noncontiguous), Wavelet().forward(x))


def test_periodization_of_an_orthogonal_wavelet_keeps_the_norm():
    w, x = Wavelet("sym4", 4, "periodization"), vector(1003, 3)
    assert float(w.forward(x).norm()) == pytest.approx(float(x.norm()), rel=1e-5)
    assert w.size(1003) == 1008


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"sharing.wavelet = 'sym99'"):
        Wavelet("sym99")
    with pytest.raises(ConfigError, match=r"sharing.levels = 25"):
        Wavelet(levels=25)
    with pytest.raises(ConfigError, match=r"sharing.mode = 'zero'"):
        Wavelet(mode="zero")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="float64"):
        Wavelet().forward(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(UsageError, match="at least one"):
        Wavelet().forward(torch.zeros(0))
    with pytest.raises(UsageError, match="338 coefficients"):
        Wavelet().inverse(torch.zeros(328), 328)
    assert pickle.loads(pickle.dumps(Wavelet("db4", 3))) == Wavelet("db4", 3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu():
    cases = [
        (name, mode, length) for name in WAVELETS for mode in MODES for length in (*range(1, 65, 7), 89_834)
    ]
    for name, mode, length in cases:
        w = Wavelet(name, 4, mode)
        x = vector(length, length, (2,))
        expected = w.forward(x)
        c = w.forward(x.cuda())
        assert c.is_cuda
        assert float((c.cpu() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert float((w.inverse(c, length).cpu() - x).abs().max()) <= 1e-4
