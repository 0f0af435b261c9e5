"""SparseLoCo on a graph: the largest values of each chunk, in two bits, with error feedback that fades.

In SparseLoCo all workers start a round from one model, to which the mean of their updates is added. On a graph
there is no such model. In its place, every node i has a replica x_hat_i that its neighbours hold, too. As in
CHOCO-SGD it starts at 0. After local training to y:

    q      = 2 bits of the largest of each chunk of y - x_hat_i
    x_hat += q                                  at i and at each neighbour that receives q
    e      = y - x_hat                          residual, not sent
    x      = y - (1 - decay) e + gamma sum_j W_ij (x_hat_j - x_hat_i)

The next round selects from decay e plus the changes by training and mixing, which is SparseLoCo's error
feedback. An old residual fades. With ``decay = 1`` the algorithm is CHOCO-SGD with this compressor. At a node
that receives nothing the residual does not fade. Two bits are a sign and one of two magnitudes, 1/3 or 1 times
the chunk's largest.

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

_CHUNK = Within("a whole number of values per chunk", 16)


@dataclass(frozen=True, slots=True)
class TwoBits:
    """Quantizer to a value's sign and one of two magnitudes, 1/3 or 1 times its chunk's largest; 0 stays 0.

    >>> ctx = RoundContext(seed=1, node=0, round=0)
    >>> TwoBits()(torch.tensor([3.0, -1.5, 2.5, 0.0]), (4,), ctx).dense()
    tensor([ 3., -1.,  3.,  0.])
    """

    def __call__(self, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext) -> Quantized:
        """Return symbols -3, -1, 0, 1 and 3 of a third of each chunk's largest."""
        bands = torch.split(values, list(subbands))
        scales = torch.cat([absmax_scales(band, len(band), 3) for band in bands if len(band)])
        runs = tuple(count for count in subbands if count)
        steps = values / scales.repeat_interleave(torch.tensor(runs, device=values.device))
        symbols = torch.where(steps.abs() > 2.0, 3, 1) * torch.sign(steps)
        return Quantized(symbols.to(torch.int32).cpu(), scales.cpu(), runs)


@dataclass(frozen=True, slots=True)
class SparseLoco(Choco):
    """SparseLoCo on a graph; see the module's docstring for the algorithm.

    Attributes:
        decay: factor of the residual from round to round, in [0, 1].
        chunk: length of the chunks of which the largest values are sent, at least 16.
    """

    values: Precision | Quantizer = TwoBits()
    decay: float = 0.95
    chunk: int = 4096

    def __post_init__(self) -> None:
        Choco.__post_init__(self)
        RATE.check("sharing.decay", self.decay)
        _CHUNK.check_whole("sharing.chunk", self.chunk)

    def chosen(self, difference: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
        """Return the largest of each chunk, at least one; every chunk counts as a subband."""
        chunks = torch.split(difference, self.chunk)
        counts = tuple(max(1, count_of(self.fraction, len(chunk))) for chunk in chunks)
        positions = [
            largest_k(chunk, count) + index * self.chunk
            for index, (chunk, count) in enumerate(zip(chunks, counts, strict=True))
        ]
        return torch.cat(positions), counts

    def merge(
        self, state: ChocoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, ChocoState]:
        """Merge as CHOCO-SGD does; if an update was received, reduce the residual by ``decay``."""
        merged, after = Choco.merge(self, state, params, received, ctx)
        if any(item.weight > 0.0 and item.sender not in after.stale_peers for item in received):
            merged.sub_(params - state.x_hat, alpha=1.0 - self.decay)
        return merged, after


def sparse_loco(fraction: float, gamma: float, *, decay: float = 0.95, chunk: int = 4096) -> SparseLoco:
    """SparseLoCo on a graph.

    Args:
        fraction: fraction of each chunk to send per round, in (0, 1].
        gamma: consensus step size, in (0, 1]; smaller for smaller fractions.
        decay: factor of the residual from round to round, in [0, 1]; 1 keeps all of it.
        chunk: length of the chunks of which the largest values are sent, at least 16.

    Raises:
        ConfigError: an argument is out of range.
    """
    return SparseLoco(fraction, gamma, decay=decay, chunk=chunk)
