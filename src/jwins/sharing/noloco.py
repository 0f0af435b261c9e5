"""NoLoCo: an outer momentum with a consensus term, made for one partner per round.

With x the model at the start of a round, y the one after its local steps, and W the mixing weights, 1/2 for
node and partner:

    v  = lr (y - x) + gamma x                   sent
    m  = momentum m + sum_j W_ij v_j - gamma x_i
    x += m

The sum is over the node and its neighbours. v_i has the node's own weight and those of neighbours without an
update. The paper sends y - x and x; the receiver needs only their weighted sum v, so half of the bytes are
enough. A node that receives nothing keeps y and m.

Source: J. Kolehmainen, N. Blagoev, J. Donaghy, O. Ersoy, C. Nies, "NoLoCo: No-all-reduce Low Communication
Training Method for Large Models", 2025, arXiv 2506.10911.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from jwins.rng import RoundContext
from jwins.sharing.base import Precision, Quantizer, Sharing, Vectors, check_quantizer, quantize
from jwins.sharing.update import Received, Update, dense_of
from jwins.validation import GAMMA, LEARNING_RATE, MOMENTUM


@dataclass(frozen=True, slots=True, eq=False)
class NoLoCoState:
    """State of NoLoCo.

    Attributes:
        start: (P,) float32, x at the start of the round.
        momentum: (P,) float32, m.
        sent: (P,) float32, v as it was sent; None after the merge.
    """

    start: Tensor
    momentum: Tensor
    sent: Tensor | None = None


@dataclass(frozen=True, slots=True)
class NoLoCo(Sharing[NoLoCoState]):
    """NoLoCo; see the module's docstring for the algorithm.

    Attributes:
        lr: learning rate of the outer step, above 0.
        momentum: factor on the momentum from round to round, in [0, 0.999].
        gamma: rate of the consensus, in (0, 1].
        values: quantizer of the sent vector, or "float32" or "bfloat16".

    Raises:
        ConfigError: an argument is out of range.
    """

    lr: float = 0.7
    momentum: float = 0.5
    gamma: float = 0.7
    values: Precision | Quantizer = "float32"
    state_types: ClassVar[tuple[type, ...]] = (NoLoCoState,)

    def __post_init__(self) -> None:
        LEARNING_RATE.check("sharing.lr", self.lr)
        MOMENTUM.check("sharing.momentum", self.momentum)
        GAMMA.check("sharing.gamma", self.gamma)
        check_quantizer(self.values)

    def vectors(self, neighbours: int) -> Vectors:
        """Return the memory of the state and of an exchange."""
        return Vectors(1, 3 + (1 if self.values == "float32" else 2) * (1 + neighbours))

    def init(self, params: Tensor) -> NoLoCoState:
        """Return a momentum of 0."""
        return NoLoCoState(params.clone(), torch.zeros_like(params))

    def share(self, state: NoLoCoState, params: Tensor, ctx: RoundContext) -> tuple[Update, NoLoCoState]:
        """Send the weighted sum of the round's change and its start."""
        own = (params - state.start).mul_(self.lr).add_(state.start, alpha=self.gamma)
        values = quantize(self.values, own, (len(own),), ctx)
        return Update(len(own), None, values), replace(state, sent=dense_of(values))

    def merge(
        self, state: NoLoCoState, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, NoLoCoState]:
        """Take one step of the momentum, towards the received updates."""
        counted = [item for item in received if item.weight > 0.0 and item.update.count == len(params)]
        if not counted or state.sent is None:
            kept = params.clone()
            return kept, NoLoCoState(kept, state.momentum)
        mean = state.sent * (1.0 - sum(item.weight for item in counted))
        for item in counted:
            mean.add_(item.update.dense_values().to(mean.device), alpha=item.weight)
        momentum = mean.sub_(state.start, alpha=self.gamma).add_(state.momentum, alpha=self.momentum)
        merged = state.start + momentum
        return merged, NoLoCoState(merged, momentum)

    def projected(self, state: NoLoCoState, params: Tensor) -> NoLoCoState:
        """Take ``params`` as the start of the round."""
        return replace(state, start=params.clone())


noloco = NoLoCo
"""Constructor under its name in ``sharing.kind``."""
