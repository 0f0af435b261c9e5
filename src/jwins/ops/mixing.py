"""Weighted sums of neighbours' values and of replicas; long vectors on the CPU take one pass over all of them.

A pass handles a section of the vectors at a time, which stays in the processor's cache. On other devices, and
with short vectors, torch computes the same by one operation after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.kernels import mixing as kernels
from jwins.ops.arrays import array, kernels_pay

_BLOCK = 1 << 14


@dataclass(frozen=True, slots=True)
class Term:
    """Values of a vector and their weight.

    Attributes:
        values: (k,) float32.
        positions: (k,) int64, strictly increasing; None for all.
        weight: above 0.
    """

    values: Tensor
    positions: Tensor | None
    weight: float


def mixed(own: Tensor, terms: Sequence[Term]) -> Tensor:
    """Return ``sum_j weight_j (values_j - own)`` at the terms' positions; in order, so that rounding repeats.

    Args:
        own: (C,) float32.
        terms: any number.

    Returns:
        (C,) float32, a new tensor.

    Raises:
        UsageError: a term does not fit ``own``.
    """
    for term in terms:
        if term.positions is None and term.values.shape != own.shape:
            raise UsageError(f"{len(term.values)} values for a vector of {len(own)}")
        if term.positions is not None and term.values.shape != term.positions.shape:
            raise UsageError(f"{len(term.values)} values for {len(term.positions)} positions")
    change = torch.zeros_like(own)
    if kernels_pay(own) and own.dtype == torch.float32:
        _mix_on_cpu(array(change), array(own), terms)
        return change
    for term in terms:
        values, positions = term.values, term.positions
        if values.device != own.device:
            values = values.to(own.device)
        if positions is not None and positions.device.type == "cpu":
            check_positions(positions, len(own))
        # Filling in is faster than gathering on a GPU.
        theirs = values if positions is None else own.index_copy(0, positions.to(own.device), values)
        change.add_(theirs - own, alpha=term.weight)
    return change


def mixed_replicas(own: Tensor, replicas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum_j weight_j (replica_j - own)`` of whole numbers, in order.

    Args:
        own: (C,) int32, of magnitudes below 2^30.
        replicas: any number, each as ``own``.
        weights: one for each replica.

    Returns:
        (C,) float32.
    """
    change = torch.zeros(len(own), dtype=torch.float32, device=own.device)
    if not kernels_pay(own):
        for replica, weight in zip(replicas, weights, strict=True):
            change.add_(replica - own, alpha=weight)
        return change
    total, mine = array(change), array(own)
    others = [(array(r), np.float32(w)) for r, w in zip(replicas, weights, strict=True)]
    if len(others) % 2:
        others.append((mine, np.float32(-0.0)))  # adds -0.0, which changes no number
    for start in range(0, len(mine), _BLOCK):
        block = slice(start, start + _BLOCK)
        for (one, of_one), (other, of_other) in zip(others[::2], others[1::2], strict=True):
            kernels.add_replicas(total[block], one[block], of_one, other[block], of_other, mine[block])
    return change


def check_positions(positions: Tensor, size: int) -> None:
    """Refuse positions out of range or order."""
    if not len(positions):
        return
    if int(positions[0]) < 0 or int(positions[-1]) >= size:
        raise UsageError(f"positions: expected 0 to {size - 1}")
    if not bool((positions[1:] > positions[:-1]).all()):
        raise UsageError("positions: expected strictly increasing ones")


def _mix_on_cpu(change: npt.NDArray[np.float32], own: npt.NDArray[np.float32], terms: Sequence[Term]) -> None:
    given = [
        (
            array(term.values.to(torch.float32)),
            None if term.positions is None else array(term.positions),
            np.float32(term.weight),
        )
        for term in terms
    ]
    starts = range(0, len(own), _BLOCK)
    bounds = [None if at is None else at.searchsorted([*starts, len(own)]).tolist() for _, at, _ in given]
    for number, start in enumerate(starts):
        block = slice(start, start + _BLOCK)
        for (values, positions, weight), found in zip(given, bounds, strict=True):
            if positions is None or found is None:
                kernels.add_all(change[block], values[block], own[block], weight)
                continue
            some = slice(found[number], found[number + 1])
            if not kernels.add_some(change[block], positions[some], start, values[some], own[block], weight):
                raise UsageError("positions: expected strictly increasing ones")
    for (_, positions, _), found in zip(given, bounds, strict=True):
        if positions is not None and found is not None and (found[0], found[-1]) != (0, len(positions)):
            raise UsageError(f"positions: expected 0 to {len(own) - 1}")
