"""Rounding of numbers, in steps of a quantizer, to integer symbols.

The functions take numbers in steps, ``values / step``, so that a step may differ from subband to subband. They
return symbols. The value of a symbol is its number of steps, changed by the offset and the dither of
:class:`jwins.sharing.update.Quantized`. Symbols are int32; numbers are clipped at :data:`MAX_STEPS` steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_STEPS = 2**31 - 128
"""The largest float32 that fits int32."""

_SMALLEST = 2.0**-126
_MAX_BFLOAT16 = 3.3895313892515355e38


def to_nearest(steps: Tensor, dead_zone: float = 0.5) -> Tensor:
    """Round numbers to symbols, with a dead zone around 0 and boundaries one step apart beyond it.

    The symbol is ``sign(x) * floor(|x| + 1 - dead_zone)``. At 1/2 this rounds to the nearest symbol, ties away
    from zero. A wider zone is less accurate, but makes more zeros, which take few bits. For a Laplacian
    distribution and a given rate, boundaries of this form are best. Source: G. J. Sullivan, "Efficient Scalar
    Quantization of Exponential and Laplacian Random Variables", IEEE Trans. Inf. Theory 42(5), 1996.

    Args:
        steps: (...) float32, finite.
        dead_zone: distance of the first boundary from zero, in steps, in [1/2, 1].

    Returns:
        (...) int32 symbols, off by at most ``dead_zone``.

    >>> to_nearest(torch.tensor([0.4, -0.6, 1.6])), to_nearest(torch.tensor([0.4, -0.6, 1.6]), dead_zone=0.7)
    (tensor([ 0, -1,  2], dtype=torch.int32), tensor([0, 0, 1], dtype=torch.int32))
    """
    magnitudes = steps.abs().add_(1.0 - dead_zone).floor_()
    return _symbols(magnitudes.copysign_(steps))


def to_dithered(steps: Tensor, dither: Tensor) -> Tensor:
    """Round numbers to symbols after adding a dither, which receivers subtract again.

    With :func:`jwins.sharing.update.dither`, the error ``symbol - dither - x`` is uniform in [-1/2, 1/2] and
    independent of the numbers. So its mean is 0, even if all of them are smaller than a step. The source is
    given there.

    Args:
        steps: (...) float32, finite.
        dither: one number per value, uniform in (-1/2, 1/2).

    Returns:
        (...) int32 symbols.
    """
    return _symbols((steps + dither).round_())


def to_either_side(steps: Tensor, uniform: Tensor) -> Tensor:
    """Round stochastically to the symbol above or below, such that the mean is the number itself.

    The error is less than 1, and its variance at most 1/4. A whole number is not changed.

    Args:
        steps: (...) float32, finite.
        uniform: one random number per value, uniform in [0, 1).

    Returns:
        (...) int32 symbols: ``floor(x)``, or ``floor(x) + 1`` with the probability ``x - floor(x)``.
    """
    below = steps.floor()
    return _symbols(below.add_(uniform < steps - below))


def blocks(count: int, block: int) -> tuple[int, ...]:
    """Return the lengths of the blocks of ``count`` numbers: ``block``, and a shorter last one.

    >>> blocks(10, 4)
    (4, 4, 2)
    """
    whole, rest = divmod(count, block)
    return (block,) * whole + (rest,) * (rest > 0)


def absmax_scales(values: Tensor, block: int, largest: int) -> Tensor:
    """Return steps such that the largest magnitude of each block is the symbol ``largest``, or just below.

    They are rounded up to bfloat16, which takes two bytes on the wire. A block of zeros has step 1.

    Args:
        values: (k,) float32, finite.
        block: number of values that share a step.
        largest: symbol of the largest magnitude, at least 1.

    Returns:
        (g,) float32, > 0, one for each of :func:`blocks`.
    """
    padding = -len(values) % block
    magnitudes = torch.nn.functional.pad(values.abs(), (0, padding)).view(-1, block).amax(dim=1)
    scales = (magnitudes / largest).clamp_(min=_SMALLEST)
    bits = scales.view(torch.int32)
    raised = ((bits + 0xFFFF) & -0x10000).view(torch.float32).clamp_(max=_MAX_BFLOAT16)
    return torch.where(magnitudes > 0, raised, 1.0)


def _symbols(whole: Tensor) -> Tensor:
    return whole.clamp_(-MAX_STEPS, MAX_STEPS).to(torch.int32)
