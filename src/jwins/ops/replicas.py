"""Operations of the closed loop on coefficients: quantize against a replica, advance replicas, hold residuals
back.

On a long vector on the CPU each function is one pass of a compiled loop; otherwise a few operations of torch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jwins.kernels import mixing as mixing_kernels
from jwins.kernels import replicas as kernels
from jwins.ops.arrays import array, kernels_pay


def error(coefficients: Tensor, replica: Tensor, unit: float) -> tuple[Tensor, float]:
    """Return ``coefficients - unit * replica``, and the largest magnitude of the coefficients.

    Args:
        coefficients: (C,) float32.
        replica: (C,) int32.
        unit: a float32.

    Returns:
        (C,) float32, and a number, NaN if a coefficient is NaN.
    """
    if not kernels_pay(coefficients):
        known = replica.to(torch.float32).mul_(unit)
        largest = float(coefficients.abs().max()) if len(coefficients) else 0.0
        return torch.sub(coefficients, known, out=known), largest
    wanted = torch.empty_like(coefficients)
    largest = kernels.error(array(coefficients), array(replica), np.float32(unit), array(wanted))
    return wanted, largest


def stepped_(
    wanted: Tensor,
    coefficients: Tensor,
    replica: Tensor,
    unit: float,
    threshold: float,
    limit: int,
    multiple: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize as :func:`quantize_with_dead_zone`, and return the resulting replica and the error, too.

    Args:
        wanted: (C,) float32, the :func:`error` of the replica; its memory is used for the result.
        coefficients: (C,) float32.
        replica: (C,) int32.
        unit: a float32.
        threshold: values below it in magnitude become 0; others become at least one step.
        limit: largest magnitude of a symbol.
        multiple: a step in units of the replica; ``limit * multiple`` is below 2^30.

    Returns:
        Symbols and ``replica + multiple * symbols``, both (C,) int32, and the error of that, (C,) float32.
    """
    if not kernels_pay(wanted):
        symbols = quantize_with_dead_zone(wanted, unit * multiple, threshold, limit)
        after = torch.add(replica, symbols, alpha=multiple)
        return symbols, after, error(coefficients, after, unit)[0]
    symbols, after = torch.empty_like(replica), torch.empty_like(replica)
    kernels.quantize(
        array(wanted),
        array(coefficients),
        array(replica),
        np.float32(unit),
        np.float32(1.0 / (unit * multiple)),
        np.float32(threshold),
        np.float32(_largest(limit)),
        np.int32(multiple),
        array(symbols),
        array(after),
    )
    return symbols, after, wanted


def quantize_with_dead_zone(values: Tensor, step: float, threshold: float, limit: int = 2**30 - 1) -> Tensor:
    """Return symbols of a uniform quantizer with a dead zone.

    Args:
        values: (k,) float32.
        step: step of the quantizer.
        threshold: values below it in magnitude become 0; others become at least one step.
        limit: largest magnitude of a symbol; the rest follows in the next round.

    Returns:
        (k,) int32.

    >>> quantize_with_dead_zone(torch.tensor([-0.7, 0.2, 0.6, 1.4, 2.6]), step=1.0, threshold=0.6)
    tensor([-1,  0,  1,  1,  3], dtype=torch.int32)
    """
    magnitude = values.abs()
    symbols = (magnitude * (1.0 / step)).round_().clamp_(min=1.0, max=float(_largest(limit)))
    symbols.mul_(torch.sign(values)).mul_(magnitude.ge_(threshold))  # 1.0 or 0.0
    return symbols.to(torch.int32)


def nonzero(symbols: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the positions (k,) int32 of nonzero symbols, and these symbols, (k,) int32.

    Args:
        symbols: (C,) int32 on the CPU; C < 2^31.
        count: k.
    """
    if not kernels_pay(symbols):
        positions = torch.nonzero(symbols).squeeze(-1)
        return positions.to(torch.int32), symbols[positions]
    found, values = np.empty(count + 1, dtype=np.int32), np.empty(count + 1, dtype=np.int32)
    kernels.nonzero(array(symbols), found, values)
    return torch.from_numpy(found[:count]), torch.from_numpy(values[:count])


def advance(replica: Tensor, symbols: Tensor, multiple: int, limit: int) -> Tensor | None:
    """Return ``replica + multiple * symbols``; None if a product or a sum exceeds ``limit`` in magnitude.

    Args:
        replica: (C,) int32.
        symbols: (C,) int32, any.
        multiple: at least 1.
        limit: below 2^30.
    """
    symbols = symbols.to(replica.device)
    if not kernels_pay(replica):
        if not _within(symbols, limit // multiple):
            return None
        after = torch.add(replica, symbols, alpha=multiple)
        return after if _within(after, limit) else None
    after = torch.empty_like(replica)
    fits = kernels.advance(array(replica), array(symbols), np.int32(multiple), limit, array(after))
    return after if fits else None


def hold_back(change: Tensor, unsent: Tensor, residual: Tensor | None, weight: float, rate: float) -> Tensor:
    """Subtract ``weight * unsent`` from ``change``, and return a fraction of the accumulated residual to it.

    Args:
        change: (C,) float32, written.
        unsent: (C,) float32.
        residual: (C,) float32, accumulated residual; None for 0.
        weight: weight of ``unsent``.
        rate: fraction of the residual that is returned, in [0, 1].

    Returns:
        (C,) float32, the residual of the next round.
    """
    if not kernels_pay(change):
        held_back = unsent * weight
        change.sub_(held_back)
        total = held_back if residual is None else held_back.add_(residual)
        change.add_(total, alpha=rate)
        return total.mul_(1.0 - rate)
    if residual is None:
        residual = torch.full_like(unsent, -0.0)  # adding it changes no x
    after = torch.empty_like(residual)
    mixing_kernels.hold_back(
        array(change),
        array(unsent),
        array(residual),
        np.float32(weight),
        np.float32(rate),
        np.float32(1.0 - rate),
        array(after),
    )
    return after


def mean_square(values: Tensor) -> float:
    """Return the mean of the squares of (k,) float32. Squares are rounded to float32 and summed in float64."""
    if not kernels_pay(values):
        return float(values.square().mean(dtype=torch.float64))
    return kernels.sum_of_squares(array(values)) / len(values)


def _largest(limit: int) -> int:
    """Return the largest float32 that is at most ``limit``."""
    return limit if limit < 1 << 24 else limit - 64


def _within(units: Tensor, limit: int) -> bool:
    if not len(units):
        return True
    least, largest = torch.aminmax(units)
    return int(least) >= -limit and int(largest) <= limit
