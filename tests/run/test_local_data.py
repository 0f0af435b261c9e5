"""Quantity skew, noisy labels and shifted features: data that differ from node to node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import jwins
from jwins.errors import ConfigError
from jwins.run.assembly import build
from jwins.run.builders import build_task, local_changes
from jwins.tasks import Dataset, Task
from jwins.tasks.local_data import (
    Changes,
    FlippedLabels,
    NoisyInputs,
    NoisyLabels,
    RotatedImages,
    with_local_data,
)
from jwins.tasks.partition import Quantity


def digits(*sets: str) -> jwins.Experiment:
    return jwins.load("digits", ["nodes.count=5", "topology.degree=2", *sets])


def sizes(alpha: float, seed: int = 1, **options: Any) -> list[int]:
    rng = np.random.default_rng(seed)
    parts = Quantity(alpha, **options).split(num_samples=1000, num_nodes=20, labels=None, keys=None, rng=rng)
    return sorted(len(part) for part in parts)


def test_sizes_follow_the_concentration() -> None:
    assert sizes(1e4)[0] > 40
    assert sizes(0.1)[-1] > 200
    assert sizes(0.1)[0] == 1
    assert sizes(0.1, min_samples=10)[0] == 10
    assert sizes(0.5, seed=1) != sizes(0.5, seed=2)
    assert sizes(0.5, min_samples=50) == [50] * 20


def test_a_quantity_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_samples = 51: 20 nodes cannot all have that many of 1000"):
        sizes(0.5, min_samples=51)
    with pytest.raises(ConfigError, match=r"task.partition.alpha = 0.0: expected a finite number above 0"):
        Quantity(0.0)
    with pytest.raises(ConfigError, match=r"task.partition.min_samples = 0: expected at least 1"):
        Quantity(min_samples=0)


def test_the_last_node_has_all_of_the_label_noise_and_the_first_none() -> None:
    experiment = digits("task.label_noise=0.4")
    task = build_task(experiment)
    parts = {node: np.arange(node * 200, node * 200 + 200) for node in range(5)}
    local, held = with_local_data(task, parts, local_changes(experiment, task))
    wrong = [
        float((local.train.targets[held[node]] != task.train.targets[parts[node]]).double().mean())
        for node in range(5)
    ]
    assert wrong == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    noisy = local.train.targets[held[4]]
    assert set(noisy.tolist()) <= set(range(10))
    again, _ = with_local_data(task, parts, local_changes(experiment, task))
    assert torch.equal(again.train.targets, local.train.targets)
    other = local_changes(experiment.changed({"run.seed": 2}), task)
    assert not torch.equal(with_local_data(task, parts, other)[0].train.targets, local.train.targets)


def test_images_are_rotated_about_their_centre() -> None:
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 0, 2] = 16  # above the centre
    target = torch.tensor([0])
    for degrees, place in ((0.0, (0, 2)), (90.0, (2, 0)), (180.0, (4, 2)), (-90.0, (2, 4))):
        turned, _ = RotatedImages(degrees)(image, target)
        assert turned.dtype == torch.uint8
        assert turned.shape == image.shape
        assert int(turned[0, 0][place]) == 16, degrees
        assert int(turned.sum()) == 16
    oblong = torch.zeros(2, 4, 8)
    oblong[:, 1, 6] = 1.0
    turned, _ = RotatedImages(180.0)(oblong, target)
    assert float(turned[1, 2, 1]) == pytest.approx(1.0, abs=1e-5)
    square, _ = RotatedImages(90.0)(torch.ones(1, 4, 8), target)
    assert float(square[0, :, 4].mean()) == pytest.approx(1.0)  # the middle stays, the ends turn black
    assert float(square[0, 0, 0]) == 0.0


def test_noise_is_of_the_given_deviation_and_stays_in_range() -> None:
    inputs, targets = torch.zeros(100, 50), torch.zeros(100)
    noisy, same = NoisyInputs(2.0, seed=1, node=3)(inputs, targets)
    assert same is targets
    assert float(noisy.std()) == pytest.approx(2.0, rel=0.05)
    assert not torch.equal(noisy, NoisyInputs(2.0, seed=1, node=4)(inputs, targets)[0])
    grey = torch.full((100, 50), 8, dtype=torch.uint8)
    grey[0] = 16
    grey[1] = 0
    found, _ = NoisyInputs(50.0, seed=1, node=3)(grey, targets)
    assert (found.dtype, int(found.min()), int(found.max())) == (torch.uint8, 0, 16)


@pytest.mark.parametrize("shift", ["{kind='rotation', degrees=60.0}", "{kind='noise', sd=1.0}"])
@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_a_run_with_shifted_data_repeats_and_goes_on(shift: str, batching: str, tmp_path: Path) -> None:
    sets = [f"task.feature_shift={shift}", "task.label_noise=0.2", f"train.batching={batching}"]
    sets += ["run.rounds=4", "run.eval_every=2", "run.checkpoint_every=1", "task.partition={kind='quantity'}"]
    whole = jwins.simulate(digits(*sets, f"run.folder={tmp_path / 'a'}"))
    part = digits(*sets, f"run.folder={tmp_path / 'b'}")
    asked = iter([False] * 6 + [True] * 1000)
    assert jwins.simulate(part, stop=asked.__next__).status == "interrupted"
    assert jwins.simulate(part, resume=True).sha256 == whole.sha256
    plain = jwins.simulate(digits(*sets[2:], f"run.folder={tmp_path / 'c'}"))
    assert plain.sha256 != whole.sha256
    assert plain.record.start.fingerprints["partition"] == whole.record.start.fingerprints["partition"]
    assert plain.record.evaluations[0].metrics == whole.record.evaluations[0].metrics


def test_the_first_node_trains_on_the_data_as_they_are() -> None:
    plain, shifted = (
        build(
            digits(
                "sharing.kind=random_k", "sharing.fraction=0.0001", "run.rounds=1", "train.batching=loop", *more
            )
        )
        for more in ([], ["task.feature_shift={kind='rotation'}"])
    )
    found = [made.driver.run() for made in (plain, shifted)]
    losses = [one.rows[-2].per_node["loss"] for one in found]  # type: ignore[union-attr]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-3)
    assert losses[0][4] != pytest.approx(losses[1][4], abs=1e-3)


class Words(Task):
    """Token ids and float targets: neither images nor labels."""

    def __init__(self) -> None:
        self.train = self.test = Dataset(torch.zeros(40, 3, dtype=torch.int64), torch.zeros(40))

    def model(self) -> nn.Module:
        return nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.label_noise=0.2", "task.label_noise = 0.2: the task's targets are not labels"),
        ("task.feature_shift={kind='rotation'}", "are not images; remove it"),
        (
            "task.feature_shift={kind='noise'}",
            "task.feature_shift.kind = 'noise': inputs are of type torch.int64",
        ),
    ],
)
def test_data_without_labels_or_images_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        local_changes(digits(setting), Words())
    assert message in str(caught.value)


def test_changes_follow_each_other() -> None:
    experiment = digits(
        "task.label_noise=1.0",
        "task.feature_shift={kind='rotation', degrees=90.0}",
        "faults=[{kind='attack', form='label_flip', nodes=[4]}]",
    )
    found = local_changes(experiment, build_task(experiment))
    assert sorted(found) == [1, 2, 3, 4]
    assert found[4] == Changes((FlippedLabels(10), NoisyLabels(10, 1.0, 1, 4), RotatedImages(90.0)))
    assert found[2] == Changes((NoisyLabels(10, 0.5, 1, 2), RotatedImages(45.0)))
