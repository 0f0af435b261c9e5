"""CHOCO-SGD: compressed differences to a public replica that all neighbours keep.

Every node i has a replica x_hat_i that its neighbours hold too. Per round, after local training to x:

    q_i      = top-k(x_i - x_hat_i)
    x_hat_i += q_i                       at i and at each neighbour that receives q_i
    x_i     += gamma * sum_j W_ij (x_hat_j - x_hat_i)

Source: Koloskova, Stich, Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed
Communication", ICML 2019, algorithm 2; Koloskova et al., ICLR 2020.

:mod:`jwins.sharing.replicas` keeps replicas equal at sender and receivers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from jwins.ops.select import count_of, largest_k
from jwins.rng import RoundContext
from jwins.sharing.base import Precision, Quantizer, check_quantizer, quantize
from jwins.sharing.replicas import OnReplicas, Replica, added, follow, hash_of
from jwins.sharing.update import Received, Update
from jwins.validation import FRACTION, GAMMA


@dataclass(frozen=True, slots=True, eq=False)
class ChocoState:
    """State of CHOCO-SGD.

    Attributes:
        x_hat: (P,) float32, this node's own replica, as its neighbours hold it.
        shared: the round of this node's last share, or None.
        replicas: replicas of the neighbours, by node.
        stale_peers: neighbours whose keyframe is needed.
    """

    x_hat: Tensor
    shared: int | None = None
    replicas: Mapping[int, Replica] = field(default_factory=dict)
    stale_peers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Choco(OnReplicas[ChocoState]):
    """CHOCO-SGD with a top-k compressor; see the module's docstring for the algorithm.

    Attributes:
        fraction: fraction of the parameters to send, in (0, 1].
        gamma: consensus step size, in (0, 1]; smaller for smaller fractions.
        values: quantizer of the sent differences, or "float32" or "bfloat16".

    Raises:
        ConfigError: an argument is out of range.

    >>> choco(0.2, gamma=0.6)
    Choco(fraction=0.2, gamma=0.6, values='float32')
    """

    fraction: float
    gamma: float
    values: Precision | Quantizer = "float32"
    asynchronous: ClassVar[bool] = True
    state_types: ClassVar[tuple[type, ...]] = (ChocoState, Replica)

    def __post_init__(self) -> None:
        FRACTION.check("sharing.fraction", self.fraction)
        GAMMA.check("sharing.gamma", self.gamma)
        check_quantizer(self.values)

    def init(self, params: Tensor) -> ChocoState:
        """Return replicas of 0, which need no message."""
        return ChocoState(torch.zeros_like(params))

    def share(self, state: ChocoState, params: Tensor, ctx: RoundContext) -> tuple[Update, ChocoState]:
        """Send the largest differences between the parameters and this node's replica."""
        difference = params - state.x_hat
        positions, subbands = self.chosen(difference)
        chosen = difference if positions is None else difference.index_select(0, positions)
        values = quantize(self.values, chosen, subbands, ctx)
        x_hat = added(state.x_hat, positions, values)
        update = Update(len(params), positions, values, base=state.shared, check=hash_of(x_hat))
        return update, replace(state, x_hat=x_hat, shared=ctx.round)

    def chosen(self, difference: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
        """Choose positions (k,) of ``difference`` (P,), None for all, and count them in each subband."""
        count = count_of(self.fraction, len(difference))
        return None if count == len(difference) else largest_k(difference, count), (count,)

    def merge(
        self, state: ChocoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, ChocoState]:
        """Update the replicas, then take one gossip step with those whose update arrived in this round."""
        followed = follow(state.replicas, state.stale_peers, received, ctx.weights, like=params)
        return (
            params + self.gamma * followed.pull(state.x_hat),
            replace(state, replicas=followed.replicas, stale_peers=followed.stale_peers),
        )


choco = Choco
"""Constructor under its name in ``sharing.kind``."""
