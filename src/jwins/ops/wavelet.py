"""The discrete wavelet transform of flat parameter vectors, on CPU and CUDA.

On the CPU PyWavelets transforms short vectors. The loops of :mod:`jwins.kernels.wavelet` transform long ones,
on one thread and without the interpreter lock; they use PyWavelets' filters and give the same bits. On other
devices the same filter bank runs as a strided convolution, written as one scaled addition per filter tap:
unlike ``conv1d``, which may round its inputs to TF32, it keeps all bits of float32, and it adds in the same
order each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pywt
import torch
from torch import Tensor

from jwins.errors import ConfigError, UsageError
from jwins.kernels import wavelet as kernels
from jwins.ops.arrays import kernels_pay
from jwins.validation import MAX_LEVELS

Mode = Literal["symmetric", "periodization"]


@dataclass(frozen=True, slots=True)
class Wavelet:
    """A multi-level discrete wavelet transform.

    The coefficients of a vector of P numbers are one vector of C numbers, coarsest first:
    ``[cA_n, cD_n, ..., cD_1]``, as ``pywt.wavedec`` orders them.

    Any number of levels is accepted for any length; there is no warning when a vector is shorter than the
    filter. With ``symmetric``, a short vector is reflected as often as needed, each level of it has at
    least ``filter length - 1`` coefficients, and C grows by about that much per level. With
    ``periodization``, the vector is first padded with zeros to a multiple of ``2**levels``, and C is the
    padded length; for an orthogonal wavelet the transform is then orthonormal. In both modes ``inverse``
    returns the vector up to rounding; only ``dmey``, whose published filter is truncated, errs by about 1 %.

    Attributes:
        name: a discrete wavelet of PyWavelets, orthogonal or biorthogonal, e.g. ``sym2``, ``db4``, ``bior2.2``.
        levels: number of times that the coarse half is split, 0 (the identity) to 24.
        mode: extension beyond the ends of the vector.

    Raises:
        ConfigError: an unknown wavelet or mode, or a number of levels out of range.

    >>> haar = Wavelet("haar", levels=1, mode="periodization")
    >>> c = haar.forward(torch.tensor([1.0, 1.0, 3.0, 3.0]))
    >>> [round(v, 3) for v in c.tolist()]
    [1.414, 4.243, 0.0, 0.0]
    >>> [round(v, 3) for v in haar.inverse(c, 4).tolist()]
    [1.0, 1.0, 3.0, 3.0]
    """

    name: str = "sym2"
    levels: int = 4
    mode: Mode = "symmetric"

    def __post_init__(self) -> None:
        if self.name not in _names():
            raise ConfigError(
                "sharing.wavelet", self.name, "expected a discrete wavelet of PyWavelets, such as sym2 or db4"
            )
        if type(self.levels) is not int or not 0 <= self.levels <= MAX_LEVELS:
            raise ConfigError("sharing.levels", self.levels, f"expected an integer, 0 to {MAX_LEVELS}")
        if self.mode not in ("symmetric", "periodization"):
            raise ConfigError("sharing.mode", self.mode, "expected symmetric or periodization")

    def subbands(self, dim: int) -> tuple[int, ...]:
        """Return the lengths of ``[cA_n, cD_n, ..., cD_1]`` of a vector of ``dim`` numbers; they sum to C."""
        return _plan(self.name, self.levels, self.mode, _checked_dim(dim)).subbands

    def subband_counts(self, positions: Tensor | None, dim: int) -> tuple[int, ...]:
        """Count the given coefficients in each subband.

        Args:
            positions: (k,) int64, strictly increasing, each in range(C); None for all C.
            dim: P, the length of the vector.

        Returns:
            One number for each of :meth:`subbands`; they sum to k.

        >>> haar = Wavelet("haar", levels=2, mode="periodization")
        >>> haar.subbands(8), haar.subband_counts(torch.tensor([0, 4, 5, 7]), 8)
        ((2, 2, 4), (1, 0, 3))
        """
        lengths = self.subbands(dim)
        if positions is None:
            return lengths
        ends = torch.tensor(lengths, device=positions.device).cumsum(0)
        found = torch.searchsorted(positions, ends)
        return tuple(torch.diff(found, prepend=torch.zeros_like(found[:1])).tolist())

    def size(self, dim: int) -> int:
        """Return C, the number of coefficients of a vector of ``dim`` numbers; C >= ``dim``.

        >>> Wavelet("sym2", levels=4).size(328), Wavelet("sym2", 4, "periodization").size(328)
        (338, 336)
        """
        return _plan(self.name, self.levels, self.mode, _checked_dim(dim)).size

    def forward(self, x: Tensor) -> Tensor:
        """Transform each vector along the last dimension.

        Args:
            x: (..., P) float32, P >= 1.

        Returns:
            (..., C) float32, a new tensor on the same device.

        Raises:
            UsageError: not float32, or no numbers at all.
        """
        _check_dtype("Wavelet.forward", x)
        plan = _plan(self.name, self.levels, self.mode, _checked_dim(x.shape[-1] if x.dim() else 0))
        x = x.detach()
        if x.device.type != "cpu":
            return forward_torch(self, x)
        return _forward_compiled(plan, x) if kernels_pay(x) else _forward_pywt(plan, x)

    def inverse(self, c: Tensor, dim: int) -> Tensor:
        """Compute vectors of ``dim`` numbers from their coefficients.

        Args:
            c: (..., C) float32 with C = ``size(dim)``.
            dim: P, the length of the original vector.

        Returns:
            (..., P) float32, a new tensor on the same device.

        Raises:
            UsageError: not float32, or not the number of coefficients of a vector of ``dim`` numbers.
        """
        _check_dtype("Wavelet.inverse", c)
        plan = _plan(self.name, self.levels, self.mode, _checked_dim(dim))
        if c.dim() == 0 or c.shape[-1] != plan.size:
            raise UsageError(
                f"Wavelet.inverse: got coefficients of shape {tuple(c.shape)}, "
                f"but a vector of {dim} has {plan.size} coefficients"
            )
        c = c.detach()
        if c.device.type != "cpu":
            return inverse_torch(self, c, dim)
        return _inverse_compiled(plan, c) if kernels_pay(c) else _inverse_pywt(plan, c)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Lengths of all levels of one transform: level l+1 splits ``steps[l]`` numbers."""

    name: str
    mode: Mode
    dim: int
    steps: tuple[int, ...]
    subbands: tuple[int, ...]
    size: int

    @property
    def padded(self) -> int:
        return self.steps[0] if self.steps else self.dim


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    return frozenset(pywt.wavelist(kind="discrete"))


@lru_cache(maxsize=256)
def _filters(name: str) -> Any:
    return pywt.Wavelet(name)


@lru_cache(maxsize=1024)
def _plan(name: str, levels: int, mode: Mode, dim: int) -> _Plan:
    taps = _filters(name).dec_len
    length = -(-dim // 2**levels) * 2**levels if mode == "periodization" else dim
    steps, details = [], []
    for _ in range(levels):
        steps.append(length)
        length = length // 2 if mode == "periodization" else (length + taps - 1) // 2
        details.append(length)
    subbands = (length, *reversed(details))
    return _Plan(name, mode, dim, tuple(steps), subbands, sum(subbands))


def _check_dtype(where: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise UsageError(f"{where}: expected float32, got {str(tensor.dtype).removeprefix('torch.')}")


def _checked_dim(dim: int) -> int:
    if dim < 1:
        raise UsageError(f"Wavelet: dim = {dim}: expected a vector of at least one number")
    return dim


@dataclass(frozen=True, slots=True)
class _Taps:
    """Filters of one direction for the kernels: both as an array, and each as a tuple."""

    both: npt.NDArray[np.float32]
    low: tuple[np.float32, ...]
    high: tuple[np.float32, ...]


@lru_cache(maxsize=256)
def _taps(name: str, *, back: bool) -> _Taps:
    """Return the float32 taps of PyWavelets, which are not always its rounded float64 taps.

    They are read from its transform of a single 1 among zeros.
    """
    filters = _filters(name)
    taps, half = filters.dec_len, filters.dec_len // 2
    both = np.empty((2, taps), dtype=np.float32)
    one = np.zeros((2, 4 * taps), dtype=np.float32)
    if back:
        one[0, taps] = 1
        first = 2 * (taps - half + 1)
        for i in range(2):
            both[i] = pywt.idwt(one[i], one[1 - i], filters, "symmetric")[first : first + taps]
    else:
        one[0, 2 * taps + 1] = one[1, 2 * taps] = 1  # for the even taps, and for the odd ones
        for i, of_one in enumerate(pywt.dwt(one, filters, "symmetric")):
            both[i] = of_one[:, taps : taps + half].T.reshape(-1)
    return _Taps(both, tuple(both[0]), tuple(both[1]))


def _forward_compiled(plan: _Plan, x: Tensor) -> Tensor:
    if not plan.steps:
        return x.clone(memory_format=torch.contiguous_format)
    out = torch.empty((*x.shape[:-1], plan.size), dtype=torch.float32, device="cpu")
    taps, periodic = _taps(plan.name, back=False), plan.mode == "periodization"
    rows, coefficients = _rows(x), _rows(out)
    spare = np.empty((2, max(plan.subbands)), dtype=np.float32)
    kernels.forward(rows, taps.both, taps.low, taps.high, periodic, len(plan.steps), coefficients, spare)
    return out


def _inverse_compiled(plan: _Plan, c: Tensor) -> Tensor:
    if not plan.steps:
        return c.clone(memory_format=torch.contiguous_format)
    out = torch.empty((*c.shape[:-1], plan.dim), dtype=torch.float32, device="cpu")
    taps, periodic = _taps(plan.name, back=True), plan.mode == "periodization"
    steps = np.array(plan.steps, dtype=np.int64)
    spare = np.empty((2, max(plan.steps[1:], default=0)), dtype=np.float32)
    kernels.inverse(_rows(c), taps.both, taps.low, taps.high, periodic, steps, _rows(out), spare)
    return out


# PyWavelets, one level at a time: its own multi-level functions warn about short vectors.


def _forward_pywt(plan: _Plan, x: Tensor) -> Tensor:
    out = np.empty((*x.shape[:-1], plan.size), dtype=np.float32)
    if out.size:
        coarse: Any = np.zeros((*x.shape[:-1], plan.padded), dtype=np.float32)
        coarse[..., : plan.dim] = x.numpy()
        end = plan.size
        for _ in plan.steps:
            coarse, detail = pywt.dwt(coarse, _filters(plan.name), plan.mode)
            start = end - detail.shape[-1]
            out[..., start:end] = detail
            end = start
        out[..., :end] = coarse
    return torch.from_numpy(out)


def _inverse_pywt(plan: _Plan, c: Tensor) -> Tensor:
    out = np.empty((*c.shape[:-1], plan.dim), dtype=np.float32)
    if out.size:
        coarse, *details = np.split(c.numpy(), np.cumsum(plan.subbands[:-1]), axis=-1)
        for length, detail in zip(reversed(plan.steps), details, strict=True):
            coarse = pywt.idwt(coarse, detail, _filters(plan.name), plan.mode)[..., :length]
        out[...] = coarse[..., : plan.dim]
    return torch.from_numpy(out)


def _rows(vectors: Tensor) -> npt.NDArray[np.float32]:
    """Return vectors along the last dimension as the rows of a matrix."""
    return vectors.contiguous().view(-1, vectors.shape[-1]).numpy()


# The same filter bank in torch. With F taps (always even) and the extended vector e:
#   symmetric      c[i] = sum_j dec[j] e[2i + 1 - j]      for i < (n + F - 1) // 2
#   periodization  c[i] = sum_j dec[j] e[2i + F/2 - j]    for i < n / 2
# and back, with t = k + F - 2 (symmetric) or k + F/2 - 1 (periodization, circular) and e = t mod 2:
#   x[k] = sum_p recL[2p + e] cA[(t - e)/2 - p] + recH[2p + e] cD[(t - e)/2 - p]


@lru_cache(maxsize=256)
def _border(n: int, before: int, after: int, mode: Mode, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions that extend a vector of n beyond both ends."""

    def source(index: Tensor) -> Tensor:
        if mode == "periodization":
            return index % n
        index = index % (2 * n)
        return torch.where(index < n, index, 2 * n - 1 - index)

    return source(torch.arange(-before, 0, device=device)), source(torch.arange(n, n + after, device=device))


def _extend(x: Tensor, before: int, after: int, mode: Mode) -> Tensor:
    left, right = _border(x.shape[-1], before, after, mode, x.device)
    return torch.cat([x.index_select(-1, left), x, x.index_select(-1, right)], dim=-1)


def _convolve(terms: list[tuple[float, Tensor]]) -> Tensor:
    weight, first = terms[0]
    total = first * weight
    for weight, term in terms[1:]:
        if weight:
            total.add_(term, alpha=weight)
    return total


def _split(x: Tensor, wavelet: Any, mode: Mode) -> tuple[Tensor, Tensor]:
    n, taps = x.shape[-1], wavelet.dec_len
    count = n // 2 if mode == "periodization" else (n + taps - 1) // 2
    last = taps // 2 if mode == "periodization" else 1  # tap j of coefficient i reads e[2i + last - j]
    before = taps - 1 - last
    extended = _extend(x, before, max(0, 2 * (count - 1) + last + 1 - n), mode)

    def subband(weights: list[float]) -> Tensor:
        starts = [before + last - j for j in range(taps)]
        return _convolve(
            [(w, extended[..., s : s + 2 * count - 1 : 2]) for w, s in zip(weights, starts, strict=True)]
        )

    return subband(wavelet.dec_lo), subband(wavelet.dec_hi)


def _join(approximation: Tensor, detail: Tensor, wavelet: Any, mode: Mode) -> Tensor:
    count, half = approximation.shape[-1], wavelet.rec_len // 2
    if mode == "periodization":
        pairs = count
        low = _extend(approximation, half - 1, 0, mode)
        high = _extend(detail, half - 1, 0, mode)
    else:
        pairs = count - half + 1
        low, high = approximation, detail

    def phase(parity: int) -> Tensor:
        taps = ((wavelet.rec_lo, low), (wavelet.rec_hi, high))
        return _convolve(
            [
                (weights[2 * p + parity], subband[..., half - 1 - p : half - 1 - p + pairs])
                for weights, subband in taps
                for p in range(half)
            ]
        )

    joined = torch.stack([phase(0), phase(1)], dim=-1).flatten(-2)
    return torch.roll(joined, 1 - half, dims=-1) if mode == "periodization" else joined


def forward_torch(wavelet: Wavelet, x: Tensor) -> Tensor:
    """Compute :meth:`Wavelet.forward` with torch's operations, on any device.

    Args:
        wavelet: the transform.
        x: (..., P) float32.

    Returns:
        (..., C) float32.
    """
    plan = _plan(wavelet.name, wavelet.levels, wavelet.mode, x.shape[-1])
    filters = _filters(plan.name)
    approximation = torch.nn.functional.pad(x, (0, plan.padded - plan.dim))
    details = []
    for _ in plan.steps:
        approximation, detail = _split(approximation, filters, plan.mode)
        details.append(detail)
    return torch.cat([approximation, *reversed(details)], dim=-1)


def inverse_torch(wavelet: Wavelet, c: Tensor, dim: int) -> Tensor:
    """Compute :meth:`Wavelet.inverse` with torch's operations, on any device.

    Args:
        wavelet: the transform.
        c: (..., C) float32.
        dim: P.

    Returns:
        (..., P) float32.
    """
    plan = _plan(wavelet.name, wavelet.levels, wavelet.mode, dim)
    filters = _filters(plan.name)
    vector, *details = torch.split(c, list(plan.subbands), dim=-1)
    for length, detail in zip(reversed(plan.steps), details, strict=True):
        vector = _join(vector, detail, filters, plan.mode)[..., :length]
    return vector[..., : plan.dim].clone()
