"""Merges that stand attackers, and the attacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jwins.errors import ConfigError
from jwins.experiment import Experiment
from jwins.rng import RoundContext
from jwins.run.builders import build_sharing
from jwins.scenario import Attack
from jwins.sharing import ClippedGossip, CoordinateMedian, TrimmedMean, full
from jwins.sharing.attacks import attacked, deviation
from jwins.sharing.update import Received, Update

OWN = torch.tensor([1.0, -2.0, 0.5])
HONEST = [OWN + 0.1, OWN - 0.2, OWN + 0.05]
WEIGHTS = [0.2, 0.2, 0.2]


def mixed(own: Tensor, others: list[Tensor], weights: list[float]) -> Tensor:
    return own + torch.stack([w * (other - own) for w, other in zip(weights, others, strict=True)]).sum(dim=0)


def test_clipped_gossip_with_a_wide_radius_is_full_sharing() -> None:
    found = ClippedGossip(radius=1e6)(OWN, HONEST, WEIGHTS)
    torch.testing.assert_close(found, mixed(OWN, HONEST, WEIGHTS))


def test_clipped_gossip_moves_by_no_more_than_the_radius() -> None:
    attacker = torch.full((3,), 1e30)
    found = ClippedGossip(radius=0.3)(OWN, [*HONEST, attacker], [*WEIGHTS, 0.2])
    assert torch.isfinite(found).all()
    assert float((found - OWN).norm()) <= 0.3 * 0.8 + 1e-6
    pulled = found - ClippedGossip(radius=0.3)(OWN, HONEST, WEIGHTS)
    torch.testing.assert_close(pulled, torch.full((3,), 0.2 * 0.3 / 3**0.5))


def test_the_radius_is_that_of_the_nearest_neighbours() -> None:
    """With one attacker among four, the third distance; what is farther is clipped to it."""
    far = OWN + 100.0
    found = ClippedGossip(attackers=1)(OWN, [*HONEST, far], [*WEIGHTS, 0.2])
    third = sorted(float((other - OWN).norm()) for other in HONEST)[2]
    expected = ClippedGossip(radius=third)(OWN, [*HONEST, far], [*WEIGHTS, 0.2])
    assert torch.equal(found, expected)
    assert torch.equal(ClippedGossip(attackers=4)(OWN, HONEST, WEIGHTS), OWN)
    assert torch.equal(ClippedGossip()(OWN, [OWN, OWN], [0.3, 0.3]), OWN)


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("attackers", [1, 2])
def test_the_trimmed_mean_and_the_median_are_numpys(count: int, attackers: int) -> None:
    generator = torch.Generator().manual_seed(count)
    models = torch.randn(count + 1, 7, generator=generator)
    own, others = models[0], list(models[1:])
    weights = [1.0 / (count + 1)] * count
    cut = min(attackers, count // 2)
    trimmed = np.sort(models.numpy(), axis=0)[cut : count + 1 - cut].mean(axis=0)
    np.testing.assert_allclose(TrimmedMean(attackers)(own, others, weights), trimmed, rtol=1e-6, atol=1e-7)
    median = np.median(models.numpy(), axis=0)
    np.testing.assert_allclose(CoordinateMedian()(own, others, weights), median, rtol=1e-6, atol=1e-7)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([-1e30, 0.0, 1e30]) | st.integers(-50, 50).map(lambda n: n / 50), min_size=1, max_size=4
    )
)
def test_one_attacker_of_five_stays_within_the_honest_values(values: list[float]) -> None:
    """Whatever it sends, each parameter lies between the lowest and the highest of the honest ones."""
    own = torch.linspace(-1.0, 1.0, len(values))
    honest = [own + 0.1, own - 0.2, own + 0.05]
    low = torch.stack([own, *honest]).min(dim=0).values
    high = torch.stack([own, *honest]).max(dim=0).values
    for merge in (TrimmedMean(1), CoordinateMedian()):
        found = merge(own, [*honest, torch.tensor(values)], [0.2] * 4)
        assert (found >= low - 1e-6).all()
        assert (found <= high + 1e-6).all()


def test_full_sharing_merges_by_the_rule_and_ignores_late_frames() -> None:
    ctx = RoundContext(seed=1, node=0, round=3, weights={1: 0.2, 2: 0.2, 3: 0.2})
    algorithm = full(robust=CoordinateMedian())
    _, state = algorithm.share(algorithm.init(OWN), OWN, ctx)
    updates = [Update(3, None, model) for model in (OWN + 1.0, OWN + 2.0, OWN - 50.0)]
    received = [Received(node, 3, 0.2, update) for node, update in enumerate(updates, start=1)]
    late = Received(4, 2, 0.0, Update(3, None, torch.full((3,), 1e9)))
    merged, _ = algorithm.merge(state, OWN, [*received, late], ctx)
    torch.testing.assert_close(merged, OWN + 0.5)
    alone, _ = algorithm.merge(state, OWN, [], ctx)
    assert torch.equal(alone, OWN)


@pytest.mark.parametrize(
    ("table", "built"),
    [
        ({"kind": "clipped_gossip", "radius": 0.5, "attackers": 2}, ClippedGossip(0.5, 2)),
        ({"kind": "trimmed_mean", "attackers": 3}, TrimmedMean(3)),
        ({"kind": "median"}, CoordinateMedian()),
    ],
)
def test_a_merge_is_built_from_its_table(table: Any, built: Any) -> None:
    experiment = Experiment(sharing={"kind": "full", "robust": table})  # type: ignore[arg-type]
    assert build_sharing(experiment) == full(robust=built)
    assert repr(built) in repr(build_sharing(experiment))
    assert Experiment(**experiment.resolved()).digest() == experiment.digest()
    assert "robust" not in Experiment(sharing={"kind": "full"}).to_toml()  # type: ignore[arg-type]


def test_arguments_are_checked() -> None:
    for make, path in (
        (lambda: ClippedGossip(radius=0.0), "sharing.robust.radius"),
        (lambda: ClippedGossip(attackers=0), "sharing.robust.attackers"),
        (lambda: TrimmedMean(1.5), "sharing.robust.attackers"),  # type: ignore[arg-type]
        (lambda: full(robust=3), "sharing.robust"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=path):
            make()


# --- Attacks -------------------------------------------------------------------------------------------------

CTX = RoundContext(seed=1, node=2, round=5)


def test_the_opposite_of_the_own_training() -> None:
    start, trained = torch.tensor([1.0, 1.0]), torch.tensor([1.5, 0.0])
    assert attacked(Attack("sign_flip"), start, trained, None, CTX).tolist() == [0.5, 2.0]
    assert attacked(Attack("sign_flip", scale=2.0), start, trained, None, CTX).tolist() == [0.0, 3.0]


def test_noise_is_that_of_the_node_and_the_round() -> None:
    zero = torch.zeros(20_000)
    noise = attacked(Attack("gaussian", scale=3.0), zero, zero, None, CTX)
    assert float(noise.std()) == pytest.approx(3.0, rel=0.05)
    assert torch.equal(noise, attacked(Attack("gaussian", scale=3.0), zero, zero, None, CTX))
    for other in (RoundContext(1, 3, 5), RoundContext(1, 2, 6), RoundContext(2, 2, 5)):
        assert not torch.equal(noise, attacked(Attack("gaussian", scale=3.0), zero, zero, None, other))


def test_a_little_is_within_the_spread_of_what_was_received() -> None:
    models = [torch.tensor([0.0, 2.0]), torch.tensor([2.0, 2.0])]
    spread = deviation(models)
    assert spread is not None
    assert spread.tolist() == [1.0, 0.0]
    trained = torch.tensor([5.0, 5.0])
    assert attacked(Attack("little", scale=1.5), trained, trained, spread, CTX).tolist() == [3.5, 5.0]
    assert attacked(Attack("little"), trained, trained, None, CTX) is trained
    assert deviation(models[:1]) is None


def test_false_labels_are_in_the_data_and_not_in_the_model() -> None:
    trained = torch.tensor([5.0, 5.0])
    assert attacked(Attack("label_flip"), trained, trained, trained, CTX) is trained
