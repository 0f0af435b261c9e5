"""Symbols of the closed loop for coefficients that stand still except for a little noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from jwins.rng import RoundContext
from jwins.sharing import closed_loop
from jwins.sharing.rate import Pace
from jwins.sharing.update import Quantized, Received

STEP = 0.01
ROUNDS = 12


def times_encoded(dead_zone: float, noise: float) -> Tensor:
    """Of each of 2,000 coefficients, in how many rounds its symbol is not 0; noise is in steps."""
    loop = closed_loop(STEP, wavelet=None, dead_zone=dead_zone, residual_rate=1.0)
    centres = STEP * torch.linspace(-5.0, 5.0, 2000)
    state, encoded = loop.init(torch.zeros_like(centres)), torch.zeros(len(centres), dtype=torch.int64)
    for number in range(ROUNDS):
        context = RoundContext(seed=1, node=0, round=number)
        params = centres + STEP * noise * (-1) ** number
        update, state = loop.share(state, params, context)
        assert isinstance(update.values, Quantized)
        encoded += update.values.symbols != 0
        error = (params - loop.grid.values(state.x_hat)).abs().max() / STEP
        assert float(error) <= dead_zone + 1e-4
        _, state = loop.merge(state, params, [], context)
    return encoded


def test_the_default_dead_zone_encodes_once_what_stays() -> None:
    assert int(times_encoded(closed_loop().dead_zone, noise=0.15).max()) == 1


def test_plain_rounding_encodes_it_again_and_again_between_two_symbols() -> None:
    encoded = times_encoded(0.5, noise=0.15)
    assert int(encoded.max()) == ROUNDS
    assert 0.2 < float((encoded > 1).double().mean()) < 0.4, "what is within the noise of a boundary"


@dataclass(frozen=True)
class Wished:
    """A step that is asked for in every round; the one that is taken is a power of two."""

    step: float
    steady: ClassVar[bool] = False

    def next(self, pace: Pace, *_: object) -> Pace:
        return replace(pace, step=self.step)


@pytest.mark.parametrize("dead_zone", [0.5, 0.65, 0.8])
@pytest.mark.parametrize("wish", [2**-10.4, 2**-10.2, 2**-10, 2**-9.7, 3e-7, 1e-8])
def test_what_stands_still_is_encoded_once_whatever_step_is_wished_for(dead_zone: float, wish: float) -> None:
    """Also where the step that is taken is longer, as the nearest power of two, or the unit, may be."""
    loop = replace(closed_loop(wavelet=None, dead_zone=dead_zone, residual_rate=1.0), rule=Wished(wish))
    params = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 5 * wish
    state = loop.init(torch.zeros_like(params))
    for number in range(4):
        update, state = loop.share(state, params, RoundContext(seed=1, node=0, round=number))
        assert isinstance(update.values, Quantized)
        assert bool(update.values.symbols.any()) == (number == 0 and wish > 1e-7)
        _, state = loop.merge(state, params, [], RoundContext(seed=1, node=0, round=number))


@pytest.mark.parametrize(("step", "far"), [(1e-6, 900.0), (1e-9, 0.9)])
def test_a_neighbour_follows_a_change_longer_than_a_replica_is_wide(step: float, far: float) -> None:
    """From one end to the other takes two rounds; nothing is missed."""
    loop = closed_loop(step, wavelet=None, residual_rate=1.0)
    here, there = (loop.init(torch.zeros(4)) for _ in range(2))
    for number in range(6):
        context = RoundContext(seed=1, node=0, round=number, weights={1: 0.5})
        of_other = replace(context, node=1, weights={0: 0.5})
        params = torch.full((4,), far if number < 3 else -far)
        update, here = loop.share(here, params, context)
        _, here = loop.merge(here, params, [], context)
        _, there = loop.merge(there, torch.zeros(4), [Received(0, number, 0.5, update)], of_other)
        assert not loop.stale_peers(there)
        if number in (2, 5):
            torch.testing.assert_close(loop.grid.values(here.x_hat), params, rtol=1e-5, atol=2 * step)


@pytest.mark.parametrize("moving", [10, 900])
def test_the_history_takes_memory_for_nonzero_symbols_and_leads_to_the_same_replica(moving: int) -> None:
    """More than half of all coefficients are kept as a vector."""
    loop = closed_loop(STEP, wavelet=None, residual_rate=1.0, history=3)
    params = torch.zeros(1000)
    state, replicas = loop.init(params), {}
    for number in range(6):
        params = params.index_fill(0, torch.arange(moving) + 7 * number, 3.2 * STEP * (number + 1))
        context = RoundContext(seed=1, node=0, round=number)
        _, state = loop.share(state, params, context)
        _, state = loop.merge(state, params, [], context)
        replicas[number] = state.x_hat.clone()
    assert list(state.increments) == [2, 3, 4]
    for increment in state.increments.values():
        assert (increment.positions is None) == (moving > 500)
        assert len(increment.units) == (1000 if increment.positions is None else len(increment.positions))
        assert increment.positions is None or moving <= len(increment.units) <= moving + 7
    for base in (2, 3, 4):
        missed = loop.delta_since(state, base, context)
        assert missed is not None
        assert torch.equal(loop.grid.advanced(replicas[base], missed), state.x_hat)
    assert loop.delta_since(state, 1, context) is None


def test_receivers_with_equal_replicas_hold_one_and_a_drifted_one_is_noticed() -> None:
    """Equal is by bits: replicas that a checkpoint restored apart become one again."""
    loop = closed_loop(STEP, wavelet=None)
    sender = loop.init(torch.zeros(100))
    receivers = [loop.init(torch.zeros(100)) for _ in range(3)]
    for number in range(3):
        context = RoundContext(seed=1, node=0, round=number, weights={1: 0.25, 2: 0.25, 3: 0.25})
        update, sender = loop.share(sender, torch.linspace(-1.0, 1.0, 100) * (number + 1), context)
        _, sender = loop.merge(sender, torch.zeros(100), [], context)
        if number == 2:
            known = [state.replicas[0] for state in receivers]
            restored, drifted = known[1].x_hat.clone(), known[2].x_hat.clone()
            drifted[7] += 1
            for at, x_hat in enumerate((known[0].x_hat, restored, drifted)):
                receivers[at] = replace(receivers[at], replicas={0: replace(known[at], x_hat=x_hat)})
        for at, state in enumerate(receivers):
            of_receiver = RoundContext(seed=1, node=at + 1, round=number, weights={0: 0.25})
            receivers[at] = loop.merge(
                state, torch.zeros(100), [Received(0, number, 0.25, update)], of_receiver
            )[1]
    one, other, wrong = receivers
    assert one.replicas[0].x_hat is other.replicas[0].x_hat
    assert torch.equal(one.replicas[0].x_hat, sender.x_hat)
    assert [loop.stale_peers(state) for state in (one, other, wrong)] == [frozenset(), frozenset(), {0}]
