"""Algorithms end in the same bits by the compiled loops as by the libraries that short vectors take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jwins.errors import UsageError
from jwins.ops import arrays, mixing
from jwins.rng import RoundContext
from jwins.sharing import Sharing, closed_loop, full, jwins, random_k, top_k
from jwins.sharing.update import Received

ALGORITHMS: dict[str, Sharing[Any]] = {
    "full": full(),
    "random-k": random_k(0.3),
    "top-k": top_k(0.2),
    "JWINS": jwins(),
    "closed loop": closed_loop(),
    "closed loop, fixed step": closed_loop(step=0.01, residual_rate=0.3, gamma=0.7),
    "closed loop, budget": closed_loop(budget=0.5),
    "closed loop, forgets nothing": closed_loop(residual_rate=1.0),
}


def models(algorithm: Sharing[Any], dim: int, rounds: int = 6) -> list[torch.Tensor]:
    """Of three nodes that drift at random and mix."""
    generator = torch.Generator().manual_seed(dim)
    x = [torch.zeros(dim) for _ in range(3)]
    states = [algorithm.init(row) for row in x]
    sent = [0] * 3
    for number in range(rounds):
        contexts = [RoundContext(1, i, number, {j: 0.3 for j in range(3) if j != i}, sent[i]) for i in range(3)]
        y = [row + torch.randn(dim, generator=generator) * 0.1**i for i, row in enumerate(x)]
        updates = []
        for i in range(3):
            update, states[i] = algorithm.share(states[i], y[i], contexts[i])
            updates.append(update)
            sent[i] = 50 + update.count // 8
        for i in range(3):
            received = [Received(j, number, 0.3, updates[j]) for j in range(3) if j != i]
            x[i], states[i] = algorithm.merge(states[i], y[i], received, contexts[i])
    return x


@pytest.mark.parametrize("dim", [1, 37, 1000, 70_001])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_both_paths_end_in_the_same_models(name: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "KERNELS_FROM", 1)
    compiled = models(ALGORITHMS[name], dim)
    for name_of_limit in ("KERNELS_FROM", "LOADED_KERNELS_FROM"):
        monkeypatch.setattr(
            arrays, name_of_limit, dim + 1000
        )  # a vector has some more coefficients than numbers
    for got, expected in zip(compiled, models(ALGORITHMS[name], dim), strict=True):
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def test_kernels_handle_short_vectors_when_others_have_handled_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "LOAD_AFTER", 3000)
    monkeypatch.setattr(arrays, "_handled", 0)
    assert [arrays.kernels_pay(torch.zeros(1500)) for _ in range(3)] == [False, False, True]
    assert not arrays.kernels_pay(torch.zeros(1000))
    assert not arrays.kernels_pay(torch.zeros(1 << 20, device="meta"))


@pytest.mark.parametrize("kernels_from", [1, 6])
@pytest.mark.parametrize("positions", [[0, 5], [-1, 2], [2, 1], [1, 1]])
def test_positions_that_do_not_fit_are_refused(
    positions: list[int], kernels_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "KERNELS_FROM", kernels_from)
    term = mixing.Term(torch.ones(2), torch.tensor(positions), 0.5)
    with pytest.raises(UsageError, match="positions"):
        mixing.mixed(torch.zeros(5), [term])


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="4 values for a vector of 5"):
        mixing.mixed(torch.zeros(5), [mixing.Term(torch.ones(4), None, 0.5)])


@pytest.mark.parametrize("kernels_from", [1, 6])
def test_fewer_values_than_positions_are_refused(kernels_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "KERNELS_FROM", kernels_from)
    term = mixing.Term(torch.ones(2), torch.tensor([0, 1, 2]), 0.5)
    with pytest.raises(UsageError, match="2 values for 3 positions"):
        mixing.mixed(torch.zeros(5), [term])
