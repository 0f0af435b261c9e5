"""Rounding to integer symbols: what a quantizer does to numbers that are already counted in its steps.

The functions take numbers in steps, ``values / step``, so that a step may differ from subband to subband, and
give back symbols. A symbol stands for its number of steps, changed by the offset and the dither of
:class:`jwins.sharing.update.Quantized`. Symbols are int32; numbers of more than :data:`MAX_STEPS` steps are cut
off there.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_STEPS", "absmax_scales", "blocks", "to_dithered", "to_either_side", "to_nearest"]

MAX_STEPS = 2**31 - 128
"""The largest float32 that int32 holds."""

_SMALLEST = 2.0**-126
_MAX_BFLOAT16 = 3.3895313892515355e38


def to_nearest(steps: Tensor, dead_zone: float = 0.5) -> Tensor:
    """Symbols of numbers, the boundaries between symbols being one step apart around a zone that becomes 0.

    The symbol is ``sign(x) * floor(|x| + 1 - dead_zone)``. At 1/2 this rounds to the nearest symbol, ties away
    from zero. A wider zone costs some accuracy, and makes more zeros, which cost few bits: for a Laplacian
    distribution and a given rate, boundaries of this form are best. Source: G. J. Sullivan, "Efficient Scalar
    Quantization of Exponential and Laplacian Random Variables", IEEE Trans. Inf. Theory 42(5), 1996.

    Args:
        steps: (...) float32, finite.
        dead_zone: how many steps from zero the first boundary is, in [1/2, 1].

    Returns:
        (...) int32 symbols, off by at most ``dead_zone``.

    >>> to_nearest(torch.tensor([0.4, -0.6, 1.6])), to_nearest(torch.tensor([0.4, -0.6, 1.6]), dead_zone=0.7)
    (tensor([ 0, -1,  2], dtype=torch.int32), tensor([0, 0, 1], dtype=torch.int32))
    """
    magnitudes = steps.abs().add_(1.0 - dead_zone).floor_()
    return _symbols(magnitudes.copysign_(steps))


def to_dithered(steps: Tensor, dither: Tensor) -> Tensor:
    """Symbols of numbers to which a dither was added; the receivers subtract it again.

    With :func:`jwins.sharing.update.dither`, the error ``symbol - dither - x`` is uniform in [-1/2, 1/2] and
    independent of the numbers, so its mean is 0, also where all of them are smaller than a step. Source: as
    there.

    Args:
        steps: (...) float32, finite.
        dither: as many numbers, uniform in (-1/2, 1/2).

    Returns:
        (...) int32 symbols.
    """
    return _symbols((steps + dither).round_())


def to_either_side(steps: Tensor, uniform: Tensor) -> Tensor:
    """Stochastic rounding: the symbol above or below, such that the mean is the number itself.

    The error is less than 1, and its variance up to 1/4; a whole number stays as it is.

    Args:
        steps: (...) float32, finite.
        uniform: as many random numbers, uniform in [0, 1).

    Returns:
        (...) int32 symbols: ``floor(x)``, or ``floor(x) + 1`` with the probability ``x - floor(x)``.
    """
    below = steps.floor()
    return _symbols(below.add_(uniform < steps - below))


def blocks(count: int, block: int) -> tuple[int, ...]:
    """Lengths of the blocks that ``count`` numbers make: all ``block``, but for a shorter last one.

    >>> blocks(10, 4)
    (4, 4, 2)
    """
    whole, rest = divmod(count, block)
    return (block,) * whole + (rest,) * (rest > 0)


def absmax_scales(values: Tensor, block: int, largest: int) -> Tensor:
    """Steps with which the largest magnitude of each block is the symbol ``largest``, or just below.

    They are rounded up to bfloat16, which takes two bytes on the wire. A block of zeros has step 1.

    Args:
        values: (k,) float32, finite.
        block: how many values share a step.
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
