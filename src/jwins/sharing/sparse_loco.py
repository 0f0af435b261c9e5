"""SparseLoCo on a graph: the largest values of each chunk, in two bits, with error feedback that fades.

SparseLoCo has all workers start a round from one model, to which it adds the mean of what they send. On a graph
there is no such model; in its place, every node i has a replica x_hat_i that its neighbours hold too, 0 at
first, as in CHOCO-SGD. After local training to y:

    q      = 2 bits of the largest of each chunk of y - x_hat_i
    x_hat += q                                  at i and at each neighbour that receives q
    e      = y - x_hat                          what was not sent
    x      = y - (1 - decay) e + gamma sum_j W_ij (x_hat_j - x_hat_i)

The next round sends from decay e plus what training and mixing have changed, SparseLoCo's error feedback; what
was not sent for long is forgotten. With ``decay = 1`` it is CHOCO-SGD with that compressor. A node that
receives nothing forgets nothing. Two bits are a sign and one of two magnitudes, 1/3 or 1 times the chunk's
largest.

Source: A. Sarfi, B. Thérien, J. Lidin, E. Belilovsky, "Communication Efficient LLM Pre-training with
SparseLoCo", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jwins.ops.quantize import absmax_scales
from jwins.ops.select import count_of, largest_k
from jwins.rng import RoundContext
from jwins.sharing.base import Precision, Quantizer
from jwins.sharing.choco import Choco, ChocoState
from jwins.sharing.update import Quantized, Received
from jwins.validation import RATE, Within

__all__ = ["SparseLoco", "TwoBits", "sparse_loco"]

_CHUNK = Within("a whole number of values per chunk", 16)


@dataclass(frozen=True, slots=True)
class TwoBits:
    """A quantizer: a value's sign and one of two magnitudes, 1/3 or 1 times its chunk's largest; 0 stays 0.

    >>> ctx = RoundContext(seed=1, node=0, round=0)
    >>> TwoBits()(torch.tensor([3.0, -1.5, 2.5, 0.0]), (4,), ctx).dense()
    tensor([ 3., -1.,  3.,  0.])
    """

    def __call__(self, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext) -> Quantized:
        """See :class:`jwins.sharing.Quantizer`."""
        parts = torch.split(values, list(subbands))
        scales = torch.cat([absmax_scales(part, len(part), 3) for part in parts if len(part)])
        runs = tuple(count for count in subbands if count)
        steps = values / scales.repeat_interleave(torch.tensor(runs, device=values.device))
        symbols = torch.where(steps.abs() > 2.0, 3, 1) * torch.sign(steps)
        return Quantized(symbols.to(torch.int32).cpu(), scales.cpu(), runs)


@dataclass(frozen=True, slots=True)
class SparseLoco(Choco):
    """SparseLoCo on a graph; see the module's docstring for the algorithm.

    Attributes:
        decay: of what was not sent, from round to round, in [0, 1].
        chunk: how many parameters in a row choose their largest by themselves, at least 16.
    """

    values: Precision | Quantizer = TwoBits()
    decay: float = 0.95
    chunk: int = 4096

    def __post_init__(self) -> None:
        Choco.__post_init__(self)
        RATE.check("sharing.decay", self.decay)
        _CHUNK.check_whole("sharing.chunk", self.chunk)

    def chosen(self, difference: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
        """The largest of each chunk, at least one of each; every chunk counts as a subband."""
        parts = torch.split(difference, self.chunk)
        counts = tuple(max(1, count_of(self.fraction, len(part))) for part in parts)
        positions = [
            largest_k(part, count) + index * self.chunk
            for index, (part, count) in enumerate(zip(parts, counts, strict=True))
        ]
        return torch.cat(positions), counts

    def merge(
        self, state: ChocoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, ChocoState]:
        """As CHOCO-SGD, and where something was received, some of what was not sent is forgotten."""
        merged, after = Choco.merge(self, state, params, received, ctx)
        if any(item.weight > 0.0 and item.sender not in after.stale_peers for item in received):
            merged.sub_(params - state.x_hat, alpha=1.0 - self.decay)
        return merged, after


def sparse_loco(fraction: float, gamma: float, *, decay: float = 0.95, chunk: int = 4096) -> SparseLoco:
    """SparseLoCo on a graph.

    Args:
        fraction: of each chunk to send per round, in (0, 1].
        gamma: consensus step size, in (0, 1]; smaller for smaller fractions.
        decay: of what was not sent, from round to round, in [0, 1]; 1 forgets nothing.
        chunk: how many parameters in a row choose their largest by themselves, at least 16.

    Raises:
        ConfigError: an argument is out of range.
    """
    return SparseLoco(fraction, gamma, decay=decay, chunk=chunk)
