"""Models that attackers share in place of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jwins.rng import RoundContext, torch_generator
from jwins.scenario import Attack


def attacked(
    attack: Attack, start: Tensor, trained: Tensor, spread: Tensor | None, ctx: RoundContext
) -> Tensor:
    """Return the model that an attacker shares.

    With s the scale, the kinds are::

        sign_flip   start - s (trained - start)
        gaussian    trained + s N(0, 1)
        little      trained - s spread, with the spread of the models that the node last received

    ``little`` is after Baruch et al., "A Little Is Enough: Circumventing Defenses For Distributed Learning",
    NeurIPS 2019: a shift that hides among honest differences.

    Args:
        attack: kind and scale.
        start: (P,) float32, the node's model at the start of the round.
        trained: (P,) float32, after training.
        spread: (P,) float32, of :func:`deviation`; None if the node last received fewer than two models, and
            then ``little`` is no attack.
        ctx: the round.

    Returns:
        (P,) float32; ``trained`` itself where there is no attack.
    """
    match attack.kind:
        case "sign_flip":
            return start - attack.scale * (trained - start)
        case "gaussian":
            generator = torch_generator(ctx.seed, "attack", node=ctx.node, round=ctx.round)
            noise = torch.randn(len(trained), generator=generator).to(trained.device)
            return trained + attack.scale * noise
        case "little" if spread is not None:
            return trained - attack.scale * spread
        case _:
            return trained


def deviation(models: Sequence[Tensor]) -> Tensor | None:
    """Return the standard deviation of each parameter over models, (P,) float32; None for fewer than two."""
    return torch.stack(list(models)).std(dim=0, unbiased=False) if len(models) > 1 else None
