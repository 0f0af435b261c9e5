"""An outer optimizer: it takes the change by a round's local steps as one gradient, and steps before sharing.

With x the model at the start of a round, y the one after its local steps, and W the mixing weights::

    g = x - y                              pseudo-gradient of the round
    m = momentum m + g
    z = x - lr (g + momentum m)            Nesterov's step; z is shared in place of y
    x = mixed z                            by whatever algorithm

With full sharing on a complete graph with equal weights, every node gets the mean of all z: x minus the step
for the mean pseudo-gradient. This is DiLoCo (Douillard et al., "DiLoCo: Distributed Low-Communication Training
of Language Models", 2023, arXiv 2311.08105), without a server and its copy of the model. On other graphs each
node has a momentum of its own, which mixing affects only through the model; this is gossip with outer momentum,
as in GASLoC. In :mod:`jwins.sharing.noloco`, by contrast, neighbours' updates enter the momentum itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from jwins.validation import LEARNING_RATE, MOMENTUM


@dataclass(frozen=True, slots=True)
class Nesterov:
    """Nesterov's step on the change of a round; see the module's docstring.

    Attributes:
        lr: learning rate of the outer step; 1 with ``momentum = 0`` leaves the model as it was trained.
        momentum: factor on the momentum from round to round, in [0, 0.999].

    Raises:
        ConfigError: out of range, at ``train.outer``.

    >>> import torch
    >>> z, m = Nesterov(lr=0.5, momentum=0.8).step(torch.tensor([1.0]), torch.tensor([0.0]), None)
    >>> z, m
    (tensor([0.1000]), tensor([1.]))
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        LEARNING_RATE.check("train.outer.lr", self.lr)
        MOMENTUM.check("train.outer.momentum", self.momentum)

    def step(self, start: Tensor, trained: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the model to share and the momentum after the step.

        Args:
            start: (P,) float32, the model at the start of the round.
            trained: (P,) float32, after its local steps.
            momentum: (P,) float32, None before the first step.
        """
        change = start - trained
        after = change.clone() if momentum is None else (momentum * self.momentum).add_(change)
        return start - change.add_(after, alpha=self.momentum).mul_(self.lr), after
