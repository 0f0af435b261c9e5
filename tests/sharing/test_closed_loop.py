"""Symbols of the closed loop for coefficients that stand still except for a little noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.rng import RoundContext
from jwins.sharing import ClosedLoop, closed_loop
from jwins.sharing.closed_loop import ClosedLoopState
from jwins.sharing.rate import Pace
from jwins.sharing.update import Quantized, Received, Update

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


SHAPES = ((12, 20), (5,))


def low_rank_pair(rounds: int, **settings: Any) -> tuple[ClosedLoop, ClosedLoopState, ClosedLoopState, Update]:
    """A sender whose matrix changes by one outer product a round, and a neighbour that follows it."""
    loop = closed_loop(wavelet=None, residual_rate=1.0, rank=2, **settings).for_model(SHAPES)
    generator = torch.Generator().manual_seed(1)
    params = torch.zeros(245)
    here, there = (loop.init(params) for _ in range(2))
    for number in range(rounds):
        left, right = torch.randn(12, generator=generator), torch.randn(20, generator=generator)
        params = params + torch.cat([torch.outer(left, right).flatten(), torch.randn(5, generator=generator)])
        context = RoundContext(seed=1, node=0, round=number, weights={1: 0.5})
        update, here = loop.share(here, params, context)
        _, here = loop.merge(here, params, [], context)
        of_other = replace(context, node=1, weights={0: 0.5})
        _, there = loop.merge(there, torch.zeros(245), [Received(0, number, 0.5, update)], of_other)
    return loop, here, there, update


def test_a_low_rank_part_reaches_the_neighbour_exactly() -> None:
    loop, here, there, update = low_rank_pair(6)
    assert isinstance(update.values, Quantized)
    assert update.dim == loop.update_dim(245) == 245 + 2 * 32
    assert update.values.symbols[: 2 * 32].any()
    assert torch.equal(there.replicas[0].x_hat, here.x_hat)
    assert not loop.stale_peers(there)


def test_a_low_rank_part_sends_a_matrix_of_low_rank_with_fewer_symbols() -> None:
    """To the same distance from the model."""
    _, here, _, few = low_rank_pair(1, step_ratio=8.0)
    loop = closed_loop(wavelet=None, residual_rate=1.0, step_ratio=0.5)
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(12, generator=generator), torch.randn(20, generator=generator)
    params = torch.cat([torch.outer(left, right).flatten(), torch.randn(5, generator=generator)])
    update, state = loop.share(loop.init(torch.zeros(245)), params, RoundContext(seed=1, node=0, round=0))
    assert isinstance(update.values, Quantized)
    assert isinstance(few.values, Quantized)
    apart = [float((params - loop.grid.values(s.x_hat))[:240].norm()) for s in (here, state)]
    assert apart[0] < apart[1]
    assert int((few.values.symbols != 0).sum()) < int((update.values.symbols != 0).sum()) / 2


@pytest.mark.parametrize("how", ["large", "short", "other runs", "no step", "positions"])
def test_a_low_rank_part_that_does_not_fit_is_refused(how: str) -> None:
    loop, _here, there, update = low_rank_pair(3)
    values = update.values
    assert isinstance(values, Quantized)
    symbols, scales, runs = values.symbols.clone(), values.scales, values.runs
    if how == "large":
        symbols[3] = 33
    elif how == "short":
        symbols, runs = symbols[:-1], (*runs[:-1], runs[-1] - 1)
    elif how == "other runs":
        runs = (runs[0] - 1, 1, runs[2])
    elif how == "no step":
        scales = torch.full_like(scales, loop.grid.unit)
    dim = len(symbols)
    positions = torch.arange(dim) if how == "positions" else None
    false = Update(dim, positions, Quantized(symbols, scales, runs), base=update.base, check=update.check)
    context = RoundContext(seed=1, node=1, round=3, weights={0: 0.5})
    before = there.replicas[0]
    _, after = loop.merge(
        replace(there, replicas={0: replace(before, round=2)}),
        torch.zeros(245),
        [Received(0, 3, 0.5, replace(false, base=2))],
        context,
    )
    assert loop.stale_peers(after) == {0}


def test_missed_low_rank_parts_are_sent_again_as_one() -> None:
    loop, here, _, _ = low_rank_pair(4)
    _, _, there, _ = low_rank_pair(2)
    missed = loop.delta_since(here, 1, RoundContext(seed=1, node=0, round=3))
    assert missed is not None
    assert missed.dim == loop.update_dim(245)
    context = RoundContext(seed=1, node=1, round=3, weights={0: 0.5})
    _, after = loop.merge(there, torch.zeros(245), [Received(0, 3, 0.5, missed)], context)
    assert torch.equal(after.replicas[0].x_hat, here.x_hat)
    _, again = loop.merge(
        loop.init(torch.zeros(245)), torch.zeros(245), [Received(0, 3, 0.5, loop.whole(here))], context
    )
    assert torch.equal(again.replicas[0].x_hat, here.x_hat)


@pytest.mark.parametrize("far", [2e3, 1e30])
def test_far_parameters_with_a_low_rank_part_are_followed_up_to_the_ends_of_a_replica(far: float) -> None:
    loop = closed_loop(wavelet=None, residual_rate=1.0, rank=2).for_model(SHAPES)
    params = torch.full((245,), far) * torch.linspace(-1.0, 1.0, 245)
    here, there = (loop.init(torch.zeros(245)) for _ in range(2))
    for number in range(4):
        context = RoundContext(seed=1, node=0, round=number, weights={1: 0.5})
        update, here = loop.share(here, params, context)
        _, here = loop.merge(here, params, [], context)
        of_other = replace(context, node=1, weights={0: 0.5})
        _, there = loop.merge(there, torch.zeros(245), [Received(0, number, 0.5, update)], of_other)
        assert torch.equal(there.replicas[0].x_hat, here.x_hat)
        assert int(here.x_hat.abs().max()) < 2**30


def test_a_low_rank_part_needs_the_parameters_themselves() -> None:
    with pytest.raises(ConfigError, match=r"sharing.rank = 2: needs wavelet = 'none'"):
        closed_loop(rank=2)
