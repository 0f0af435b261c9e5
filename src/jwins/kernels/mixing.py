"""Sums of weighted differences. Each difference is rounded, and then ``weight * difference + sum``, once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jwins.kernels.compiler import fma, kernel

Vector = npt.NDArray[np.float32]
Units = npt.NDArray[np.int32]


@kernel
def add_all(change: Vector, values: Vector, own: Vector, weight: np.float32) -> None:
    """Compute ``change += weight * (values - own)``, all (C,)."""
    for i in range(len(change)):
        change[i] = fma(values[i] - own[i], weight, change[i])


@kernel
def add_some(
    change: Vector,
    positions: npt.NDArray[np.int64],
    first: int,
    values: Vector,
    own: Vector,
    weight: np.float32,
) -> bool:
    """Compute the same with ``values`` (k,) at ``positions - first`` (k,) only; other differences are 0.

    Returns:
        False if the positions do not increase or one is out of range; ``change`` is invalid then.
    """
    at = 0
    if not _has_negative_zero(change):  # so that adding 0 changes nothing
        for k in range(len(positions)):
            position = positions[k] - first
            if position < at or position >= len(change):
                return False
            change[position] = fma(values[k] - own[position], weight, change[position])
            at = position + 1
        return True
    for k in range(len(positions)):
        position = positions[k] - first
        if position < at or position >= len(change):
            return False
        for i in range(at, position):
            change[i] += np.float32(0)  # -0.0 becomes 0.0
        change[position] = fma(values[k] - own[position], weight, change[position])
        at = position + 1
    for i in range(at, len(change)):
        change[i] += np.float32(0)
    return True


@kernel
def _has_negative_zero(numbers: Vector) -> bool:
    found = False
    for bits in numbers.view(np.int32):
        found |= bits == np.int32(-0x80000000)
    return found


@kernel
def add_replicas(
    change: Vector, one: Units, weight: np.float32, other: Units, of_other: np.float32, own: Units
) -> None:
    """Compute ``change += weight * (one - own)`` and the same of the other, of whole numbers, all (C,)."""
    for i in range(len(change)):
        total = fma(np.float32(np.int32(one[i] - own[i])), weight, change[i])
        change[i] = fma(np.float32(np.int32(other[i] - own[i])), of_other, total)


@kernel
def hold_back(
    change: Vector,
    unsent: Vector,
    residual: Vector,
    weight: np.float32,
    rate: np.float32,
    rest: np.float32,
    after: Vector,
) -> None:
    """Subtract the unsent values from the change, and return a fraction of the accumulated residual to it.

    Args:
        change: (C,), written.
        unsent: (C,).
        residual: (C,), accumulated residual.
        weight: weight of ``unsent``.
        rate: fraction of the residual that is returned.
        rest: fraction of the residual that remains.
        after: (C,), written: the residual of the next round.
    """
    for i in range(len(change)):
        held_back = unsent[i] * weight
        total = held_back + residual[i]
        change[i] = fma(total, rate, change[i] - held_back)
        after[i] = total * rest
