"""Each node on test samples like its own, and the nodes that are worst off."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import jwins
from jwins.errors import ConfigError
from jwins.run.builders import build_partition, build_task
from jwins.run.evaluation_plan import own_evaluation_samples, own_test_samples
from jwins.run_folder.record import Record
from jwins.run_folder.rows import Spread
from jwins.tasks import Dataset, Task


class Marked(Task):
    """Labels of train and test as they are given; nothing is learnt."""

    def __init__(self, train: list[int], test: list[int]) -> None:
        self.train = Dataset(torch.zeros(len(train), 2), torch.tensor(train))
        self.test = Dataset(torch.zeros(len(test), 2), torch.tensor(test))

    def model(self) -> nn.Module:
        return nn.Linear(2, 4)


def counts(task: Task, own: npt.NDArray[np.int64]) -> list[int]:
    return np.bincount(task.test.targets.numpy()[own], minlength=4).tolist()


@pytest.mark.parametrize(
    ("train", "test", "found"),
    [
        ([0] * 30 + [1] * 10, [0] * 60 + [1] * 60, [60, 20, 0, 0]),
        ([0] * 30 + [1] * 10, [0] * 60 + [1] * 10, [30, 10, 0, 0]),
        ([2] * 5, [0] * 9 + [2] * 7, [0, 0, 7, 0]),
        ([0] * 10 + [3] * 10, [0] * 8, [8, 0, 0, 0]),  # nobody can be tested on label 3
        ([3] * 10, [0] * 8, [0, 0, 0, 0]),
        ([0] * 1000 + [1], [0] * 50 + [1] * 50, [50, 1, 0, 0]),
    ],
)
def test_own_samples_have_the_proportions_of_the_labels(
    train: list[int], test: list[int], found: list[int]
) -> None:
    task = Marked(train, test)
    (own,) = own_test_samples(task, [np.arange(len(train))], seed=1)
    assert counts(task, own) == found
    assert own.tolist() == sorted(set(own.tolist()))


@pytest.mark.parametrize(
    "partition",
    ["{kind='iid'}", "{kind='shards', shards_per_node=2}", "{kind='dirichlet', alpha=0.2}"],
)
def test_every_partition_has_own_samples(partition: str) -> None:
    experiment = jwins.load("digits", [f"task.partition={partition}", "run.eval_own=true"])
    task = build_task(experiment)
    parts = build_partition(experiment, task)
    own = own_test_samples(task, parts, seed=1)
    for part, rows in zip(parts, own, strict=True):
        labels = np.bincount(task.train.targets.numpy()[part], minlength=10) / len(part)
        tested = np.bincount(task.test.targets.numpy()[rows], minlength=10) / len(rows)
        # Each label has its whole number of samples, at least one.
        assert np.abs(labels - tested).max() <= 10 / len(rows)
    assert [rows.tolist() for rows in own] != [rows.tolist() for rows in own_test_samples(task, parts, seed=2)]
    few = experiment.changed({"run": {"eval_samples": 20, "eval_samples_early": 5}})
    last, early = own_evaluation_samples(few, task, parts)
    for some, fewer in zip(last, early, strict=True):
        assert len(some) <= 20
        assert set(fewer.tolist()) <= set(some.tolist())


def test_a_specialist_is_better_on_its_own_samples(tmp_path: Path) -> None:
    sets = ["nodes.count=4", "topology.kind=ring", "sharing.kind=random_k", "sharing.fraction=0.001"]
    sets += ["train.batching=loop"]
    sets += ["run.rounds=40", "run.eval_every=40", "run.eval_own=true", f"run.folder={tmp_path}"]
    last = jwins.simulate(jwins.load("digits", sets)).record.evaluations[-1]
    for own, common in zip(last.per_node["own_accuracy"], last.per_node["accuracy"], strict=True):
        assert own is not None
        assert common is not None
        assert own > common + 0.2


def test_labels_that_are_not_the_targets_are_no_labels_of_the_test_set() -> None:
    class Grouped(Marked):
        def partition_labels(self) -> npt.NDArray[np.int64] | None:
            return np.arange(len(self.train)) // 4

    with pytest.raises(
        ConfigError, match=r"run.eval_own = True: the task's samples have no natural owner, and"
    ):
        own_test_samples(Grouped([0] * 8, [0] * 8), [np.arange(8)])


# --- The worst tenth -----------------------------------------------------------------------------------------


def record_of(folder: Path, *per_node: list[float | None]) -> Record:
    """Of the nodes' values of a metric after so many evaluations."""
    sets = [
        "nodes.count=2",
        "topology.kind=ring",
        "train.batching=loop",
        "run.rounds=1",
        f"run.folder={folder}",
    ]
    done = jwins.simulate(jwins.load("digits", sets)).record
    evaluations = []
    for at, values in enumerate(per_node):
        known = [value for value in values if value is not None]
        spread = Spread(statistics.fmean(known), statistics.pstdev(known), min(known), max(known))
        changed: dict[str, Any] = {"round": at, "metrics": {"score": spread}, "per_node": {"score": values}}
        evaluations.append(msgspec.structs.replace(done.evaluations[-1], **changed))
    return Record(folder, done.start, tuple(evaluations), done.end)


def test_the_worst_tenth_of_the_nodes(tmp_path: Path) -> None:
    first: list[float | None] = [0.0] * 20
    second: list[float | None] = [float(value) for value in range(20)]
    third: list[float | None] = [2.0 * value for value in range(20)]
    record = record_of(tmp_path, first, second, third)
    assert record.worst_nodes("score", lower_is_better=False) == 1.0
    assert record.worst_nodes("score", lower_is_better=True) == 37.0
    assert record.worst_nodes("score", lower_is_better=False, over=2) == 0.75
    assert record.worst_nodes("score", lower_is_better=False, over=9) == 0.75
    assert record.worst_nodes("nothing", lower_is_better=False) is None
    assert record.sd_over_nodes("score") == pytest.approx(statistics.pstdev(range(0, 40, 2)))
    few = record_of(tmp_path / "few", [3.0, None, 1.0, 2.0])
    assert few.worst_nodes("score", lower_is_better=False) == 1.0


def test_tables_have_the_worst_tenth(tmp_path: Path) -> None:
    from jwins.compare import compare
    from jwins.compare.comparison import load_comparison
    from jwins.report.comparison_table import head_and_rows

    file = tmp_path / "c.toml"
    file.write_text(
        "base = 'digits'\n[nodes]\ncount = 12\n[train]\nbatching = 'loop'\n[run]\nrounds = 2\neval_every = 1\n"
        f"[compare]\nseeds = [1, 2]\nfinal_over = 2\nfolder = {json.dumps(str(tmp_path / 'out'))}\n"
        "[[variants]]\nname = 'all'\nsharing = { kind = 'full' }\n"
    )
    found = compare(load_comparison(file), jobs=1)
    worst, sds = [], []
    for seed in (1, 2):
        lines = (tmp_path / "out" / "all" / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
        rows = [row for line in lines if (row := json.loads(line))["kind"] == "eval"][-2:]
        tenths = [sorted(row["per_node"]["accuracy"])[:2] for row in rows]
        worst.append(statistics.fmean(statistics.fmean(tenth) for tenth in tenths))
        sds.append(statistics.fmean(row["metrics"]["accuracy"]["sd"] for row in rows))
    (row,) = found.table
    assert row.worst == pytest.approx(statistics.fmean(worst), rel=1e-4)  # of values with five digits
    assert row.node_sd == pytest.approx(statistics.fmean(sds))
    assert found.target is not None
    head, ((*_, cell, status),) = head_and_rows(found.table, found.target)
    assert head[-2:] == ["worst 10 % of nodes", "status"]
    assert status == "finished"
    assert cell == f"{row.worst * 100:.1f} % (sd {row.node_sd * 100:.1f} over nodes)"
