"""Quasi-global momentum against the paper's equations, and what must hold of it in any trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import Toy, digest, everyone, make, normed, parts_of
from torch import nn

from jwins.errors import ConfigError
from jwins.tasks.base import Dataset, Task
from jwins.training.optimizer import Optimizer
from jwins.training.quasi_global import QuasiGlobal
from jwins.training.trainer import Trainer

BATCHINGS = pytest.mark.parametrize("batching", ["loop", "stacked"])
NODES = 5


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, inputs):
        return inputs - self.place


class Pulls(Task):
    """Node i has the one sample a_i and the loss |x - a_i|^2 / 2, whose gradient is x - a_i."""

    name = "pulls"

    def __init__(self):
        inputs = torch.randn(NODES, 3, generator=torch.Generator().manual_seed(3))
        self.train = self.test = Dataset(inputs, torch.zeros(NODES, dtype=torch.int64))

    def model(self):
        return Point()

    def loss(self, model, batch, generator):
        return model(batch.inputs).square().sum(dim=1).mean() / 2


def ring():
    weights = np.eye(NODES) / 2
    for i in range(NODES):
        weights[i, (i + 1) % NODES] += 0.25
        weights[i, (i - 1) % NODES] += 0.25
    return weights


def by_the_paper(targets, x, rounds, *, lr, beta, mu, nesterov, decay, local_steps):
    """Algorithm QG-DSGDm(-N), all nodes at once, in float64; with local steps between two merges."""
    weights, buffer = ring(), np.zeros_like(targets)
    for _ in range(rounds):
        half, momentum = x.copy(), buffer.copy()
        for _ in range(local_steps):
            gradient = half - targets + decay * half
            momentum = beta * momentum + gradient
            half = half - lr * (gradient + beta * momentum if nesterov else momentum)
        merged = weights @ half
        buffer = mu * buffer + (1 - mu) * (x - merged) / (lr * local_steps)
        x = merged
    return x


def pulled(optimizer, batching, local_steps=1):
    return Trainer(
        Pulls(), [np.array([i]) for i in range(NODES)], seed=1, local_steps=local_steps, batch_size=1,
        optimizer=optimizer, batching=batching, device="cpu",
    )  # fmt: skip


@BATCHINGS
@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize(("nesterov", "decay"), [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)])
def test_rounds_follow_the_equations_of_the_paper(batching, local_steps, nesterov, decay):
    options = {"lr": 0.1, "momentum": 0.8, "nesterov": nesterov, "weight_decay": decay}
    trainer = pulled(Optimizer("sgd", options, quasi_global=0.7), batching, local_steps)
    assert trainer.batching == batching, trainer.reason
    targets = Pulls().train.inputs.double().numpy()
    start = trainer.params.double().numpy().copy()
    weights = torch.from_numpy(ring()).float()
    for r in range(6):
        trainer.train(everyone(trainer, r))
        trainer.params.copy_(weights @ trainer.params)
        expected = by_the_paper(
            targets, start, r + 1,
            lr=0.1, beta=0.8, mu=0.7, nesterov=nesterov, decay=decay, local_steps=local_steps,
        )  # fmt: skip
        torch.testing.assert_close(trainer.params.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    beta=st.floats(0.1, 0.95),
    mu=st.floats(0, 0.95),
    lr=st.floats(1e-3, 1),
    local_steps=st.integers(1, 5),
)
def test_the_momentum_of_a_constant_gradient_nears_that_of_the_heavy_ball(beta, mu, lr, local_steps):
    """The distance to g / (1 - beta) shrinks by the same factor in every round, however many steps it has."""
    state = QuasiGlobal(mu, lr, 1, 2, torch.device("cpu"))
    gradient = torch.tensor([[1.0, -2.0]])
    goal, params, distance = gradient / (1 - beta), torch.zeros(1, 2), 1.0
    shrinks = mu + (1 - mu) * sum(beta**k for k in range(1, local_steps + 1)) / local_steps
    for r in range(8):
        momentum = state.begin_(slice(0, 1), params, [r], local_steps)
        torch.testing.assert_close(momentum, goal * (1 - distance), atol=1e-2, rtol=1e-3)
        for _ in range(local_steps):
            momentum = beta * momentum + gradient
            params = params - lr * momentum
        distance *= shrinks


def test_a_missed_round_leaves_the_momentum_as_it_is():
    """A node that comes back far from where it was must not take the way for a gradient."""
    state = QuasiGlobal(0.5, 0.1, 2, 3, torch.device("cpu"))
    both, rows = slice(0, 2), torch.zeros(2, 3)
    assert not state.begin_(both, rows, [4, 0], 2).any(), "the first round, whichever it is, has no momentum"
    second = state.begin_(both, rows - 1, [5, 1], 2)
    torch.testing.assert_close(second, torch.full((2, 3), 0.5 / (0.1 * 2)))
    third = state.begin_(both, rows + 100, [7, 2], 2)
    assert torch.equal(third[0], second[0])
    assert third[1, 0] < -200
    fourth = state.begin_(both, rows + 99, [8, 3], 2)
    torch.testing.assert_close(fourth[0], second[0] * 0.5 + 0.5 / (0.1 * 2))


def test_a_round_that_is_begun_again_begins_with_the_same_momentum():
    state = QuasiGlobal(0.5, 0.1, 1, 3, torch.device("cpu"))
    own = slice(0, 1)
    state.begin_(own, torch.ones(1, 3), [0], 1)
    first = state.begin_(own, torch.zeros(1, 3), [1], 1)
    first.mul_(7)
    again = state.begin_(own, torch.zeros(1, 3), [1], 1)
    torch.testing.assert_close(again, torch.full((1, 3), 5.0))


QUASI_GLOBAL = Optimizer("sgd", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}, quasi_global=0.8)


def merged(trainer):
    trainer.params.copy_(0.5 * trainer.params + 0.5 * trainer.params.mean(dim=0))


@pytest.mark.parametrize("buffers", ["local", "shared"])
def test_stacked_agrees_with_loop(buffers):
    loop, stacked = (
        make(normed, 7, QUASI_GLOBAL, batching=batching, buffers=buffers) for batching in ("loop", "stacked")
    )
    assert stacked.batching == "stacked", stacked.reason
    for r in range(3):
        for trainer in (loop, stacked):
            trainer.train(everyone(trainer, r))
            merged(trainer)
        torch.testing.assert_close(loop.params, stacked.params, atol=1e-5 * 10**r, rtol=0)


@BATCHINGS
def test_the_threads_do_not_change_a_bit(batching, monkeypatch):
    monkeypatch.setattr("jwins.training.trainer.THREADS_MIN_PARAMETERS", 0)
    digests = set()
    for threads in (1, 3):
        trainer = make(normed, 11, QUASI_GLOBAL, batching=batching, threads=threads, chunk=4)
        for r in range(3):
            trainer.train(everyone(trainer, r))
            merged(trainer)
        trainer.close()
        digests.add(digest(trainer))
    assert len(digests) == 1


@BATCHINGS
def test_a_node_does_not_depend_on_who_trains_beside_it(batching):
    together, apart = (make(normed, 7, QUASI_GLOBAL, batching=batching, chunk=5) for _ in range(2))
    for r in range(3):
        together.train(everyone(together, r))
    for rounds in (
        {0: 0, 5: 0, 3: 0},
        {3: 1, 0: 1, 1: 0, 2: 0},
        {3: 2, 1: 1, 4: 0, 5: 1},
        {0: 2, 1: 2, 2: 1, 6: 0},
        {2: 2, 4: 1, 5: 2, 6: 1},
        {4: 2, 6: 2},
    ):
        apart.train(rounds)
    assert digest(together) == digest(apart)


@BATCHINGS
def test_going_on_from_a_state_is_bit_identical(batching):
    whole, first, second = (make(normed, 5, QUASI_GLOBAL, batching=batching) for _ in range(3))
    for r in range(4):
        whole.train(everyone(whole, r))
    for r in range(2):
        first.train(everyone(first, r))
    second.params.copy_(first.params)
    for node in first.nodes:
        second.load_state_(node, first.state(node))
    for r in (2, 3):
        second.train(everyone(second, r))
    assert digest(second) == digest(whole)


def test_a_fresh_start_forgets_the_momentum():
    trainer, other = (make(normed, 3, QUASI_GLOBAL) for _ in range(2))
    fresh = trainer.state(1)
    for r in range(2):
        trainer.train(everyone(trainer, r))
    trainer.load_state_(1, fresh)
    for group in ("moments", "counters", "buffers"):
        own, expected = (getattr(each.state(1), group) for each in (trainer, other))
        assert own.keys() == expected.keys()
        assert all(torch.equal(own[name], expected[name]) for name in own)
    trainer.params[1] = other.params[1] = 3.0  # where it goes on from is nobody's step
    trainer.train({1: 2})
    other.train({1: 2})
    assert torch.equal(trainer.params[1], other.params[1])


@BATCHINGS
def test_the_first_round_is_that_of_plain_momentum_and_the_second_is_not(batching):
    options = {"lr": 0.05, "momentum": 0.9}
    quasi, own = (
        make(num_nodes=4, optimizer=Optimizer("sgd", options, quasi_global=factor), batching=batching)
        for factor in (0.9, None)
    )
    for trainer in (quasi, own):
        trainer.train(everyone(trainer, 0))
    torch.testing.assert_close(quasi.params, own.params, atol=1e-7, rtol=0)
    for trainer in (quasi, own):
        trainer.train(everyone(trainer, 1))
    assert (quasi.params - own.params).abs().max() > 1e-4


def test_nodes_that_do_not_use_it_keep_nothing_for_it():
    trainer = make(optimizer=Optimizer("sgd", {"lr": 0.1, "momentum": 0.9}))
    assert list(trainer.state(0).moments) == ["momentum_buffer"]
    assert list(make(optimizer=QUASI_GLOBAL).state(0).moments) == ["quasi_global", "round_start"]


def test_a_heavy_ball_of_merged_models_ends_nearer_to_the_common_optimum():
    """If each node has another optimum, momentum of own steps drives the nodes apart, and this one less."""
    optimum = Pulls().train.inputs.mean(dim=0)
    weights = torch.from_numpy(ring()).float()
    off = {}
    for factor in (None, 0.9):
        trainer = pulled(Optimizer("sgd", {"lr": 0.05, "momentum": 0.9}, quasi_global=factor), "loop")
        for r in range(200):
            trainer.train(everyone(trainer, r))
            trainer.params.copy_(weights @ trainer.params)
        off[factor] = float((trainer.params - optimum).norm(dim=1).mean())
    assert off[0.9] < 0.5 * off[None], off


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("adam", {"lr": 0.01}),
            "train.optimizer.quasi_global = 0.9: adam has no quasi-global momentum: use kind = ",
        ),
        (("sgd", {"lr": 0.1}), r"train.optimizer.momentum = 0: quasi_global needs momentum above 0"),
        (("sgd", {"lr": 0.1, "momentum": 0.0}), "train.optimizer.momentum = 0.0: .* such as 0.9"),
        (
            ("sgd", {"lr": 0.1, "momentum": 0.9}, "reset"),
            "train.optimizer_state = 'reset': .* use \"keep\"",
        ),
        (("sgd", {"lr": 0, "momentum": 0.9}), "train.optimizer.lr = 0: expected above 0"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Optimizer(*arguments, quasi_global=0.9)


@pytest.mark.parametrize("factor", [1.0, -0.1, float("nan"), "much", True])
def test_its_factor_is_checked(factor):
    with pytest.raises(ConfigError, match=r"train.optimizer.quasi_global = .*: expected a f"):
        Optimizer("sgd", {"lr": 0.1, "momentum": 0.9}, quasi_global=factor)


def test_torch_s_default_learning_rate_is_the_one_that_is_divided_by():
    trainer = Trainer(
        Toy(), parts_of(3), seed=7, local_steps=1, batch_size=4, batching="loop", device="cpu",
        optimizer=Optimizer("sgd", {"momentum": 0.9}, quasi_global=0.0),
    )  # fmt: skip
    start = trainer.initial()
    trainer.train({0: 0})
    moved = (start - trainer.params[0]) / 1e-3
    trainer.train({0: 1})
    torch.testing.assert_close(trainer.state(0).moments["quasi_global"], moved)
