"""Comparison of updates, which are equal only bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from jwins.sharing.update import Quantized, Update


def identical(a: Update, b: Update) -> bool:
    """Return whether two updates are equal bit for bit, including -0.0 and NaN payloads.

    >>> u = Update(dim=2, positions=None, values=torch.tensor([0.0, 1.0]))
    >>> v = Update(dim=2, positions=None, values=torch.tensor([-0.0, 1.0]))
    >>> identical(u, u), identical(u, v)
    (True, False)
    """
    if (a.dim, a.base, a.check) != (b.dim, b.base, b.check):
        return False
    if isinstance(a.positions, Tensor) and isinstance(b.positions, Tensor):
        if not torch.equal(a.positions, b.positions):
            return False
    elif isinstance(a.positions, Tensor) or isinstance(b.positions, Tensor) or a.positions != b.positions:
        return False
    if isinstance(a.values, Quantized) and isinstance(b.values, Quantized):
        return (
            (a.values.runs, a.values.dither, a.values.offset)
            == (b.values.runs, b.values.dither, b.values.offset)
            and torch.equal(a.values.symbols, b.values.symbols)
            and _same_bits(a.values.scales, b.values.scales)
        )
    if isinstance(a.values, Tensor) and isinstance(b.values, Tensor):
        return _same_bits(a.values, b.values)
    return False


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
    return torch.equal(a.view(integer), b.view(integer))
