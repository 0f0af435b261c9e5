"""Differentially private training: what a step does to gradients, and what a run says of its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import jwins
from jwins.errors import ConfigError
from jwins.run_folder.tensorboard import scalars
from jwins.tasks.base import Dataset, Task
from jwins.training.optimizer import Optimizer
from jwins.training.privacy import Privacy, poisson_batches
from jwins.training.trainer import Trainer

PARTS = [np.arange(0, 30), np.arange(30, 60), np.arange(60, 64)]


class Points(Task):
    """Three classes of points, and a model and a loss for each test."""

    name = "points"

    def __init__(self, build: Any = None, reduction: str = "mean") -> None:
        generator = torch.Generator().manual_seed(3)
        targets = torch.randint(3, (64,), generator=generator)
        inputs = torch.randn(64, 6, generator=generator) + targets[:, None]
        self.build, self.reduction = build or (lambda: nn.Linear(6, 3)), reduction
        self.train, self.test = Dataset(inputs, targets), Dataset(inputs[:20] + 0.1, targets[:20])

    def model(self) -> nn.Module:
        return self.build()

    def loss(self, model: Any, batch: Any, generator: torch.Generator | None) -> torch.Tensor:
        return functional.cross_entropy(model(batch.inputs), batch.targets, reduction=self.reduction)


def trainer(task: Task | None = None, *, clip: float = 1.0, noise: float = 0.0, **options: Any) -> Trainer:
    samples = dict(enumerate(map(len, PARTS)))
    privacy = Privacy(clip, dict.fromkeys(samples, noise), samples, 5, 1e-5)
    options = {"optimizer": Optimizer("sgd", {"lr": 0.5}), "local_steps": 1} | options
    return Trainer(task or Points(), PARTS, seed=1, batch_size=5, privacy=privacy, **options)


def change(private: Trainer, node: int, round: int = 0) -> torch.Tensor:
    before = private.row(node).clone()
    private.train({node: round})
    return private.row(node) - before


def test_a_step_is_the_sum_of_the_clipped_gradients_of_its_samples_over_the_expected_size() -> None:
    task, clip = Points(), 0.7
    private = trainer(task, clip=clip)
    assert (private.batching, private.reason) == ("loop", "gradients are clipped for each sample")
    for node, expected in ((0, 5), (1, 5), (2, 4)):  # node 2 has four samples: each of them, in each step
        (drawn,) = private.indices(node, 0)
        total = torch.zeros(private.layout.size)
        clips = 0
        for sample in drawn:
            model = nn.Linear(6, 3)
            start = private.row(node)
            model.weight.data, model.bias.data = start[:18].view(3, 6).clone(), start[18:].clone()
            one = task.train.inputs[sample][None], task.train.targets[sample][None]
            functional.cross_entropy(model(one[0]), one[1]).backward()  # type: ignore[no-untyped-call]
            gradient = torch.cat([model.weight.grad.flatten(), model.bias.grad])  # type: ignore[union-attr, list-item]
            clips += gradient.norm() > clip
            total += gradient * min(1.0, clip / float(gradient.norm()))
        assert clips > 0
        torch.testing.assert_close(change(private, node), -0.5 * total / expected, rtol=1e-4, atol=1e-6)


def test_noise_has_the_standard_deviation_that_the_accountant_counts() -> None:
    """The noise of a step is noise_multiplier * clip_norm in the sum, so divided by the expected size."""
    wide = Points(lambda: nn.Linear(6, 3000))
    quiet, noisy = trainer(wide, clip=0.3), trainer(wide, clip=0.3, noise=2.0)
    added = change(noisy, 0) - change(quiet, 0)
    assert float(added.std()) == pytest.approx(0.5 * 2.0 * 0.3 / 5, rel=0.02)
    assert abs(float(added.mean())) < 0.002
    other = change(trainer(wide, clip=0.3, noise=2.0), 1) - change(trainer(wide, clip=0.3), 1)
    both = torch.corrcoef(torch.stack([added, other]))[0, 1]
    assert abs(float(both)) < 0.03  # each node draws its own
    later = change(trainer(wide, clip=0.3, noise=2.0), 0, 1) - change(trainer(wide, clip=0.3), 0, 1)
    assert abs(float(torch.corrcoef(torch.stack([added, later]))[0, 1])) < 0.03


def test_no_sample_changes_the_sum_by_more_than_the_norm() -> None:
    private = trainer(clip=0.5).privacy
    assert private is not None
    generator = torch.Generator().manual_seed(1)
    gradients = {
        "a": 50 * torch.randn(8, 4, 3, generator=generator),
        "b": torch.randn(8, 2, generator=generator),
    }
    whole = private.noisy_mean(0, gradients, generator)
    for left_out in range(8):
        rest = {name: each[torch.arange(8) != left_out] for name, each in gradients.items()}
        less = private.noisy_mean(0, rest, generator)
        apart = torch.cat([(whole[name] - less[name]).flatten() for name in whole])  # type: ignore[operator]
        assert float(apart.norm()) * 5 <= 0.5 + 1e-5


def test_each_sample_is_drawn_by_itself_with_the_rate() -> None:
    part = np.arange(100, 140)
    drawn = poisson_batches(part, seed=1, node=0, round=0, local_steps=4000, batch_size=8)
    sizes = np.array([len(batch) for batch in drawn])
    assert sizes.mean() == pytest.approx(8, rel=0.03)
    assert sizes.var() == pytest.approx(40 * 0.2 * 0.8, rel=0.08)  # binomial, so not batches of one size
    counts = np.bincount(np.concatenate(drawn) - 100, minlength=40)
    assert counts.min() > 700
    assert counts.max() < 900
    assert all(len(set(batch.tolist())) == len(batch) for batch in drawn)


def test_an_empty_batch_is_a_step_of_noise_alone() -> None:
    private = trainer(noise=1.0)
    empty = next(at for at in range(2000) if not len(private.indices(0, at)[0]))
    before = private.row(0).clone()
    assert np.isnan(private.train({0: empty})[0])
    assert float((private.row(0) - before).norm()) > 0.01


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("build", [None, dropping], ids=["linear", "dropout"])
def test_noise_and_batches_depend_on_seed_node_and_round_alone(build: Any) -> None:
    first, second = (trainer(Points(build), noise=1.0, local_steps=2) for _ in range(2))
    torch.manual_seed(7)
    for at in range(3):
        first.train(dict.fromkeys(range(3), at))
    torch.manual_seed(8)
    for node in (2, 1, 0):
        for at in range(3):
            second.train({node: at})
    assert torch.equal(first.params, second.params)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + 1
        return self.inner(inputs)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            Points(normed),
            {},
            r"train.privacy = True: layer 1 \(BatchNorm1d\) mixes the samples .* use GroupNorm",
        ),
        (Points(Counting), {}, "buffer seen changes in training, and would leave the node without noise"),
        (Points(reduction="sum"), {}, "the loss of a batch is not the mean of the losses of its samples"),
        (Points(), {"batching": "stacked"}, "train.batching = 'stacked': train.privacy takes the gradients"),
    ],
    ids=["batch norm", "buffer", "sum", "stacked"],
)
def test_what_has_no_gradient_of_one_sample_is_refused(
    task: Task, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(task, **options)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("{}", r"train.privacy = {.*}: expected one of epsilon and noise_multiplier"),
        ("{epsilon=8.0, noise_multiplier=1.0}", "expected one of epsilon and noise_multiplier"),
        ("{epsilon=0.0}", "train.privacy.epsilon = 0.0: expected a budget above 0"),
        ("{epsilon=8.0, delta=1.0}", r"train.privacy.delta = 1.0: expected a probability in \(0, 0.5\]"),
        ("{epsilon=8.0, clip_norm=0.0}", "train.privacy.clip_norm = 0.0: expected a norm above 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jwins.load("digits", [f"train.privacy={key}"])


def test_settings_that_exclude_each_other_are_refused() -> None:
    private = "train.privacy={epsilon=8.0}"
    with pytest.raises(ConfigError, match=r"train.clip_norm = 1.0: train.privacy clips the gradient of each"):
        jwins.load("digits", [private, "train.clip_norm=1.0"])
    with pytest.raises(ConfigError, match=r"train.batching = 'stacked': train.privacy takes the gradients"):
        jwins.load("digits", [private, "train.batching=stacked"])


def test_without_opacus_a_run_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opacus.accountants", None)
    wanted = jwins.load("digits", ["train.privacy={noise_multiplier=0.123}", f"run.folder={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"needs opacus to count the budget: pip install 'jwins\[privacy\]'"):
        jwins.simulate(wanted)
    assert not (tmp_path / "run").exists()


def run(tmp_path: Path, privacy: str, *sets: str, name: str = "run", **options: Any) -> jwins.Result:
    small = [
        "nodes.count=4",
        "topology.kind=ring",
        "run.rounds=4",
        "run.eval_every=2",
        "run.checkpoint_every=1",
    ]
    small += ["task.partition={kind='dirichlet', alpha=1.0}", "sharing.kind=full", f"train.privacy={privacy}"]
    return jwins.simulate(jwins.load("digits", [*small, *sets, f"run.folder={tmp_path / name}"]), **options)


def test_a_run_spends_its_budget_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    result = run(tmp_path, "{epsilon=4.0, delta=1e-4}")
    spent = [row["epsilon"] for row in result.rows]
    assert spent[0] == 0.0
    assert 0.0 < spent[1] < spent[2]
    assert 3.9 < spent[2] <= 4.0
    assert scalars(result.record.evaluations[-1])["train/epsilon"] == spent[2]


def test_a_run_that_goes_on_is_one_that_never_stopped(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    whole = run(tmp_path, "{noise_multiplier=0.8}")
    calls = iter(range(1000))
    part = run(tmp_path, "{noise_multiplier=0.8}", name="part", stop=lambda: next(calls) > 4)
    assert part.status == "interrupted"
    again = run(tmp_path, "{noise_multiplier=0.8}", name="part", resume=True)
    assert again.sha256 == whole.sha256
    assert again.rows[-1]["epsilon"] == whole.rows[-1]["epsilon"] > 0
    longer = run(tmp_path, "{noise_multiplier=0.8}", "run.rounds=6", name="part", extend=True)
    assert longer.rows[-1]["epsilon"] > whole.rows[-1]["epsilon"]
    run(tmp_path, "{epsilon=8.0}", name="budget")
    with pytest.raises(ConfigError, match=r"train.privacy.epsilon = 8.0: was shared out over the rounds"):
        run(tmp_path, "{epsilon=8.0}", "run.rounds=6", name="budget", extend=True)


def test_rounds_without_training_spend_nothing(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    some = run(tmp_path, "{noise_multiplier=0.8}", "nodes.participation=0.5", "run.consensus_rounds=2")
    every = run(tmp_path, "{noise_multiplier=0.8}", "run.consensus_rounds=2", name="every")
    last = [result.record.consensus[-1].epsilon for result in (some, every)]
    assert 0 < last[0] < last[1]  # type: ignore[operator]
    assert last[1] == every.record.evaluations[-1].epsilon


def test_the_budget_is_that_of_opacus_for_batches_drawn_so() -> None:
    accountants = pytest.importorskip("opacus.accountants")
    from jwins.training.privacy import noise_for, spent

    noise = noise_for(3.0, 0.1, 200, 1e-5)
    assert 2.98 < spent(noise, 0.1, 200, 1e-5) <= 3.0
    with pytest.raises(ConfigError, match=r"train.privacy.epsilon = 1e-08: no noise is enough for delta"):
        noise_for(1e-8, 0.1, 200, 1e-5)
    private = trainer(noise=1.5).privacy
    assert private is not None
    for node, rate in ((0, 5 / 30), (2, 1.0)):
        accountant = accountants.RDPAccountant()
        for _ in range(40):
            accountant.step(noise_multiplier=1.5, sample_rate=rate)
        assert private.epsilon(node, 40) == pytest.approx(accountant.get_epsilon(1e-5))
    assert private.epsilon(0, 0) == 0.0


def test_tables_have_the_budget(tmp_path: Path) -> None:
    from jwins.report.comparison_table import head_and_rows, page_table
    from jwins.report.seed_groups import Group, Target
    from jwins.report.summary_rows import summary_row

    pytest.importorskip("opacus")
    results = [run(tmp_path, "{noise_multiplier=0.8}"), run(tmp_path, "{noise_multiplier=0.4}", name="b")]
    target = Target("accuracy", 0.9)
    lines = [summary_row(Group(r.folder.name, "full", (r.record,), (1.0,)), target, full=None) for r in results]
    head, rows = head_and_rows(lines, target)
    place = head.index("epsilon")
    assert [row[place] for row in rows] == [f"{r.rows[-1]['epsilon']:.2f}" for r in results]
    assert "epsilon" in page_table(lines, target).head
