"""Rules for the step: what they refuse, that budgets are kept, and that nothing depends on a unit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.experiment import Experiment
from jwins.rng import RoundContext, stream
from jwins.sharing import Budget, FixedStep, LinkBudget, RelativeStep, closed_loop, stateless
from jwins.sharing.rate import Pace
from jwins.sharing.step_grid import FINEST
from jwins.sharing.update import Quantized, Update
from jwins.wire import codec

P = 4000
HEADER = 36
ROUNDS = 150


def training(round: int, scale: float = 0.01) -> Tensor:
    """Return a change by training in which most weights move little."""
    rng = stream(11, "training", round=round)
    return torch.from_numpy(rng.laplace(size=P, scale=scale) * (rng.random(P) < 0.3)).float()


def frames(algorithm: Any, scale: float = 0.01, rounds: int = ROUNDS) -> list[tuple[int, Update]]:
    """Bytes of each frame of a node that learns alone, and what it sent."""
    params = torch.zeros(P)
    state, sent, found = algorithm.init(params), 0, []
    for r in range(rounds):
        ctx = RoundContext(seed=1, node=0, round=r, sent_bytes=sent)
        params = params + training(r, scale)
        update, state = algorithm.share(state, params, ctx)
        params, state = algorithm.merge(state, params, [], ctx)
        sent = HEADER + len(codec("pco").encode(update).data)
        found.append((sent, update))
    return found


@pytest.mark.parametrize("bits", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("build", [closed_loop, stateless], ids=lambda build: build.__name__)
def test_a_budget_is_spent_within_five_per_cent(build: Any, bits: float) -> None:
    spent = sum(sent for sent, _ in frames(build(budget=bits)))
    assert spent == pytest.approx(bits * P / 8 * ROUNDS, rel=0.05)


def test_bytes_and_bits_are_the_same_budget() -> None:
    per_frame = [
        [sent for sent, _ in frames(a, rounds=10)]
        for a in (closed_loop(budget=0.8), closed_loop(budget_bytes=400))
    ]
    assert per_frame[0] == per_frame[1]


@pytest.mark.parametrize("neighbours", [1, 4])
def test_seconds_on_a_link_are_bytes_for_each_neighbour(neighbours: int) -> None:
    """0.008 s at 2 Mbit/s carry 2000 bytes, for all neighbours of the round together."""
    ctx = RoundContext(1, 0, 3, dict.fromkeys(range(1, neighbours + 1), 0.2), sent_bytes=700)
    pace, learned = Pace(step=0.1), training(0)
    found = LinkBudget(0.008, 2.0).next(pace, learned, learned, (P,), ctx)
    assert found == Budget(size_bytes=2000 // neighbours).next(pace, learned, learned, (P,), ctx)
    assert found.balance == 2000 // neighbours - 700


@pytest.mark.parametrize("build", [closed_loop, stateless], ids=lambda build: build.__name__)
def test_seconds_are_a_budget_of_settings_too(build: Any) -> None:
    given: Any = {"kind": build.__name__, "budget_seconds": 0.01, "link_mbps": 5.0}
    algorithm = Experiment(sharing=given).sharing.build()  # type: ignore[union-attr]
    assert algorithm.rule == build(budget_seconds=0.01, link_mbps=5.0).rule == LinkBudget(0.01, 5.0)
    for lacking in ("budget_seconds", "link_mbps"):
        rest = {key: value for key, value in given.items() if key != lacking}
        with pytest.raises(ConfigError, match=f"sharing.{lacking} = <missing>: required"):
            Experiment(sharing=rest)
        with pytest.raises(ConfigError, match=f"sharing.{lacking} = <missing>: required"):
            build(**{key: value for key, value in rest.items() if key != "kind"})
    with pytest.raises(ConfigError, match=r"sharing.budget_seconds = 0.01: step sets the rate already"):
        Experiment(sharing={**given, "step": 0.1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sharing.link_mbps = 0.0"):
        build(budget_seconds=1.0, link_mbps=0.0)


def test_a_budget_below_a_header_sends_next_to_nothing_and_stays_finite() -> None:
    sent = [size for size, _ in frames(closed_loop(budget_bytes=1), rounds=60)]
    assert max(sent[-20:]) < 200


def test_a_surplus_is_not_saved_for_ever() -> None:
    """A node that had nothing to say for long does not flood its neighbours when it has."""
    rule = Budget(bits=1.0)
    pace, quiet = Pace(), torch.full((P,), 1e-6)
    for r in range(50):
        ctx = RoundContext(seed=1, node=0, round=r, sent_bytes=100)
        pace = rule.next(pace, quiet, quiet, (P,), ctx)
    assert pace.balance <= 20 * P / 8


def test_stateless_has_a_budget_where_nothing_is_given() -> None:
    assert stateless().rule == Budget(bits=1.6, free_bytes=64)
    assert Experiment(sharing={"kind": "stateless"}).sharing.build() == stateless()  # type: ignore
    assert stateless(step_ratio=8.0).rule == RelativeStep(8.0)
    spent = sum(sent for sent, _ in frames(stateless()))
    assert spent == pytest.approx((1.6 * P / 8 + 64) * ROUNDS, rel=0.05)


@pytest.mark.parametrize(
    "build", [closed_loop, partial(stateless, step_ratio=8.0)], ids=["closed_loop", "stateless"]
)
def test_a_relative_step_follows_the_scale_of_what_is_learned(build: Any) -> None:
    """Sixteen times the change: the same symbols and sixteen times the steps."""
    for (_, one), (_, other) in zip(
        frames(build(), rounds=10), frames(build(), scale=0.16, rounds=10), strict=True
    ):
        assert isinstance(one.values, Quantized)
        assert isinstance(other.values, Quantized)
        assert torch.allclose(other.values.scales, 16 * one.values.scales, rtol=1e-4)
        assert (one.values.symbols != other.values.symbols).sum() <= P / 1000


def test_nothing_learned_is_no_error() -> None:
    for rule in (FixedStep(0.1), RelativeStep(2.0), Budget(bits=1.0)):
        for r in range(3):
            ctx = RoundContext(seed=1, node=0, round=r, sent_bytes=100 * r)
            assert rule.next(Pace(), torch.zeros(P), torch.zeros(P), (P,), ctx).step > 0


def test_numbers_may_be_those_of_numpy() -> None:
    assert closed_loop(budget=np.float32(0.5)).rule == Budget(bits=0.5)  # type: ignore[arg-type]
    assert stateless(budget_bytes=np.int64(4000)).rule == Budget(size_bytes=4000)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sharing.budget = '0.3': expected bits per parameter"):
        closed_loop(budget="0.3")  # type: ignore[arg-type]


def test_a_first_step_is_one_that_can_be_written() -> None:
    ctx = RoundContext(seed=1, node=0, round=0, sent_bytes=0)
    least = torch.full((P,), 1e-43)
    assert Budget(bits=1.6).next(Pace(), least, least, (P,), ctx).step == pytest.approx(1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": 0.0},
        {"step": -1.0},
        {"step": float("nan")},
        {"budget": 0.0},
        {"budget": 33.0},
        {"budget_bytes": 0},
        {"step_ratio": 0.0},
        {"step": 0.1, "budget": 1.0},
        {"budget": 1.0, "budget_bytes": 100},
        {"budget": 1.0, "step_ratio": 5.0},
        {"step": 0.1, "step_ratio": 5.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [closed_loop, stateless], ids=lambda build: build.__name__)
def test_arguments_and_settings_are_refused_alike(build: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^sharing\.") as of_object:
        build(**arguments)
    with pytest.raises(ConfigError) as of_settings:
        Experiment(sharing={"kind": build.__name__, **arguments})  # type: ignore[arg-type]
    assert of_settings.value.path == of_object.value.path


def test_a_first_step_fits_what_has_changed_however_little_that_is() -> None:
    learned = training(0)
    found = []
    for size in (P, 50 * P):
        wanted = torch.zeros(size)
        wanted[:P] = learned
        ctx = RoundContext(seed=1, node=0, round=0)
        found.append(Budget(bits=1.6).next(Pace(), wanted, wanted, (size,), ctx).step)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert 0.1 < found[0] / float(learned[learned != 0].std()) < 10


def test_a_budget_begins_with_the_first_round_in_which_something_changed() -> None:
    rule, ctx = Budget(bits=1.6), RoundContext(seed=1, node=0, round=0)
    pace = rule.next(Pace(), torch.zeros(P), torch.zeros(P), (P,), ctx)
    learned = training(0)
    after = RoundContext(seed=1, node=0, round=1, sent_bytes=HEADER)
    assert (
        rule.next(pace, learned, learned, (P,), after).step
        == rule.next(Pace(), learned, learned, (P,), ctx).step
    )


def test_free_bytes_are_not_for_the_symbols() -> None:
    learned, ctx = training(0), RoundContext(seed=1, node=0, round=0)
    steps = [
        Budget(bits=1.6, free_bytes=free).next(Pace(), learned, learned, (P,), ctx).step for free in (0, 1000)
    ]
    assert steps[0] == steps[1]


@dataclass(frozen=True)
class Scripted:
    """Wishes, in units of the finest grid, whatever was learned."""

    wishes: tuple[float, ...]
    steady: bool = True

    def next(
        self, pace: Pace, trained: Tensor, wanted: Tensor, subbands: tuple[int, ...], ctx: RoundContext
    ) -> Pace:
        return Pace(step=self.wishes[ctx.round] * FINEST)


def quantized(rule: Scripted, moved: float) -> list[tuple[int, int]]:
    """Of each round the step, in units, and the symbol of a value that is ``moved`` units off what is known."""
    algorithm = replace(closed_loop(wavelet=None, history=0, dead_zone=0.5), rule=rule)
    state, found = algorithm.init(torch.zeros(1)), []
    for r in range(len(rule.wishes)):
        params = (state.x_hat + moved) * FINEST
        update, state = algorithm.share(state, params, RoundContext(seed=1, node=0, round=r))
        assert isinstance(update.values, Quantized)
        found.append((round(float(update.values.scales[0]) / FINEST), int(update.values.symbols[0])))
    return found


def test_a_steady_step_stays_until_the_wish_is_an_octave_away() -> None:
    wishes = (1024.0, 1500.0, 1900.0, 2100.0, 1600.0, 1100.0, 1000.0, 513.0, 500.0)
    steps = [step for step, _ in quantized(Scripted(wishes), 0.0)]
    assert steps == [1024, 1024, 1024, 2048, 2048, 2048, 1024, 1024, 512]
    restless = [step for step, _ in quantized(Scripted(wishes, steady=False), 0.0)]
    assert restless == [1024, 2048, 2048, 2048, 2048, 1024, 1024, 512, 512]


def test_meanwhile_the_dead_zone_becomes_wider_but_never_narrower() -> None:
    assert quantized(Scripted((1024.0, 1100.0, 1300.0, 600.0)), 614.0) == [
        (1024, 1),
        (1024, 1),
        (1024, 0),
        (1024, 1),
    ]
    assert quantized(Scripted((1024.0, 600.0)), 500.0) == [(1024, 0), (1024, 0)]


@pytest.mark.parametrize("rule", [Budget(bits=1.0), LinkBudget(1.0, 1.0)])
def test_budgets_are_steady(rule: Budget | LinkBudget) -> None:
    assert rule.steady
    assert not FixedStep(0.1).steady
    assert not RelativeStep(3.0).steady
