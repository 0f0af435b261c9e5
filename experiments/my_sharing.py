"""A sharing algorithm of one's own: nodes send their model in blocks, one block in each round."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import jwins
from jwins.experiment import RunConfig
from jwins.rng import RoundContext
from jwins.sharing import Sharing, mix, random_k
from jwins.sharing.update import Received, Update


@dataclass(frozen=True)
class Blocks(Sharing[None]):
    """Send block ``r mod blocks`` of the parameters in round r. The state is empty."""

    blocks: int = 4

    def init(self, params: Tensor) -> None:
        """Return the state before the first round."""

    def share(self, state: None, params: Tensor, ctx: RoundContext) -> tuple[Update, None]:
        """Return the update that all neighbours receive after local training."""
        block = torch.arange(len(params)).tensor_split(self.blocks)[ctx.round % self.blocks]
        return Update(len(params), block, params[block]), None

    def merge(
        self, state: None, params: Tensor, received: Sequence[Received], ctx: RoundContext
    ) -> tuple[Tensor, None]:
        """Move towards the values of the neighbours, each by its mixing weight."""
        return params + mix(params, received), None


if __name__ == "__main__":
    for name, algorithm in (("blocks", Blocks(4)), ("random sampling", random_k(0.25))):
        experiment = jwins.Experiment(name=name, sharing=algorithm, run=RunConfig(rounds=100))
        last = jwins.simulate(experiment).rows[-1]
        print(f"{name}: accuracy {last['accuracy_mean']:.1%}, {last['bytes_per_node'] / 1e6:.1f} MB per node")
