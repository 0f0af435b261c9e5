"""Schedules, clipping, groups of weight decay and precision: in a loop and stacked, as in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluation import evaluate
from jwins.errors import ConfigError
from jwins.tasks.base import Dataset, Task
from jwins.training.batches import batch_indices
from jwins.training.learning_rate import LearningRateSchedule
from jwins.training.optimizer import Optimizer
from jwins.training.trainer import Trainer

STEPS = 3
NODES = 4


class Points(Task):
    """Three classes of points, and a model with matrices, biases and a norm."""

    name = "points"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        targets = torch.randint(3, (60,), generator=generator)
        inputs = torch.randn(60, 6, generator=generator) + targets[:, None]
        self.train, self.test = Dataset(inputs, targets), Dataset(inputs[:20] + 0.1, targets[:20])

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def parts() -> list[Any]:
    return list(np.arange(60).reshape(NODES, -1))


def trainer(optimizer: Optimizer, batching: str, **options: Any) -> Trainer:
    options = {
        "seed": 7,
        "local_steps": STEPS,
        "batch_size": 4,
        "device": "cpu",
        "batching": batching,
    } | options
    found = Trainer(Points(), parts(), optimizer=optimizer, **options)
    assert found.batching == batching, found.reason
    return found


def by_hand(
    own: Trainer,
    node: int,
    rounds: int,
    groups: Callable[[nn.Module], torch.optim.Optimizer],
    factor: Callable[[int], float] = lambda step: 1.0,
    max_norm: float | None = None,
) -> Tensor:
    """The steps of one node in plain PyTorch, with its scheduler and its clipping."""
    task, model = Points(), Points().model()
    own.layout.write(own.initial(), model)
    optimizer = groups(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for r in range(rounds):
        for index in batch_indices(parts()[node], seed=7, node=node, round=r, local_steps=STEPS, batch_size=4):
            optimizer.zero_grad()
            functional.cross_entropy(model(task.train.inputs[index]), task.train.targets[index]).backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            scheduler.step()
    return own.layout.flatten(model)


def everyone(round: int) -> dict[int, int]:
    return dict.fromkeys(range(NODES), round)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_a_schedule_runs_over_the_steps_of_all_rounds(batching: str, kind: str) -> None:
    schedule = LearningRateSchedule("cosine", total_steps=12, warmup_steps=4, final_fraction=0.2)
    own = trainer(Optimizer(kind, {"lr": 0.05}, schedule=schedule), batching)
    for r in range(4):
        own.train(everyone(r))

    def factor(step: int) -> float:
        if step < 4:
            return (step + 1) / 4
        return 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
        return kinds[kind](model.parameters(), lr=0.05)

    for node in (0, 3):
        expected = by_hand(own, node, 4, plain, factor)
        torch.testing.assert_close(own.params[node], expected, atol=3e-5, rtol=0)
        assert (own.params[node] - by_hand(own, node, 4, plain)).abs().max() > 1e-3  # it does change something


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LearningRateSchedule("constant", 10, warmup_steps=2), [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (LearningRateSchedule("linear", 5), [1, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
        (LearningRateSchedule("linear", 6, warmup_steps=2, final_fraction=0.5), [0.5, 1, 1, 0.875, 0.75]),
        (LearningRateSchedule("cosine", 4), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
    ],
)
def test_factors_of_each_shape(schedule: LearningRateSchedule, expected: list[float]) -> None:
    assert [schedule.factor(step) for step in range(len(expected))] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_nodes_of_a_stack_in_different_rounds_have_different_learning_rates(kind: str) -> None:
    """As after a crash; each takes its own steps whoever trains beside it."""
    schedule = LearningRateSchedule("linear", total_steps=12)
    mixed, alone = (trainer(Optimizer(kind, {"lr": 0.05}, schedule=schedule), "stacked") for _ in range(2))
    mixed.train({0: 0, 1: 2, 2: 0, 3: 3})
    for node, r in {0: 0, 1: 2, 2: 0, 3: 3}.items():
        alone.train({node: r})
    assert torch.equal(mixed.params, alone.params)
    loop = trainer(Optimizer(kind, {"lr": 0.05}, schedule=schedule), "loop")
    loop.train({0: 0, 1: 2, 2: 0, 3: 3})
    torch.testing.assert_close(mixed.params, loop.params, atol=3e-5, rtol=0)


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_gradients_are_clipped_over_all_parameters_of_a_node_together(batching: str) -> None:
    own = trainer(Optimizer("sgd", {"lr": 0.1, "momentum": 0.9}, clip_norm=0.3), batching)
    for r in range(3):
        own.train(everyone(r))

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    for node in (0, 3):
        expected = by_hand(own, node, 3, plain, max_norm=0.3)
        torch.testing.assert_close(own.params[node], expected, atol=1e-5, rtol=0)
        assert (own.params[node] - by_hand(own, node, 3, plain)).abs().max() > 1e-2


@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_only_matrices_decay_where_that_is_asked_for(batching: str, state: Any) -> None:
    options = {"lr": 0.02, "weight_decay": 0.5}
    own = trainer(Optimizer("adamw", options, state, weight_decay_on="matrices"), batching)
    own.train(everyone(0))

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        named = dict(model.named_parameters())
        assert {name for name, p in named.items() if p.dim() >= 2} == {"0.weight", "3.weight"}
        groups = [
            {"params": [named["0.weight"], named["3.weight"]], "weight_decay": 0.5},
            {"params": [p for name, p in named.items() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.02)

    expected = by_hand(own, 1, 1, plain)
    torch.testing.assert_close(own.params[1], expected, atol=3e-5, rtol=0)
    everything = trainer(Optimizer("adamw", options, state), batching)
    everything.train(everyone(0))
    assert (own.params - everything.params).abs().max() > 1e-3


def test_bfloat16_trains_float32_parameters_and_repeats_to_the_bit() -> None:
    first, again, exact = (
        trainer(Optimizer("adamw", {"lr": 0.02}), "loop", precision=precision)
        for precision in ("bfloat16", "bfloat16", "float32")
    )
    losses = []
    for r in range(8):
        losses.append(first.train(everyone(r))[0])
        again.train(everyone(r))
        exact.train(everyone(r))
    assert first.params.dtype == torch.float32
    assert torch.equal(first.params, again.params)
    difference = (first.params - exact.params).abs().max()
    assert 0 < difference < 0.1
    assert losses[-1] < 0.7 * losses[0]


def test_stacked_agrees_with_loop_in_bfloat16_up_to_its_rounding() -> None:
    stacked, loop = (
        trainer(Optimizer("sgd", {"lr": 0.1}), batching, precision="bfloat16")
        for batching in ("stacked", "loop")
    )
    start = loop.params.clone()
    for own in (stacked, loop):
        own.train(everyone(0))
    moved = (loop.params - start).abs().max()
    assert (stacked.params - loop.params).abs().max() < 0.05 * moved


def test_a_model_runs_in_bfloat16_and_its_loss_in_float32() -> None:
    seen: list[torch.dtype] = []

    class Watched(Points):
        def model(self) -> nn.Module:
            model = super().model()
            model[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
            return model

        def loss(self, model: Any, batch: Any, generator: Any) -> Tensor:
            outputs = model(batch.inputs)
            assert outputs.dtype == torch.float32
            return functional.cross_entropy(outputs, batch.targets)

    options: dict[str, Any] = {
        "seed": 7,
        "local_steps": 1,
        "batch_size": 4,
        "device": "cpu",
        "batching": "loop",
    }
    own = Trainer(Watched(), parts(), optimizer=Optimizer(), precision="bfloat16", **options)
    seen.clear()
    own.train({0: 0})
    assert seen == [torch.bfloat16]
    evaluate(own, own.params[:1], [0])
    assert seen[-1] == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LearningRateSchedule("cosine", total_steps=6, warmup_steps=6),
            r"train.schedule.warmup_steps = 6: the run has 6 local steps .*; expected fewer",
        ),
        (
            lambda: LearningRateSchedule("cosine", 6, final_fraction=1.5),
            r"train.schedule.final_fraction = 1.5: expected a fraction in \[0, 1\]; did you mean 0.15",
        ),
        (
            lambda: LearningRateSchedule("exponential", 6),  # type: ignore[arg-type]
            r"train.schedule.kind = 'exponential': expected one of constant, linear, cosine",
        ),
        (lambda: Optimizer(clip_norm=0.0), r"train.clip_norm = 0.0: expected a norm above 0"),
        (
            lambda: Optimizer("sgd", {"lr": 0.1}, weight_decay_on="matrices"),
            r"train.optimizer.weight_decay_on = 'matrices': nothing decays.*set weight_decay",
        ),
        (
            lambda: Optimizer("adam", weight_decay_on="norms"),  # type: ignore[arg-type]
            r"train.optimizer.weight_decay_on = 'norms': expected all or matrices",
        ),
        (
            lambda: Optimizer(
                "sgd",
                {"lr": 0.1, "momentum": 0.9},
                quasi_global=0.9,
                schedule=LearningRateSchedule("linear", 6),
            ),
            r"train.schedule.kind = 'linear': quasi_global needs one learning rate .*remove one",
        ),
        (
            lambda: trainer(Optimizer(), "loop", precision="float16"),
            r"train.precision = 'float16': expected float32 or bfloat16",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
