"""PowerGossip: low-rank differences of matrices, by one step of power iteration on each edge and round.

The nodes i < j of an edge have a vector v in common for each matrix M of the model. In even rounds it has the
length of a row of M, and in odd rounds that of a column; M then stands for its transpose:

    u  = v / |v|
    p  = M u                                    sent to this neighbour, and to no other
    M += W_ij (p_neighbour - p) u'
    v  = p_j - p_i                              warm start of the next round, on the other side

So v converges to the direction in which the two models differ most, and there is nothing to tune. Tensors of
one dimension are mixed as they are, and those of more than two as matrices of ``shape[0]`` rows. Each neighbour
gets an update of its own.

The first v of an edge is drawn from seed, edge and round. An update has a hash of v. If the hashes of two nodes
differ, because a frame was lost or late, they mix nothing over that edge in that round and draw v again in the
next.

Source: T. Vogels, S. P. Karimireddy, M. Jaggi, "Practical Low-Rank Communication Compression in Decentralized
Deep Learning", NeurIPS 2020, with rank 1 and one step of power iteration per round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from jwins.errors import UsageError
from jwins.rng import RoundContext, stream
from jwins.sharing.base import Precision, Quantizer, Sharing, Vectors, check_quantizer, quantize
from jwins.sharing.replicas import hash_of
from jwins.sharing.update import Quantized, Received, Update, dense_of


@dataclass(frozen=True, slots=True, eq=False)
class PowerGossipState:
    """State of PowerGossip.

    Attributes:
        dim: P.
        vectors: the vectors v of each edge, concatenated, by neighbour.
        sent: the values sent in this round, by neighbour; empty after the merge.
    """

    dim: int
    vectors: Mapping[int, Tensor] = field(default_factory=dict)
    sent: Mapping[int, Tensor | Quantized] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PowerGossip(Sharing[PowerGossipState]):
    """PowerGossip; see the module's docstring for the algorithm.

    Attributes:
        values: quantizer of the sent products, or "float32" or "bfloat16".
        shapes: shapes of the model's tensors, from :meth:`for_model`. Without them, the parameters count as the
            largest square matrix that they fill and a vector with the rest.
    """

    values: Precision | Quantizer = "float32"
    shapes: tuple[tuple[int, ...], ...] | None = None
    per_peer: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (PowerGossipState, Quantized)

    def __post_init__(self) -> None:
        check_quantizer(self.values)

    def for_model(self, shapes: tuple[tuple[int, ...], ...]) -> PowerGossip:
        """Return the algorithm for tensors of these shapes."""
        return replace(self, shapes=shapes)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of products, which are short unless the model has few matrices."""
        return Vectors(0.25 * neighbours, 3 + neighbours, 0.25)

    def init(self, params: Tensor) -> PowerGossipState:
        """Return a state without edges."""
        return PowerGossipState(len(params))

    def share(
        self, state: PowerGossipState, params: Tensor, ctx: RoundContext
    ) -> tuple[Update, PowerGossipState]:
        """Compute the products for every neighbour, and return the first neighbour's update."""
        vectors: dict[int, Tensor] = {}
        sent: dict[int, Tensor | Quantized] = {}
        for j in sorted(ctx.weights):
            vectors[j] = self._vector(state.vectors.get(j), params, j, ctx)
            units = iter(self._units(vectors[j], params, ctx))
            products = [
                tensor if tensor.dim() < 2 else torch.mv(tensor, next(units))
                for tensor in self._tensors(params, ctx)
            ]
            runs = tuple(len(product) for product in products)
            sent[j] = quantize(self.values, torch.cat(products), runs, ctx)
        after = PowerGossipState(state.dim, vectors, sent)
        if sent:
            return self.for_peer(after, min(sent)), after
        nothing = quantize(self.values, params[:0], (0,), ctx)
        return Update(len(params), torch.arange(0, dtype=torch.int64, device="cpu"), nothing, check=0), after

    def for_peer(self, state: PowerGossipState, peer: int) -> Update:
        """Return the products of the edge to ``peer``."""
        if peer not in state.sent:
            raise UsageError(
                f"power_gossip: node {peer} receives from this node and sends it nothing; "
                "take a topology without directed edges"
            )
        values = state.sent[peer]
        count = len(values.symbols) if isinstance(values, Quantized) else len(values)
        positions = None if count == state.dim else torch.arange(count, dtype=torch.int64, device="cpu")
        return Update(state.dim, positions, values, check=hash_of(state.vectors[peer]))

    def merge(
        self, state: PowerGossipState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, PowerGossipState]:
        """Add the low-rank differences from the neighbours whose vectors are the same."""
        merged, vectors = params.clone(), {}
        for item in received:
            j = item.sender
            if item.weight == 0.0 or j not in state.sent or item.update.check != hash_of(state.vectors[j]):
                continue
            own = dense_of(state.sent[j])
            if item.update.count != len(own):
                continue
            apart = item.update.dense_values().to(own.device) - own
            units = iter(self._units(state.vectors[j], params, ctx))
            kept, begin = [], 0
            for tensor in self._tensors(merged, ctx):
                change = apart[begin : begin + len(tensor)]
                begin += len(tensor)
                if tensor.dim() < 2:
                    tensor.add_(change, alpha=item.weight)
                else:
                    tensor.add_(torch.outer(change, next(units)), alpha=item.weight)
                    kept.append(change)
            empty = [params[:0]]
            vectors[j] = torch.cat(kept or empty) * (1.0 if ctx.node < j else -1.0)
        return merged, PowerGossipState(state.dim, vectors)

    def _tensors(self, params: Tensor, ctx: RoundContext) -> Iterator[Tensor]:
        """Yield views of matrices, transposed in odd rounds, and of vectors, in their order in ``params``."""
        square = math.isqrt(len(params))
        shapes = ((square, square), (len(params) - square * square,)) if self.shapes is None else self.shapes
        begin = 0
        for shape in shapes:
            size = math.prod(shape)
            tensor = params[begin : begin + size]
            begin += size
            if len(shape) > 1 and size:
                tensor = tensor.view(shape[0], -1)
                tensor = tensor.t() if ctx.round % 2 else tensor
            yield tensor

    def _units(self, vectors: Tensor, params: Tensor, ctx: RoundContext) -> Iterator[Tensor]:
        begin = 0
        for tensor in self._tensors(params, ctx):
            if tensor.dim() == 2:
                vector = vectors[begin : begin + tensor.shape[1]]
                begin += tensor.shape[1]
                yield vector / torch.linalg.vector_norm(vector)

    def _vector(self, known: Tensor | None, params: Tensor, peer: int, ctx: RoundContext) -> Tensor:
        """Return the vectors of an edge; those that are not known, or zero, are drawn."""
        sizes = [tensor.shape[1] for tensor in self._tensors(params, ctx) if tensor.dim() == 2]
        if known is not None and len(known) != sum(sizes):
            known = None  # those of the other side: this node has missed rounds
        if known is not None and all(bool(tensor.any()) for tensor in torch.split(known, sizes)):
            return known
        edge = f"power gossip {min(ctx.node, peer)} {max(ctx.node, peer)}"
        numbers = stream(ctx.seed, edge, round=ctx.round).standard_normal(sum(sizes), dtype="float32")
        drawn = torch.from_numpy(numbers).to(params.device)
        if known is None:
            return drawn
        pairs = zip(torch.split(known, sizes), torch.split(drawn, sizes), strict=True)
        return torch.cat([old if bool(old.any()) else new for old, new in pairs])


def power_gossip(*, values: Precision | Quantizer = "float32") -> PowerGossip:
    """Return PowerGossip.

    Args:
        values: quantizer of the sent products, or "float32" or "bfloat16".

    Raises:
        ConfigError: not a quantizer.
    """
    return PowerGossip(values)
