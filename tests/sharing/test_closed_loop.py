"""What the closed loop says of coefficients that stay where they are, but for a little noise."""

from __future__ import annotations

import torch
from torch import Tensor

from jwins.rng import RoundContext
from jwins.sharing import closed_loop
from jwins.update import Quantized

STEP = 0.01
ROUNDS = 12


def often_said(zero: float, noise: float) -> Tensor:
    """Of each of 2,000 coefficients, in how many rounds its level is not 0; noise is in steps."""
    loop = closed_loop(STEP, wavelet=None, zero=zero, feedback=1.0)
    centres = STEP * torch.linspace(-5.0, 5.0, 2000)
    state, said = loop.init(torch.zeros_like(centres)), torch.zeros(len(centres), dtype=torch.int64)
    for number in range(ROUNDS):
        context = RoundContext(seed=1, node=0, round=number)
        params = centres + STEP * noise * (-1) ** number
        update, state = loop.share(state, params, context)
        assert isinstance(update.values, Quantized)
        said += update.values.levels != 0
        error = (params - loop.grid.values(state.x_hat)).abs().max() / STEP
        assert float(error) <= zero + 1e-4
        _, state = loop.merge(state, params, [], context)
    return said


def test_the_default_dead_zone_says_once_what_stays() -> None:
    assert int(often_said(closed_loop().zero, noise=0.15).max()) == 1


def test_plain_rounding_says_it_again_and_again_between_two_levels() -> None:
    said = often_said(0.5, noise=0.15)
    assert int(said.max()) == ROUNDS
    assert 0.2 < float((said > 1).double().mean()) < 0.4, "what is within the noise of a boundary"
