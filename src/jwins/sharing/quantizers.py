"""Quantizers, which round values before they are sent. Each is a :class:`jwins.sharing.Quantizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.ops.quantize import absmax_scales, blocks, to_dithered, to_either_side, to_nearest
from jwins.rng import RoundContext
from jwins.sharing.base import Quantizer
from jwins.sharing.update import Quantized, dither, one_scale
from jwins.validation import Within

Rounding = Literal["nearest", "dithered", "stochastic"]
"""Rule for rounding a number between two symbols:

- ``nearest``: to the nearer one. Has the smallest error, but never sends values that stay below half a step.
- ``dithered``: to the nearer one, after adding a pseudo-random number that receivers subtract. Unbiased.
- ``stochastic``: to either one; the nearer one is more probable. Unbiased, with up to three times the mean
  squared error of ``dithered``.
"""

STEP = Within("a step", 1e-30)
DEAD_ZONE = Within("a dead zone", 0.5, 1)
OFFSET = Within("an offset", 0, 0.49)
BITS = Within("a whole number of bits", 2, 8)
BLOCK = Within("a whole number of values per block", 16)


@dataclass(frozen=True, slots=True)
class UniformQuantizer:
    """Integer multiples of one step, for an entropy coder: most symbols are 0.

    Attributes:
        step: distance between two neighbouring values. The error is at most half of it, or all of it with
            ``stochastic``. A dead zone and an offset increase the error.
        rounding: see :data:`Rounding`.
        dead_zone: with ``nearest``: values nearer to zero than this number of steps become 0, in [1/2, 1].
        offset: with ``nearest``: shift of the value of a nonzero symbol towards zero, in steps, in
            [0, 0.49].
    """

    step: float
    rounding: Rounding = "nearest"
    dead_zone: float = 0.5
    offset: float = 0.0

    def __post_init__(self) -> None:
        STEP.check("sharing.values.step", self.step)
        if self.rounding not in get_args(Rounding):
            expected = f"expected one of {', '.join(get_args(Rounding))}"
            raise ConfigError("sharing.values.rounding", self.rounding, expected)
        DEAD_ZONE.check("sharing.values.dead_zone", self.dead_zone)
        OFFSET.check("sharing.values.offset", self.offset)
        if self.rounding != "nearest":
            for name, value, none in (("dead_zone", self.dead_zone, 0.5), ("offset", self.offset, 0.0)):
                if value != none:
                    problem = f"applies only to rounding = 'nearest', not {self.rounding!r}; remove it"
                    raise ConfigError(f"sharing.values.{name}", value, problem)

    def __call__(self, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext) -> Quantized:
        """Round ``values`` to multiples of the step."""
        steps = values / self.step
        scales = one_scale(self.step, subbands)
        if self.rounding == "dithered":
            seed = int(ctx.rng("dither").integers(2**64, dtype="uint64"))
            symbols = to_dithered(steps, dither(seed, len(values)).to(values.device))
            return Quantized(symbols, scales, subbands, dither=seed)
        if self.rounding == "stochastic":
            return Quantized(
                to_either_side(steps, _uniform(len(values), ctx).to(values.device)), scales, subbands
            )
        return Quantized(to_nearest(steps, self.dead_zone), scales, subbands, offset=self.offset)


@dataclass(frozen=True, slots=True)
class AbsmaxQuantizer:
    """A fixed number of bits per value, with a step for each block: its largest value has the largest symbol.

    Attributes:
        bits: 2 to 8; symbols are -(2^(bits-1) - 1) to 2^(bits-1) - 1, so 2 bits are -1, 0 and 1.
        block: number of values that share a step, at least 16; a step takes two bytes.
        rounding: ``nearest`` or ``stochastic``; see :data:`Rounding`.
    """

    bits: int
    block: int = 256
    rounding: Literal["nearest", "stochastic"] = "stochastic"

    def __post_init__(self) -> None:
        BITS.check_whole("sharing.values.bits", self.bits)
        BLOCK.check_whole("sharing.values.block", self.block)
        if self.rounding not in ("nearest", "stochastic"):
            raise ConfigError("sharing.values.rounding", self.rounding, "expected nearest or stochastic")

    def __call__(self, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext) -> Quantized:
        """Round ``values`` block by block, regardless of the subbands."""
        largest = 2 ** (self.bits - 1) - 1
        runs = blocks(len(values), self.block)
        scales = absmax_scales(values, self.block, largest)
        steps = values / scales.repeat_interleave(self.block)[: len(values)]
        steps.clamp_(-largest, largest)  # a subnormal number of a scale may be a little more
        if self.rounding == "nearest":
            return Quantized(to_nearest(steps), scales, runs)
        return Quantized(to_either_side(steps, _uniform(len(values), ctx).to(values.device)), scales, runs)


QUANTIZERS: Mapping[str, Callable[..., Quantizer]] = {"uniform": UniformQuantizer, "absmax": AbsmaxQuantizer}
"""Quantizers by their name in ``sharing.values.kind``."""


def _uniform(count: int, ctx: RoundContext) -> Tensor:
    """Draw (count,) float32 in [0, 1) for the node and the round."""
    return torch.from_numpy(ctx.rng("rounding").random(count, dtype="float32"))
