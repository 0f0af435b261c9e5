"""Updates that nodes exchange: values at positions of a vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from jwins.errors import UsageError

MAX_DIM = 2**32 - 1
"""Longest vector of an update: frames have positions as 32-bit unsigned integers."""

_POSITIONS_DOMAIN = 0x4A57494E535F504F  # ASCII "JWINS_PO": keeps positions apart from other uses of a seed
_DITHER_DOMAIN = 0x4A57494E535F4449  # ASCII "JWINS_DI"


@dataclass(frozen=True, slots=True)
class Sampled:
    """Pseudo-random positions: a frame has only the seed, and sender and receiver draw the same positions.

    Attributes:
        seed: unsigned 64-bit integer.
        count: number of positions, at least 0.

    >>> Sampled(seed=7, count=3).positions(10)
    tensor([0, 2, 5])
    """

    seed: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"Sampled.seed = {self.seed}: expected an unsigned 64-bit integer")
        if not 0 <= self.count <= MAX_DIM:
            raise UsageError(f"Sampled.count = {self.count}: expected 0 to {MAX_DIM}")

    def positions(self, dim: int) -> Tensor:
        """Draw the positions.

        Each of the ``dim`` positions gets one 64-bit word of Philox4x64-10 with key
        ``(seed, 0x4A57494E535F504F)``, in order from the first word of counter block 1; the ``count``
        positions with the smallest words are chosen, ties towards the lower position. The rule is part
        of the wire format (docs/reference/wire.md), so it never changes within a version.

        Args:
            dim: length of the vector, at least ``count``.

        Returns:
            (count,) int64, strictly increasing.

        Raises:
            UsageError: ``count`` is larger than ``dim``.
        """
        if self.count > dim:
            raise UsageError(f"Sampled.count = {self.count}: a vector of {dim} has fewer positions")
        if self.count == 0:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        if self.count == dim:
            return torch.arange(dim, device="cpu")
        words = np.random.Philox(key=self.seed | _POSITIONS_DOMAIN << 64).random_raw(dim)
        last = np.partition(words, self.count - 1)[self.count - 1]
        chosen = words < last
        ties = np.flatnonzero(words == last)[: self.count - int(np.count_nonzero(chosen))]
        chosen[ties] = True
        return torch.from_numpy(np.flatnonzero(chosen))


def dither(seed: int, count: int) -> Tensor:
    """Draw the numbers that a quantizer adds before it rounds, and :meth:`Quantized.dense` subtracts.

    Number i comes from the upper 24 bits n of the i-th 64-bit word of Philox4x64-10 with key
    ``(seed, 0x4A57494E535F4449)``, from the first word of counter block 1: ``(2 n + 1) / 2^25 - 1/2``, which
    float32 holds exactly. The rule is part of the wire format (docs/reference/wire.md), so it never changes
    within a version. Source: L. Schuchman, "Dither signals and their effect on quantization noise", IEEE
    Transactions on Communication Technology 12(4), 1964.

    Args:
        seed: unsigned 64-bit integer.
        count: number of numbers, at least 0.

    Returns:
        (count,) float32, uniform in (-1/2, 1/2).

    >>> dither(seed=7, count=2)
    tensor([0.2885, 0.3884])
    """
    words = np.random.Philox(key=seed | _DITHER_DOMAIN << 64).random_raw(count)
    words >>= np.uint64(39)
    words |= np.uint64(1)  # 2 n + 1
    return torch.from_numpy(words.astype(np.int32)).sub_(1 << 24).to(torch.float32).mul_(2.0**-25)


def one_scale(step: float, runs: Sequence[int]) -> Tensor:
    """Return the same step for every run of a :class:`Quantized`: (g,) float32 on the CPU."""
    return torch.full((len(runs),), step, dtype=torch.float32, device="cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Values as integer symbols times a scale, which is the quantizer's step.

    Attributes:
        symbols: (k,) int32.
        scales: (g,) float32, finite and > 0.
        runs: g lengths that sum to k; ``symbols`` of run i are multiplied by ``scales[i]``. One run is a
            single step size, many are blocks or wavelet subbands.
        dither: None, or the seed (unsigned 64-bit) of the :func:`dither` that was added, in steps, before
            values were rounded to symbols, and that :meth:`dense` subtracts.
        offset: shift of a nonzero symbol's value towards zero, in steps, in [0, 1/2); kept as the nearest
            float32. Values are denser near zero, so the middle of a step is not the best estimate.
    """

    symbols: Tensor
    scales: Tensor
    runs: tuple[int, ...]
    dither: int | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.symbols.dtype != torch.int32 or self.symbols.dim() != 1:
            raise UsageError(f"Quantized.symbols: expected (k,) int32, got {_describe(self.symbols)}")
        if self.scales.dtype != torch.float32 or self.scales.dim() != 1:
            raise UsageError(f"Quantized.scales: expected (g,) float32, got {_describe(self.scales)}")
        if len(self.runs) != len(self.scales) or any(run < 0 for run in self.runs):
            raise UsageError(f"Quantized.runs: expected {len(self.scales)} lengths of at least 0")
        if sum(self.runs) != len(self.symbols):
            raise UsageError(
                f"Quantized.runs sum to {sum(self.runs)}, but there are {len(self.symbols)} symbols"
            )
        if len(self.scales):
            least, largest = torch.aminmax(self.scales)  # NaN if one of them is NaN
            if not (float(least) > 0.0 and float(largest) < math.inf):
                raise UsageError("Quantized.scales: expected finite values > 0")
        if self.dither is not None and not 0 <= self.dither < 2**64:
            raise UsageError(f"Quantized.dither = {self.dither}: expected None or an unsigned 64-bit seed")
        nearest = float(np.float32(self.offset)) + 0.0  # no -0.0
        if not 0.0 <= nearest < 0.5:
            raise UsageError(f"Quantized.offset = {self.offset}: expected steps in [0, 1/2)")
        object.__setattr__(self, "offset", nearest)

    def dense(self) -> Tensor:
        """Return the values, (k,) float32: ``((symbol - sign(symbol) * offset) - dither) * scale``.

        Each operation is rounded to float32, so that every receiver has the same bits.
        """
        steps = self.symbols.to(torch.float32)
        if self.offset:
            steps = steps - torch.sign(steps) * self.offset
        if self.dither is not None:
            steps = steps - dither(self.dither, len(steps)).to(steps.device)
        runs = torch.tensor(self.runs, dtype=torch.int64, device=self.scales.device)
        return steps * torch.repeat_interleave(self.scales, runs).to(steps.device)

    def largest_of_one_scale(self) -> float | None:
        """Return the largest magnitude in :meth:`dense` without computing it, or None.

        It is None without symbols, with several scales or with a dither.

        A larger symbol has no smaller value, because each operation rounds monotonically.
        """
        scales = self.scales.cpu().numpy()
        if self.dither is not None or not len(self.symbols) or not bool((scales == scales[0]).all()):
            return None
        least, most = torch.aminmax(self.symbols)
        steps = np.float32(max(-int(least), int(most)))
        with np.errstate(over="ignore"):  # as torch multiplies
            return float((steps - np.float32(self.offset) if steps else steps) * scales[0])


def dense_of(values: Tensor | Quantized) -> Tensor:
    """Return values of any form as (k,) float32; float32 is returned as it is."""
    if isinstance(values, Quantized):
        return values.dense()
    return values if values.dtype == torch.float32 else values.to(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """Values of a dense vector that one node sends to its neighbours. Immutable, shared between receivers.

    Attributes:
        dim: length of the dense vector.
        positions: (k,) int64, strictly increasing, each in [0, dim); or :class:`Sampled`; or None for
            all of ``range(dim)``.
        values: (k,) float32 or bfloat16, or :class:`Quantized`.
        base: None if the update stands alone; r if it is an increment on the sender's replica of
            round r.
        check: unsigned 32-bit hash of the sender's replica after this update, or None. A receiver that
            computes another hash has drifted and asks for a keyframe.
    """

    dim: int
    positions: Tensor | Sampled | None
    values: Tensor | Quantized
    base: int | None = None
    check: int | None = None
    _largest: float | None = field(default=None, init=False, repr=False)
    _drawn: Tensor | None = field(default=None, init=False, repr=False)
    _dense: Tensor | None = field(default=None, init=False, repr=False)
    _advanced: tuple[Tensor | None, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.dim <= MAX_DIM:
            raise UsageError(f"Update.dim = {self.dim}: expected 0 to {MAX_DIM}")
        if isinstance(self.values, Tensor) and (
            self.values.dtype not in (torch.float32, torch.bfloat16) or self.values.dim() != 1
        ):
            raise UsageError(f"Update.values: expected (k,) float32 or bfloat16, got {_describe(self.values)}")
        if isinstance(self.positions, Tensor) and (
            self.positions.dtype != torch.int64 or self.positions.dim() != 1
        ):
            raise UsageError(f"Update.positions: expected (k,) int64, got {_describe(self.positions)}")
        expected = (
            self.dim
            if self.positions is None
            else self.positions.count
            if isinstance(self.positions, Sampled)
            else len(self.positions)
        )
        if self.count != expected:
            raise UsageError(f"Update: {self.count} values for {expected} positions")
        if self.count > self.dim:
            raise UsageError(f"Update: {self.count} values for a vector of {self.dim}")
        if self.base is not None and not 0 <= self.base < 2**32:
            raise UsageError(f"Update.base = {self.base}: expected None or an unsigned 32-bit round")
        if self.check is not None and not 0 <= self.check < 2**32:
            raise UsageError(f"Update.check = {self.check}: expected None or an unsigned 32-bit hash")

    @property
    def count(self) -> int:
        """Return the number of values in the update."""
        values = self.values.symbols if isinstance(self.values, Quantized) else self.values
        return values.shape[0]  # len() of a tensor takes ten times as long

    def indices(self) -> Tensor | None:
        """Return the positions, (k,) int64, drawn once for all receivers; None if every position is present."""
        if not isinstance(self.positions, Sampled):
            return self.positions
        if self._drawn is None:
            object.__setattr__(self, "_drawn", self.positions.positions(self.dim))
        return self._drawn

    def over(self, earlier: Update) -> Update:
        """Return one update with the values of this one, and those of ``earlier`` at all other positions.

        Args:
            earlier: update of the same dimension; both stand alone.
        """
        positions, old_positions = self.indices(), earlier.indices()
        if positions is None:
            return self
        values, old_values = self.dense_values(), earlier.dense_values()
        if old_positions is None:
            return Update(self.dim, None, old_values.index_copy(0, positions, values))
        joined, first = np.unique(torch.cat([positions, old_positions]).numpy(), return_index=True)
        return Update(
            self.dim, torch.from_numpy(joined), torch.cat([values, old_values])[torch.from_numpy(first)]
        )

    def largest(self) -> float:
        """Return the largest magnitude of a value: 0 without values, NaN if one is NaN. Computed once."""
        if self._largest is None:
            found = self.values.largest_of_one_scale() if isinstance(self.values, Quantized) else None
            found = largest_magnitude(self.dense_values()) if found is None else found
            object.__setattr__(self, "_largest", found)
        assert self._largest is not None
        return self._largest

    def is_finite(self) -> bool:
        """Return whether all values are finite."""
        return math.isfinite(self.largest())

    def dense_values(self) -> Tensor:
        """Return values of any form as (k,) float32; those of symbols are computed once for all receivers."""
        if not isinstance(self.values, Quantized):
            return dense_of(self.values)
        if self._dense is None:
            object.__setattr__(self, "_dense", self.values.dense())
        assert self._dense is not None
        return self._dense

    def advanced_from(self, replica: Tensor | None) -> Tensor | None:
        """Return the sender's replica after this update, if another receiver in this process has computed it.

        Such receivers then hold one tensor, not one each.

        Args:
            replica: (C,) float32 or int32, the replica before the update; None if the update stands alone.
        """
        if self._advanced is None:
            return None
        before, after = self._advanced
        return after if _same_bits(before, replica) else None

    def remember_advanced(self, replica: Tensor | None, after: Tensor) -> None:
        """Keep ``after`` for :meth:`advanced_from`; it must not be written to from now on."""
        object.__setattr__(self, "_advanced", (replica, after))


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """An update with its sender, round and weight, for the receiver's algorithm.

    Attributes:
        sender: the sending node.
        round: the sender's round.
        weight: mixing weight of the sender in the receiver's round; 0 if the update is late or its
            sender is no neighbour in this round.
        update: the sent update.
    """

    sender: int
    round: int
    weight: float
    update: Update


def largest_magnitude(values: Tensor) -> float:
    """Return the largest magnitude of ``values`` (k,): 0 without any, NaN if one is NaN."""
    if not values.numel():
        return 0.0
    least, largest = torch.aminmax(values)  # several times faster than isfinite; NaN if a value is NaN
    return max(-float(least), float(largest))


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is other:
        return True
    if one is None or other is None or one.device != other.device or one.dtype != other.dtype:
        return False
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
