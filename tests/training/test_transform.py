"""Metrics that are no means of samples, from means over the whole test set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import jwins
from jwins.run.assembly import build
from jwins.tasks import Dataset, Task
from jwins.training.training_context import TrainingError


class Rare(Task):
    """A rare class, and the numbers of which F1 is made."""

    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"f1": "higher", "perplexity": "lower"}

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(600, 4, generator=generator)
        targets = (inputs.sum(dim=1) > 1.5).long()
        self.train, self.test = Dataset(inputs[:300], targets[:300]), Dataset(inputs[300:], targets[300:])

    def model(self) -> nn.Module:
        return nn.Linear(4, 2)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        said, true = outputs.argmax(dim=-1) == 1, targets == 1
        loss = nn.functional.cross_entropy(outputs, targets, reduction="none")
        counts = {"tp": said & true, "fp": said & ~true, "fn": ~said & true}
        return {"loss": loss, **{name: values.float() for name, values in counts.items()}}

    def transform(self, means: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        tp, fp, fn = (means[name] for name in ("tp", "fp", "fn"))
        return {"loss": means["loss"], "perplexity": means["loss"].exp(), "f1": 2 * tp / (2 * tp + fp + fn)}


def experiment(task: Any, **run: Any) -> jwins.Experiment:
    return jwins.Experiment(
        task={"own": task, "partition": {"kind": "iid"}},  # type: ignore[arg-type]
        nodes={"count": 4},  # type: ignore[arg-type]
        topology={"kind": "ring"},  # type: ignore[arg-type]
        run={"rounds": 12, "eval_every": 4, **run},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_f1_is_that_of_the_whole_test_set(batching: str) -> None:
    made = build(experiment(Rare).changed({"train.batching": batching}))
    row = made.driver.run().rows[-2]
    (group,) = made.driver.groups
    task = made.task
    for place, node in enumerate(row.nodes):  # type: ignore[union-attr]
        model = task.model()
        group.trainer.layout.write(group.parameters(node), model)  # type: ignore[attr-defined]
        said = model(task.test.inputs).argmax(dim=1).numpy()
        true = task.test.targets.numpy()
        tp = int(np.sum((said == 1) & (true == 1)))
        expected = 2 * tp / (2 * tp + int(np.sum(said != true)))
        assert row.per_node["f1"][place] == pytest.approx(expected)  # type: ignore[union-attr]
        loss = row.per_node["loss"][place]  # type: ignore[union-attr]
        assert row.per_node["perplexity"][place] == pytest.approx(math.exp(loss))  # type: ignore[union-attr,arg-type]
    assert set(row.metrics) == {"loss", "perplexity", "f1"}  # type: ignore[union-attr]


def test_early_and_own_samples_and_the_end_of_a_run_know_it() -> None:
    few = build(experiment(Rare, eval_samples_early=50, eval_last=1, eval_own=True)).driver.run()
    last = few.rows[-2]
    assert set(last.early) == {"loss", "perplexity", "f1", "own_loss", "own_perplexity", "own_f1"}  # type: ignore[union-attr]
    ended = build(experiment(Rare, stop={"metric": "perplexity", "target": 100.0})).driver.run()
    assert ended.status == "stopped"


def test_a_wrong_transform_is_named() -> None:
    class Scalar(Rare):
        def transform(self, means: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {"loss": means["loss"].mean()}

    class Broken(Rare):
        def transform(self, means: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {"loss": means["los"]}

    with pytest.raises(
        TrainingError, match=r"task.transform: metric 'loss' is \(\): expected one number per model"
    ):
        build(experiment(Scalar)).driver.run()

    class Mute(Rare):
        def transform(self, means: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return None  # type: ignore[return-value]

    with pytest.raises(TrainingError, match=r"task.transform returned a NoneType: expected metrics by name"):
        build(experiment(Mute)).driver.run()
    with pytest.raises(TrainingError, match=r"KeyError.*los.* \(test_transform.py, line \d+\)$"):
        build(experiment(Broken)).driver.run()
