"""Sums of weighted differences: each difference is rounded, then ``weight * difference + sum`` is, once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jwins.kernels.compiler import fma, kernel

__all__ = ["add_all", "add_replica", "add_some", "hold_back"]

Vector = npt.NDArray[np.float32]
Units = npt.NDArray[np.int32]


@kernel
def add_all(change: Vector, values: Vector, own: Vector, weight: np.float32) -> None:
    """``change += weight * (values - own)``, all (C,)."""
    for i in range(len(change)):
        change[i] = fma(values[i] - own[i], weight, change[i])


@kernel
def add_some(
    change: Vector, positions: npt.NDArray[np.int64], values: Vector, own: Vector, weight: np.float32
) -> None:
    """The same where only ``values`` (k,) at ``positions`` (k,) are known: elsewhere the difference is 0."""
    at = 0
    for k in range(len(positions)):
        for i in range(at, positions[k]):
            change[i] += np.float32(0)  # -0.0 becomes 0.0
        at = positions[k]
        change[at] = fma(values[k] - own[at], weight, change[at])
        at += 1
    for i in range(at, len(change)):
        change[i] += np.float32(0)


@kernel
def add_replica(change: Vector, theirs: Units, own: Units, weight: np.float32) -> None:
    """``change += weight * (theirs - own)`` of whole numbers, all (C,)."""
    for i in range(len(change)):
        change[i] = fma(np.float32(np.int32(theirs[i] - own[i])), weight, change[i])


@kernel
def hold_back(
    change: Vector, unsent: Vector, kept: Vector, weight: np.float32, part: np.float32, rest: np.float32
) -> None:
    """Take what was not sent off the change, and give back a part of what was taken off so far.

    Args:
        change: (C,), written.
        unsent: (C,).
        kept: (C,), taken off so far; written.
        weight: of ``unsent``.
        part: of ``kept``, given back.
        rest: of ``kept``, that remains.
    """
    for i in range(len(change)):
        held_back = unsent[i] * weight
        total = held_back + kept[i]
        change[i] = fma(total, part, change[i] - held_back)
        kept[i] = total * rest
