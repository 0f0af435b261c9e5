"""Replicas in whole numbers of a unit, and the symbols that advance them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jwins.kernels.compiler import kernel

Vector = npt.NDArray[np.float32]
Units = npt.NDArray[np.int32]


@kernel
def sum_of_squares(x: Vector) -> float:
    """Return the sum of the squares, each rounded to float32. Adds pairwise, in the order of numpy."""
    if len(x) < 8:
        total = 0.0
        for value in x:
            total += np.float64(np.float32(value * value))
        return total
    if len(x) > 128:
        half = len(x) // 2
        half -= half % 8
        return sum_of_squares(x[:half]) + sum_of_squares(x[half:])
    of_eight = np.zeros(8)
    whole = len(x) - len(x) % 8
    for start in range(0, whole, 8):
        for k in range(8):
            of_eight[k] += np.float64(np.float32(x[start + k] * x[start + k]))
    a, b, c, d, e, f, g, h = of_eight
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for value in x[whole:]:
        total += np.float64(np.float32(value * value))
    return total


@kernel
def error(coefficients: Vector, replica: Units, unit: np.float32, out: Vector) -> float:
    """Compute ``coefficients - unit * replica``, all (C,); ``out`` is written and may be ``coefficients``.

    Returns:
        The largest magnitude of the coefficients; NaN if one of them is NaN.
    """
    bits = coefficients.view(np.int32)
    largest = np.int32(0)  # magnitudes have the order of their bits, and integers are compared faster
    for i in range(len(out)):
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        out[i] = coefficients[i] - np.float32(replica[i]) * unit
    of_all: Vector = np.array([largest], dtype=np.int32).view(np.float32)
    return float(of_all[0])


@kernel
def quantize(
    wanted: Vector,
    coefficients: Vector,
    replica: Units,
    unit: np.float32,
    per_step: np.float32,
    threshold: np.float32,
    most: np.float32,
    multiple: np.int32,
    symbols: Units,
    after: Units,
) -> None:
    """Compute whole steps of ``wanted``, 0 in a dead zone and at least one outside, and the replica after them.

    Args:
        wanted: (C,), difference of the coefficients to the replica; overwritten with that to the next replica.
        coefficients: (C,).
        replica: (C,).
        unit: of the replica.
        per_step: 1 / step.
        threshold: end of the dead zone.
        most: largest magnitude of a symbol; below 2^31.
        multiple: a step in units.
        symbols: (C,), written.
        after: (C,), written: ``replica + multiple * symbols``.
    """
    for i in range(len(wanted)):
        magnitude = abs(wanted[i])
        steps = min(max(np.rint(magnitude * per_step), np.float32(1)), most)
        symbol = np.int32(steps) if magnitude >= threshold and magnitude > 0 else np.int32(0)
        symbol = np.int32(-symbol) if wanted[i] < 0 else symbol
        symbols[i] = symbol
        units = np.int32(replica[i] + np.int32(multiple * symbol))
        after[i] = units
        wanted[i] = coefficients[i] - np.float32(units) * unit


@kernel
def nonzero(symbols: Units, positions: Units, values: Units) -> None:
    """Find the k nonzero symbols.

    Args:
        symbols: (C,).
        positions: (k + 1,), of which the first k are written.
        values: (k + 1,), likewise.
    """
    found = 0
    for i in range(len(symbols)):
        positions[found] = i
        values[found] = symbols[i]
        found += symbols[i] != 0


@kernel
def advance(replica: Units, symbols: Units, multiple: np.int32, limit: int, after: Units) -> bool:
    """Add ``multiple * symbols`` to a replica.

    Args:
        replica: (C,), of magnitudes up to ``limit``.
        symbols: (C,), any.
        multiple: at least 1.
        limit: at most 2^30.
        after: (C,), written.

    Returns:
        Whether no product and no sum exceeds ``limit`` in magnitude; if False, ``after`` is invalid.
    """
    least = most = np.int32(0)
    lowest = highest = np.int32(0)
    for i in range(len(after)):
        symbol = symbols[i]
        least, most = min(least, symbol), max(most, symbol)
        units = np.int32(replica[i] + np.int32(multiple * symbol))
        lowest, highest = min(lowest, units), max(highest, units)
        after[i] = units
    few = limit // multiple
    return bool(least >= -few and most <= few and lowest >= -limit and highest <= limit)
