"""Vectors as whole numbers of a common unit, and steps that are powers of two times that unit.

Sums of whole numbers have no rounding error. So a replica of whole numbers is the same on every CPU, in any
order of its increments, however each machine rounds its wavelets. Several increments can be sent again as one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jwins.ops.replicas import advance
from jwins.sharing.update import Quantized, Update, one_scale

FINEST = 2.0**-20
"""The unit of adaptive steps: about 1e-6."""

LIMIT = 2**30 - 1
"""Largest whole number on a grid; sums and differences of two still fit 32 bits."""


@dataclass(frozen=True, slots=True)
class StepGrid:
    """Multiples of ``unit`` from ``-LIMIT`` to ``LIMIT``.

    Attributes:
        unit: a float32 above 0.
    """

    unit: float

    def multiple(self, step: float) -> int:
        """Return the power of two, at least 1, whose multiple of ``unit`` is nearest to ``step`` in ratio.

        >>> [StepGrid(0.5).multiple(step) for step in (0.1, 0.5, 0.7, 0.8, 4.0)]
        [1, 1, 1, 2, 8]
        """
        most = LIMIT.bit_length() - 1
        ratio = min(step / self.unit, 2.0**most)  # infinite where the square of a change overflowed
        return 1 << max(0, round(math.log2(ratio)))

    def values(self, units: Tensor) -> Tensor:
        """Return (C,) float32 values of (C,) int32 units."""
        return units.to(torch.float32).mul_(self.unit)

    def advanced(self, units: Tensor, update: Update) -> Tensor | None:
        """Return ``units`` (C,) int32 after an update of symbols; None if the update does not fit this grid."""
        values = update.values
        if not isinstance(values, Quantized) or values.dither is not None or values.offset:
            return None
        multiples = [self.multiple_of(scale) for scale in values.scales.tolist()]
        if None in multiples:
            return None
        highest = max((m for m in multiples if m is not None), default=1)
        positions = update.indices()
        if positions is None and len(set(multiples)) <= 1:
            return advance(units, values.symbols, highest, LIMIT)
        if not within(values.symbols, LIMIT // highest):
            return None
        change, factor = values.symbols, highest
        if len(set(multiples)) > 1:
            each = np.repeat(np.array(multiples, dtype=np.int32), values.runs)
            change, factor = change * torch.from_numpy(each), 1
        change = change.to(units.device)
        if positions is None:
            after = torch.add(units, change, alpha=factor)
        else:
            after = units.index_add(0, positions.to(units.device), change, alpha=factor)
        return after if within(after) else None

    def quantized(self, change: Tensor, subbands: tuple[int, ...]) -> Quantized:
        """Return ``change`` (C,) int32 in the coarsest step that divides all of it; this is exact.

        Args:
            change: whole numbers of units.
            subbands: lengths of the wavelet subbands, which sum to C.
        """
        bits = int(np.bitwise_or.reduce(change.cpu().numpy()))
        multiple = (bits & -bits) or 1
        return self.of_symbols(change // multiple, multiple, subbands)

    def of_symbols(self, symbols: Tensor, multiple: int, subbands: tuple[int, ...]) -> Quantized:
        """Return symbols of one step, with a run for each subband, because their distributions differ."""
        return Quantized(symbols.cpu(), one_scale(self.unit * multiple, subbands), subbands)

    def multiple_of(self, scale: float) -> int | None:
        """Return a step in units, or None if it is not a power of two times the unit."""
        mantissa, exponent = math.frexp(scale / self.unit)
        exact = mantissa == 0.5 and 1 <= exponent <= LIMIT.bit_length()
        return 1 << exponent - 1 if exact else None


def within(units: Tensor, limit: int = LIMIT) -> bool:
    """Return whether all whole numbers are at most ``limit`` in magnitude."""
    if not len(units):
        return True
    least, largest = torch.aminmax(units)
    return int(least) >= -limit and int(largest) <= limit
