"""The outer optimizer: DiLoCo on a complete graph, beside every algorithm, through faults and restarts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from worlds import Lines, end, simulator, trainer

from jwins.engines.simulator import Faults
from jwins.errors import ConfigError
from jwins.sharing import (
    Nesterov,
    Sharing,
    beer,
    choco,
    closed_loop,
    demo,
    full,
    jwins,
    moniqua,
    noloco,
    random_k,
    sparse_loco,
    stateless,
    top_k,
)
from jwins.topology import FullyConnected, Regular
from jwins.topology.participation import Participation
from jwins.training.batches import batch_indices
from jwins.training.layout import Layout
from jwins.training.optimizer import Optimizer

NODES, ROUNDS, STEPS = 4, 6, 2
ADAMW = Optimizer("adamw", {"lr": 0.02})


def diloco(lr: float, momentum: float) -> Tensor:
    """DiLoCo as its paper has it: a server's model, workers with an AdamW each, an outer SGD with Nesterov."""
    task, model = Lines(), Lines().model()
    layout = Layout.of(model, "local")
    server = trainer(NODES).initial().requires_grad_()
    outer = torch.optim.SGD([server], lr=lr, momentum=momentum, nesterov=momentum > 0)
    workers = [Lines().model() for _ in range(NODES)]
    inner = [torch.optim.AdamW(worker.parameters(), lr=0.02) for worker in workers]
    for r in range(ROUNDS):
        change = torch.zeros(layout.size)
        for node, worker in enumerate(workers):
            layout.write(server.detach(), worker)
            part = np.arange(node, len(task.train), NODES)
            for index in batch_indices(part, seed=1, node=node, round=r, local_steps=STEPS, batch_size=4):
                inner[node].zero_grad()
                loss = functional.cross_entropy(worker(task.train.inputs[index]), task.train.targets[index])
                loss.backward()
                inner[node].step()
            change += (server.detach() - layout.flatten(worker)) / NODES
        server.grad = change
        outer.step()
    return server.detach()


def models(run: Any) -> Tensor:
    return torch.stack([run.groups[0].parameters(node) for node in range(NODES)])


def test_on_a_complete_graph_with_full_sharing_it_is_diloco() -> None:
    graph = FullyConnected(num_nodes=NODES, seed=1)
    found = {}
    for name, outer in {"diloco": Nesterov(0.7, 0.9), "without": None}.items():
        run = simulator(NODES, topology=graph, rounds=ROUNDS, train={"optimizer": ADAMW}, outer=outer)
        assert end(run.run()).status == "finished"
        found[name] = models(run)
    expected = diloco(0.7, 0.9)
    for node in range(NODES):
        torch.testing.assert_close(found["diloco"][node], expected, atol=2e-5, rtol=0)
    assert (found["without"] - expected).abs().max() > 0.05  # the outer step is what makes the difference
    torch.testing.assert_close(found["without"][0], diloco(1.0, 0.0), atol=2e-5, rtol=0)


def test_a_step_is_that_of_torch_s_nesterov() -> None:
    outer, momentum = Nesterov(0.3, 0.8), None
    generator = torch.Generator().manual_seed(1)
    params = torch.randn(7, generator=generator).requires_grad_()
    sgd = torch.optim.SGD([params], lr=0.3, momentum=0.8, nesterov=True)
    own = params.detach().clone()
    for _ in range(5):
        change = torch.randn(7, generator=generator)
        before = momentum.clone() if momentum is not None else None
        moved, after = outer.step(own, own - change, momentum)
        assert momentum is None or torch.equal(momentum, before)  # type: ignore[arg-type]
        own, momentum = moved, after
        params.grad = change
        sgd.step()
        torch.testing.assert_close(own, params.detach(), atol=1e-6, rtol=0)


ALGORITHMS: dict[str, Sharing[Any]] = {
    "full": full(),
    "random_k": random_k(0.5),
    "top_k": top_k(0.5),
    "jwins": jwins(),
    "choco": choco(0.3, 0.5),
    "closed_loop": closed_loop(),
    "stateless": stateless(),
    "beer": beer(0.3, 0.3),
    "sparse_loco": sparse_loco(0.3, 0.5),
    "demo": demo(gamma=0.5),
    "moniqua": moniqua(2.0),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_shares_the_model_after_the_outer_step(name: str) -> None:
    """With lr 1 and no momentum it shares what was trained; with others the same run ends elsewhere."""
    found = {}
    for key, outer in {"none": None, "identity": Nesterov(1.0, 0.0), "nesterov": Nesterov(0.4, 0.5)}.items():
        run = simulator(NODES, sharing=ALGORITHMS[name], rounds=3, outer=outer, codec="pco")
        assert end(run.run()).status == "finished"
        found[key] = models(run)
    assert (found["nesterov"] - found["none"]).abs().max() > 5e-3
    if name not in ("top_k", "jwins", "choco", "sparse_loco", "beer"):  # these may choose others after rounding
        torch.testing.assert_close(found["identity"], found["none"], atol=2e-2, rtol=0)


def test_rounds_without_training_take_no_outer_step() -> None:
    """Consensus only mixes: the mean over the nodes stays, and momentum does not move it."""
    means = []
    for rounds in (0, 5):
        run = simulator(NODES, rounds=4 + rounds, consensus_rounds=rounds, outer=Nesterov(0.7, 0.9))
        run.run()
        means.append(models(run).mean(dim=0))
    torch.testing.assert_close(means[0], means[1], atol=1e-6, rtol=0)


def test_a_node_that_does_not_take_part_in_a_round_takes_no_outer_step() -> None:
    graph = Participation(FullyConnected(num_nodes=NODES, seed=1), 0.5, seed=1)
    first, last = (
        simulator(NODES, topology=graph, rounds=rounds, outer=Nesterov(0.7, 0.9), checkpoint_every=0)
        for rounds in (3, 4)
    )
    for run in (first, last):
        assert end(run.run()).status == "finished"
    absent = sorted(set(range(NODES)) - set(graph.active(3)))
    assert absent
    for node in range(NODES):
        same = torch.equal(first.groups[0].parameters(node), last.groups[0].parameters(node))
        assert same is (node in absent)


def test_a_node_that_returns_goes_on_with_its_momentum() -> None:
    options: dict[str, Any] = {"rounds": 6, "deadline_s": 0.1, "outer": Nesterov(0.7, 0.9)}
    run = simulator(NODES, faults=Faults().crash(1, 2).rejoin(1, 4), **options)
    assert end(run.run()).status == "finished"
    state = run.groups[0].machine(1).snapshot()
    assert state.momentum is not None
    assert bool(torch.isfinite(state.momentum).all())
    run.groups[0].machine(1).begin_with(torch.zeros_like(state.params))
    assert run.groups[0].machine(1).snapshot().momentum is None  # another's model has no momentum of this node


def test_pairs_that_change_every_round_train_together() -> None:
    """The setting of NoLoCo: one partner a round."""
    graph = Regular(num_nodes=NODES, seed=1, degree=1, dynamic=True)
    run = simulator(NODES, topology=graph, rounds=25, sharing=noloco(0.7, 0.7, 0.7))
    outcome = run.run()
    losses = [row.metrics["loss"].mean for row in outcome.rows if hasattr(row, "metrics")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "train.outer.lr = 0.0: expected a learning rate above 0"),
        ({"momentum": 1.0}, r"train.outer.momentum = 1.0: expected a factor in \[0, 0.999\]"),
    ],
)
def test_its_numbers_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Nesterov(**options)
