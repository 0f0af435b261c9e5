"""DeMo: the largest cosine coefficients of a momentum leave it and are sent.

Let T be the discrete cosine transform of blocks of each tensor (:class:`jwins.ops.dct.BlockDct`). On a complete
graph all nodes start a round from one model x, as in the paper. After local training to y:

    m  = decay m + T(y - x)
    q  = the k largest of each block of m       sent; everything else stays in the momentum
    m  = m - q
    Q  = mean of the q of the nodes that sent a coefficient, each coefficient by itself
    x  = x + lr sign(T^-1 Q)                    or lr T^-1 Q with ``sign = False``

With one step of SGD per round, whose learning rate is ``lr``, this is the rule of the authors' code. Nothing
brings models back together that differ, because a sum of signs cannot be sent again: every frame must arrive.
A node that receives nothing keeps y.

On other graphs nodes receive different q. Steps of signs would drive them apart in every parameter, so steps
have no sign there, and replicas hold nodes together. Every node i has the sum x_hat_i of all that it has sent,
and so have its neighbours. It begins at 0, as the pull g does. With x_0 for the common initial parameters:

    m      = decay m + T(y - x) + gamma g
    q      = the k largest of each block of m
    m      = m - q
    x_hat += q                                  at i and at each neighbour that receives q
    g      = sum_j W_ij (x_hat_j - x_hat_i)
    x      = x_0 + T^-1( x_hat_i + g )

So a model is the mean of the sums of a node and its neighbours, and the momentum is no part of any model, as in
the paper. The mean of x_hat + m over the nodes moves by the changes of training and by ``decay`` only.
The first update of a node that begins with another node's model has all coefficients.

Source: B. Peng, L. Chen, B. Su, J. Quesnelle, D. P. Kingma, Q. Liu, "DeMo: Decoupled Momentum Optimization",
2024, arXiv 2411.19870.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.ops.dct import BlockDct
from jwins.rng import RoundContext
from jwins.sharing.base import Precision, Quantizer, S, Sharing, Vectors, check_quantizer, quantize
from jwins.sharing.replicas import OnReplicas, Replica, added, follow, hash_of
from jwins.sharing.update import Quantized, Received, Update, dense_of
from jwins.validation import COUNT, GAMMA, LEARNING_RATE, MOMENTUM


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfBlocks(Sharing[S]):
    """Settings that both forms have, and the choice of what is sent.

    Attributes:
        decay: factor on the momentum from round to round, in [0, 0.999].
        k: number of coefficients to send of each block, at least 1; all of a smaller block.
        block: length of a block's sides, at least 1.
        values: quantizer of the sent coefficients, or "float32" or "bfloat16".
        shapes: shapes of the model's tensors, from :meth:`for_model`. Without them, the parameters count as the
            largest square matrix that they fill and a vector with the rest.
    """

    decay: float = 0.999
    k: int = 32
    block: int = 64
    values: Precision | Quantizer = "float32"
    shapes: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        MOMENTUM.check("sharing.decay", self.decay)
        COUNT.check_whole("sharing.k", self.k)
        COUNT.check_whole("sharing.block", self.block)
        check_quantizer(self.values)

    def for_model(self, shapes: tuple[tuple[int, ...], ...]) -> Self:
        """Return the algorithm for tensors of these shapes."""
        return replace(self, shapes=shapes)

    def dct(self, params: Tensor) -> BlockDct:
        """Return the transform of a vector like ``params`` (P,)."""
        square = math.isqrt(len(params))
        unknown = ((square, square), (len(params) - square * square,))
        return BlockDct(unknown if self.shapes is None else self.shapes, self.block)

    def largest(
        self, coefficients: Tensor, ctx: RoundContext, k: int
    ) -> tuple[Tensor | None, Tensor | Quantized]:
        """Return positions (None for all) and values of the k largest coefficients of each block."""
        positions, subbands = self.dct(coefficients).largest(coefficients, k)
        chosen = coefficients if positions is None else coefficients.index_select(0, positions)
        return positions, quantize(self.values, chosen, subbands, ctx)


@dataclass(frozen=True, slots=True, eq=False)
class CommonDemoState:
    """State of DeMo on a complete graph.

    Attributes:
        start: (P,) float32, the parameters at the start of the round.
        momentum: (P,) float32, m, in coefficients.
        sent: (P,) float32, q as it was sent, 0 elsewhere; None after the merge.
    """

    start: Tensor
    momentum: Tensor
    sent: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonDemo(_OfBlocks[CommonDemoState]):
    """DeMo on a complete graph; see the module's docstring for the algorithm.

    Attributes:
        lr: learning rate of the outer step, above 0.
        sign: whether the step is the sign of each parameter's mean change, or the change itself.
    """

    lr: float
    sign: bool = True
    state_types: ClassVar[tuple[type, ...]] = (CommonDemoState,)

    def __post_init__(self) -> None:
        _OfBlocks.__post_init__(self)
        LEARNING_RATE.check("sharing.lr", self.lr)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state, and of an exchange of updates with up to a third of the values."""
        return Vectors(1, 8 + neighbours)

    def init(self, params: Tensor) -> CommonDemoState:
        """Return a momentum of 0."""
        return CommonDemoState(params.clone(), torch.zeros_like(params))

    def share(
        self, state: CommonDemoState, params: Tensor, ctx: RoundContext
    ) -> tuple[Update, CommonDemoState]:
        """Add the round's change to the momentum, and send the largest coefficients of it."""
        momentum = self.dct(params).forward(params - state.start).add_(state.momentum, alpha=self.decay)
        positions, values = self.largest(momentum, ctx, self.k)
        sent = added(torch.zeros_like(momentum), positions, values)
        return Update(len(params), positions, values), replace(state, momentum=momentum - sent, sent=sent)

    def merge(
        self, state: CommonDemoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, CommonDemoState]:
        """Take one step from the start of the round; nodes add in the same order and get the same bits."""
        counted = {item.sender: item for item in received if item.weight > 0.0}
        if not counted or state.sent is None:
            kept = params.clone()
            return kept, CommonDemoState(kept, state.momentum)
        total, weights = torch.zeros_like(params), torch.zeros_like(params)
        for j in sorted({ctx.node, *counted}):
            weight, positions, values = ctx.own_weight, None, state.sent
            if j in counted:
                weight, update = counted[j].weight, counted[j].update
                positions, values = update.indices(), update.dense_values().to(params.device)
            total = added(total, positions, values * weight)
            weights = added(weights, positions, values.ne(0.0).to(values.dtype) * weight)
        mean = total / weights.clamp_min(torch.finfo(torch.float32).tiny)
        step = self.dct(params).inverse(mean)
        merged = state.start + self.lr * (torch.sign(step) if self.sign else step)
        return merged, CommonDemoState(merged, state.momentum)

    def projected(self, state: CommonDemoState, params: Tensor) -> CommonDemoState:
        """Take ``params`` as the start of the round."""
        return replace(state, start=params.clone())


@dataclass(frozen=True, slots=True, eq=False)
class DemoState:
    """State of DeMo on a graph; momentum, pull and replicas are in coefficients.

    Attributes:
        origin: (P,) float32, the common initial parameters of all nodes.
        start: (P,) float32, the parameters at the start of the round.
        momentum: (P,) float32, m.
        pull: (P,) float32, g.
        x_hat: (P,) float32, this node's own replica, as its neighbours hold it.
        shared: the round of this node's last share, or None.
        replicas: replicas of the neighbours, by node.
        stale_peers: neighbours whose keyframe is needed.
    """

    origin: Tensor
    start: Tensor
    momentum: Tensor
    pull: Tensor
    x_hat: Tensor
    shared: int | None = None
    replicas: Mapping[int, Replica] = field(default_factory=dict)
    stale_peers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo(_OfBlocks[DemoState], OnReplicas[DemoState]):
    """DeMo on a graph; see the module's docstring for the algorithm.

    Attributes:
        gamma: consensus step size, in (0, 1].
    """

    gamma: float
    needs_common_start: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (DemoState, Replica)

    def __post_init__(self) -> None:
        _OfBlocks.__post_init__(self)
        GAMMA.check("sharing.gamma", self.gamma)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state, and of an exchange of updates with up to a third of the values."""
        return Vectors(4 + neighbours, 8 + 2 * neighbours)

    def init(self, params: Tensor) -> DemoState:
        """Return replicas of the common initial parameters, which need no message."""
        origin, zeros = params.clone(), torch.zeros_like(params)
        return DemoState(origin, origin, zeros, zeros, zeros)

    def share(self, state: DemoState, params: Tensor, ctx: RoundContext) -> tuple[Update, DemoState]:
        """Add the round's change and the pull to the momentum, and send the largest coefficients of it."""
        momentum = self.dct(params).forward(params - state.start).add_(state.momentum, alpha=self.decay)
        momentum.add_(state.pull, alpha=self.gamma)
        joined = state.shared is None and bool(state.momentum.any())  # its sum would draw all towards x_0
        positions, values = self.largest(momentum, ctx, self.block**2 if joined else self.k)
        x_hat = added(state.x_hat, positions, values)
        momentum = added(momentum, positions, -dense_of(values))
        update = Update(len(params), positions, values, base=state.shared, check=hash_of(x_hat))
        return update, replace(state, momentum=momentum, x_hat=x_hat, shared=ctx.round)

    def merge(
        self, state: DemoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, DemoState]:
        """Update the replicas, and move the model to the replica and the pull of those that arrived."""
        followed = follow(state.replicas, state.stale_peers, received, ctx.weights, like=params)
        pull = followed.pull(state.x_hat)
        merged = params.clone()
        if followed.received_weights:
            merged = state.origin + self.dct(params).inverse(state.x_hat + pull)
        return merged, replace(
            state, start=merged, pull=pull, replicas=followed.replicas, stale_peers=followed.stale_peers
        )

    def projected(self, state: DemoState, params: Tensor) -> DemoState:
        """Take ``params`` as the start of the round, and the difference as a change."""
        change = self.dct(params).forward(params - state.start)
        return replace(state, start=params.clone(), momentum=state.momentum + change)


def demo(
    lr: float | None = None,
    gamma: float | None = None,
    *,
    sign: bool | None = None,
    decay: float = 0.999,
    k: int = 32,
    block: int = 64,
    values: Precision | Quantizer = "float32",
) -> CommonDemo | Demo:
    """Return DeMo: with ``lr`` as in the paper, on a complete graph, or with ``gamma`` on any graph.

    Args:
        lr: learning rate of the outer step on a complete graph, above 0.
        gamma: consensus step size on a graph, in (0, 1]; smaller for smaller k.
        sign: whether the outer step with ``lr`` has the same length in all parameters; None for True.
        decay: factor on the momentum from round to round, in [0, 0.999].
        k: number of coefficients to send of each block, at least 1.
        block: length of a block's sides, at least 1.
        values: quantizer of the sent coefficients, or "float32" or "bfloat16".

    Raises:
        ConfigError: an argument is out of range, or not exactly one of ``lr`` and ``gamma`` is given.
    """
    if gamma is None:
        if lr is None:
            raise ConfigError(
                "sharing.lr", None, "expected lr on a complete graph, as in the paper, or gamma on any"
            )
        return CommonDemo(lr=lr, sign=sign is not False, decay=decay, k=k, block=block, values=values)
    for name, value in (("lr", lr), ("sign", sign)):
        if value is not None:
            raise ConfigError(
                f"sharing.{name}",
                value,
                "belongs to the outer step, which there is none of with gamma; remove it",
            )
    return Demo(gamma=gamma, decay=decay, k=k, block=block, values=values)
