"""Rounding errors of the stateless algorithm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from jwins.errors import ConfigError
from jwins.rng import RoundContext
from jwins.sharing import stateless
from jwins.sharing.update import Received

P, STEP = 64, 0.25


def ctx(node: int, round: int) -> RoundContext:
    return RoundContext(seed=3, node=node, round=round, weights={1 - node: 0.5})


def received(rounding: str, rounds: int) -> list[Tensor]:
    """Return the errors, (P,) each, of the values that a neighbour receives of a slowly moving model."""
    algorithm = stateless(STEP, rounding=rounding, wavelet=None)  # type: ignore[arg-type]
    drift = torch.from_numpy(np.random.default_rng(5).normal(0.0, 0.02, P).astype(np.float32))
    params = torch.zeros(P)
    state, errors = algorithm.init(params), []
    for r in range(rounds):
        params = params + drift
        update, state = algorithm.share(state, params, ctx(0, r))
        errors.append(update.dense_values() - params)
        merged, state = algorithm.merge(state, params, [], ctx(0, r))
        assert torch.equal(merged, params)
    return errors


def test_errors_that_are_carried_over_sum_to_half_a_step_at_most() -> None:
    errors = torch.stack(received("carry", 200)).cumsum(0)
    assert errors.abs().max() <= STEP / 2 * 1.001
    assert errors.abs().max() > STEP / 4  # something was rounded


def test_errors_of_a_dither_add_up() -> None:
    errors = torch.stack(received("dither", 200))
    assert errors.abs().max() <= STEP / 2 * 1.001
    expected = STEP / np.sqrt(12) * np.sqrt(200)
    assert errors.sum(0).std() == pytest.approx(expected, rel=0.4)


def test_what_nobody_receives_takes_nothing_back() -> None:
    algorithm = stateless(1.0, wavelet=None)
    alone = RoundContext(seed=3, node=0, round=1, weights={})
    _, state = algorithm.share(algorithm.init(torch.zeros(2)), torch.tensor([0.4, -0.3]), ctx(0, 0))
    _, after = algorithm.share(state, torch.tensor([0.4, -0.3]), alone)
    assert torch.equal(after.residual, state.residual)


def test_only_a_dither_is_on_the_wire() -> None:
    for rounding, seeded in (("carry", False), ("dither", True)):
        algorithm = stateless(STEP, rounding=rounding)  # type: ignore[arg-type]
        update, _ = algorithm.share(algorithm.init(torch.zeros(P)), torch.ones(P), ctx(0, 0))
        assert (update.values.dither is not None) is seeded


def test_carried_errors_follow_hand_computed_rounds() -> None:
    algorithm = stateless(1.0, wavelet=None)
    state = algorithm.init(torch.zeros(2))
    symbols, trained = [], torch.tensor([0.4, -0.3])
    for r in range(4):
        update, state = algorithm.share(state, trained, ctx(0, r))
        symbols.append(update.values.symbols.tolist())
        other = Received(1, r, 0.5, update)
        merged, state = algorithm.merge(state, trained, [other], ctx(0, r))
        assert torch.equal(merged, trained + 0.5 * (update.dense_values() - trained))
    # 0.4, 0.8 -> 1, 0.2, 0.6 -> 1 and -0.3, -0.6 -> -1, 0.1, -0.2
    assert symbols == [[0, 0], [1, -1], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    "wrong", [{"rounding": "up"}, {"self_term": "sent"}, {"self_term": "mine", "rounding": "dither"}]
)
def test_what_does_not_go_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"sharing\.(rounding|self_term)"):
        stateless(**wrong)  # type: ignore[arg-type]
