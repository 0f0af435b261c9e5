"""SparseLoCo: the largest values of each chunk, in two bits, with error feedback that fades.

On a complete graph all nodes start a round from one model x, as in the paper. After local training to y:

    e = decay e + (y - x_i)                     x_i: the model at the start of the round
    q = 2 bits of the largest of each chunk of e
    e = e - q
    x = x + sum_j W_ij q_j                      the mean of all nodes' q

Every node holds the sum of all q of each other node as its replica. After a lost frame, the keyframe has this
sum, and x moves by the missed q. A node that receives nothing in a round trains on from y, and returns to x
with the next frame. A node that begins with another node's model does not know which q that model contains
already. So it adds none of the earlier ones, and the resulting difference to the others' x stays.

On other graphs there is no common model. In its place, every node i has a replica x_hat_i that its neighbours
hold, too. As in CHOCO-SGD it starts at 0. After local training to y:

    q      = 2 bits of the largest of each chunk of y - x_hat_i
    x_hat += q                                  at i and at each neighbour that receives q
    e      = y - x_hat                          residual, not sent
    x      = y - (1 - decay) e + gamma sum_j W_ij (x_hat_j - x_hat_i)

The next round selects from decay e plus the changes by training and mixing, which is SparseLoCo's error
feedback. An old residual fades. With ``decay = 1`` the algorithm is CHOCO-SGD with this compressor. At a node
that receives nothing the residual does not fade.

Two bits are a sign and one of two magnitudes, 1/3 or 1 times the chunk's largest. The default is the paper's 64
of 4,096 values and ``decay`` 0.95, with an outer learning rate of 1.

Source: A. Sarfi, B. Thérien, J. Lidin, E. Belilovsky, "Communication Efficient LLM Pre-training with
SparseLoCo", 2025, arXiv 2508.15706.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from jwins.ops.quantize import absmax_scales
from jwins.ops.select import count_of, largest_k
from jwins.rng import RoundContext
from jwins.sharing.base import Precision, Quantizer, Vectors
from jwins.sharing.choco import Choco, ChocoState
from jwins.sharing.replicas import OnReplicas, Replica, added, follow, hash_of
from jwins.sharing.update import Quantized, Received, Update
from jwins.validation import FRACTION, RATE, Within

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
        chunk: length of a chunk, at least 16; the largest values of each chunk are sent.
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
        return _chosen(difference, self.fraction, self.chunk)

    def merge(
        self, state: ChocoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, ChocoState]:
        """Merge as CHOCO-SGD does; if an update was received, reduce the residual by ``decay``."""
        merged, after = Choco.merge(self, state, params, received, ctx)
        if any(item.weight > 0.0 and item.sender not in after.stale_peers for item in received):
            merged.sub_(params - state.x_hat, alpha=1.0 - self.decay)
        return merged, after


def _chosen(vector: Tensor, fraction: float, chunk: int) -> tuple[Tensor, tuple[int, ...]]:
    pieces = torch.split(vector, chunk)
    counts = tuple(max(1, count_of(fraction, len(piece))) for piece in pieces)
    positions = [
        largest_k(piece, count) + index * chunk
        for index, (piece, count) in enumerate(zip(pieces, counts, strict=True))
    ]
    return torch.cat(positions), counts


@dataclass(frozen=True, slots=True, eq=False)
class CommonSparseLocoState:
    """State of SparseLoCo on a complete graph.

    Attributes:
        start: (P,) float32, the parameters at the start of the round.
        common: (P,) float32, x; it differs from ``start`` at a node that has just received nothing.
        residual: (P,) float32, e.
        x_hat: (P,) float32, the sum of all that this node has sent.
        newest: (P,) float32, its change by the last share.
        shared: round of the last share, or None.
        began: round of the first share, or None.
        replicas: sums of all that the neighbours have sent, by node.
        stale_peers: neighbours whose keyframe is needed.
    """

    start: Tensor
    common: Tensor
    residual: Tensor
    x_hat: Tensor
    newest: Tensor
    shared: int | None = None
    began: int | None = None
    replicas: Mapping[int, Replica] = field(default_factory=dict)
    stale_peers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class CommonSparseLoco(OnReplicas[CommonSparseLocoState]):
    """SparseLoCo on a complete graph; see the module's docstring for the algorithm.

    Attributes:
        fraction: fraction of each chunk to send per round, in (0, 1].
        decay: factor of the residual from round to round, in [0, 1].
        chunk: length of a chunk, at least 16; the largest values of each chunk are sent.
    """

    fraction: float = 1 / 64
    decay: float = 0.95
    chunk: int = 4096
    state_types: ClassVar[tuple[type, ...]] = (CommonSparseLocoState, Replica)

    def __post_init__(self) -> None:
        FRACTION.check("sharing.fraction", self.fraction)
        RATE.check("sharing.decay", self.decay)
        _CHUNK.check_whole("sharing.chunk", self.chunk)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state, which has x itself besides at a node that received nothing."""
        return Vectors(4 + neighbours, 4 + 2 * neighbours, self.fraction)

    def init(self, params: Tensor) -> CommonSparseLocoState:
        """Return sums of 0, which need no message."""
        zeros = torch.zeros_like(params)
        return CommonSparseLocoState(params.clone(), params.clone(), zeros, zeros, zeros)

    def share(
        self, state: CommonSparseLocoState, params: Tensor, ctx: RoundContext
    ) -> tuple[Update, CommonSparseLocoState]:
        """Send the largest values of the round's change and of the residual."""
        residual = (params - state.start).add_(state.residual, alpha=self.decay)
        positions, subbands = _chosen(residual, self.fraction, self.chunk)
        values = TwoBits()(residual.index_select(0, positions), subbands, ctx)
        change = values.dense()
        x_hat = added(state.x_hat, positions, change)
        update = Update(len(params), positions, values, base=state.shared, check=hash_of(x_hat))
        return update, replace(
            state,
            residual=added(residual, positions, -change),
            x_hat=x_hat,
            newest=x_hat - state.x_hat,
            shared=ctx.round,
            began=ctx.round if state.began is None else state.began,
        )

    def merge(
        self, state: CommonSparseLocoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, CommonSparseLocoState]:
        """Add the mean of what was sent since the last merge, in the order of nodes."""
        followed = follow(state.replicas, state.stale_peers, received, ctx.weights, like=params, keep_old=True)
        moved = {ctx.node: (state.newest, ctx.own_weight)}
        for j, replica in followed.replicas.items():
            before = state.replicas.get(j)
            if before is not None:
                moved[j] = replica.x_hat - before.x_hat, ctx.weights[j]
            elif state.began == 0:  # both began with sums of 0
                moved[j] = replica.x_hat, ctx.weights[j]
        common = state.common.clone()
        for j in sorted(moved):
            common.add_(moved[j][0], alpha=moved[j][1])
        # Drifted replicas are kept until their keyframes come, because x contains them.
        counted = {j: replica for j, replica in state.replicas.items() if j in followed.stale_peers}
        merged = common if followed.received_weights else params.clone()
        return merged, replace(
            state,
            start=merged,
            common=common,
            replicas={**counted, **followed.replicas},
            stale_peers=followed.stale_peers,
        )

    def projected(self, state: CommonSparseLocoState, params: Tensor) -> CommonSparseLocoState:
        """Take ``params`` as the start of the round."""
        return replace(state, start=params.clone(), common=state.common + (params - state.start))


def sparse_loco(
    fraction: float = 1 / 64, gamma: float | None = None, *, decay: float = 0.95, chunk: int = 4096
) -> SparseLoco | CommonSparseLoco:
    """Return SparseLoCo: as in the paper on a complete graph, or with ``gamma`` on any graph.

    Args:
        fraction: fraction of each chunk to send per round, in (0, 1].
        gamma: consensus step size, in (0, 1]; smaller for smaller fractions. None for a complete graph.
        decay: factor of the residual from round to round, in [0, 1]; 1 keeps all of it.
        chunk: length of a chunk, at least 16; the largest values of each chunk are sent.

    Raises:
        ConfigError: an argument is out of range.
    """
    if gamma is None:
        return CommonSparseLoco(fraction, decay, chunk)
    return SparseLoco(fraction, gamma, decay=decay, chunk=chunk)
