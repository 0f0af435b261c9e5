"""Whole numbers of a unit: sums are exact in any order, and what is not on the grid is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jwins.ops.replicas import quantize_with_dead_zone
from jwins.sharing.step_grid import FINEST, LIMIT, StepGrid
from jwins.sharing.update import Quantized, Update

GRIDS = st.sampled_from([FINEST, 0.25, float(torch.tensor(0.01)), 1.0])
INCREMENTS = st.lists(
    st.tuples(st.integers(0, 12), st.lists(st.integers(-1000, 1000), min_size=3, max_size=3)), max_size=8
)


def update_of(grid: StepGrid, exponent: int, symbols: list[int]) -> Update:
    return Update(3, None, grid.of_symbols(torch.tensor(symbols, dtype=torch.int32), 1 << exponent, (1, 2)))


@given(GRIDS, INCREMENTS, st.randoms())
def test_increments_add_up_in_any_order(
    unit: float, steps: list[tuple[int, list[int]]], random: object
) -> None:
    grid, expected = StepGrid(unit), [0, 0, 0]
    for exponent, symbols in steps:
        expected = [n + (symbol << exponent) for n, symbol in zip(expected, symbols, strict=True)]
    shuffled = list(steps)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for order in (steps, shuffled):
        units = torch.zeros(3, dtype=torch.int32)
        for exponent, symbols in order:
            after = grid.advanced(units, update_of(grid, exponent, symbols))
            assert after is not None
            units = after
        assert units.tolist() == expected


@given(GRIDS, st.lists(st.integers(-LIMIT, LIMIT), min_size=3, max_size=3))
def test_a_key_leads_to_the_replica_exactly(unit: float, units: list[int]) -> None:
    grid, wanted = StepGrid(unit), torch.tensor(units, dtype=torch.int32)
    update = Update(3, None, grid.quantized(wanted, (1, 2)))
    after = grid.advanced(torch.zeros(3, dtype=torch.int32), update)
    assert after is not None
    assert torch.equal(after, wanted)


@given(st.integers(0, 20), st.integers(1, 5))
def test_a_key_has_the_coarsest_step(exponent: int, odd: int) -> None:
    change = torch.tensor([0, -(2 * odd + 1) << exponent, 2 << exponent], dtype=torch.int32)
    quantized = StepGrid(1.0).quantized(change, (3,))
    assert quantized.scales.tolist() == [float(1 << exponent)]
    assert quantized.symbols.tolist() == [0, -(2 * odd + 1), 2]


def symbols(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(3),
        Quantized(symbols(0, 1, 0), torch.tensor([0.75]), (3,)),
        Quantized(symbols(0, 1, 0), torch.tensor([0.125]), (3,)),
        Quantized(symbols(0, 1, 0), torch.tensor([0.25]), (3,), dither=1),
        Quantized(symbols(0, 1, 0), torch.tensor([0.25]), (3,), offset=0.1),
        Quantized(symbols(0, LIMIT + 1, 0), torch.tensor([0.25]), (3,)),
        Quantized(symbols(0, -(2**31), 0), torch.tensor([0.25]), (3,)),
        Quantized(symbols(0, -(2**31), 0), torch.tensor([1.0]), (3,)),  # four times that is 0 in 32 bits
        Quantized(symbols(0, 2, 0), torch.tensor([2.0**28]), (3,)),
        Quantized(symbols(0, 1, 0), torch.tensor([1e38]), (3,)),
    ],
    ids=repr,
)
def test_what_a_peer_sends_off_the_grid_is_refused(values: torch.Tensor | Quantized) -> None:
    assert StepGrid(0.25).advanced(torch.zeros(3, dtype=torch.int32), Update(3, None, values)) is None


def test_sums_beyond_the_limit_are_refused() -> None:
    grid, near = StepGrid(1.0), symbols(LIMIT, 0, -LIMIT)
    assert grid.advanced(near, update_of(grid, 0, [1, 0, 0])) is None
    assert grid.advanced(near, update_of(grid, 0, [0, 0, -1])) is None
    assert grid.advanced(near, update_of(grid, 0, [-1, 0, 1])) is not None


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    st.floats(0.01, 10),
    st.floats(0.5, 2),
)
def test_the_quantizer_errs_by_half_a_step_or_its_dead_zone(
    values: list[float], step: float, zero: float
) -> None:
    exact = torch.tensor(values)
    found = quantize_with_dead_zone(exact, step, zero * step)
    error = (found * step - exact).abs()
    inside = exact.abs() < zero * step
    assert bool((found[inside & (exact.abs() < 0.999 * zero * step)] == 0).all())
    assert bool((error[~inside] <= 0.5001 * step + 1e-4).logical_or(found[~inside].abs() == 1).all())
    assert bool((found.sign() * exact.sign() >= 0).all())


def test_replicas_do_not_overflow_however_far_a_model_goes() -> None:
    from jwins.rng import RoundContext
    from jwins.sharing import closed_loop

    algorithm = closed_loop(step_ratio=0.001)
    state = algorithm.init(torch.zeros(40))
    for r in range(6):
        ctx = RoundContext(seed=1, node=0, round=r)
        params = torch.linspace(-1e4, 1e4, 40) * (r + 1)
        update, state = algorithm.share(state, params, ctx)
        assert int(state.x_hat.abs().max()) <= LIMIT
        assert isinstance(update.values, Quantized)
