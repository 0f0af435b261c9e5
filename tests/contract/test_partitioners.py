"""Contract of every partitioner, from one table, and promises of single ones."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from jwins.errors import ConfigError
from jwins.experiment import Experiment
from jwins.run.builders import build_partition
from jwins.tasks import make_task
from jwins.tasks.partition import PARTITIONERS, checked_split

TABLE = {
    "iid": {},
    "shards": {"shards_per_node": 2},
    "shards, four": {"shards_per_node": 4},
    "dirichlet": {"alpha": 0.5},
    "dirichlet, concentrated": {"alpha": 0.1, "min_samples": 2},
    "quantity": {"alpha": 0.5},
    "quantity, concentrated": {"alpha": 0.1, "min_samples": 2},
    "by_key": {},
    "contiguous": {},
}
LABELS = np.random.default_rng(1).integers(10, size=1000)
KEYS = np.random.default_rng(2).integers(60, size=1000) * 7 - 20  # neither dense nor all positive


def split(row: str, num_nodes: int = 16, seed: int = 3) -> list[np.ndarray]:
    partitioner = PARTITIONERS[row.split(",")[0]](**TABLE[row])
    rng = np.random.default_rng(seed)
    return partitioner.split(num_samples=1000, num_nodes=num_nodes, labels=LABELS, keys=KEYS, rng=rng)


def test_table_has_every_kind() -> None:
    assert {row.split(",")[0] for row in TABLE} == set(PARTITIONERS)


@pytest.mark.parametrize("row", TABLE)
class TestEveryPartitioner:
    @pytest.mark.parametrize("num_nodes", [1, 2, 7, 16, 40])
    def test_every_sample_in_exactly_one_part(self, row: str, num_nodes: int) -> None:
        parts = split(row, num_nodes)
        assert len(parts) == num_nodes
        for part in parts:
            assert len(part) > 0
            assert part.dtype == np.int64
            assert (np.diff(part) > 0).all()
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))

    def test_deterministic_and_drawn_from_the_generator(self, row: str) -> None:
        one, again, other = split(row), split(row), split(row, seed=4)
        assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    def test_inputs_unchanged(self, row: str) -> None:
        labels, keys = LABELS.copy(), KEYS.copy()
        split(row)
        np.testing.assert_array_equal(labels, LABELS)
        np.testing.assert_array_equal(keys, KEYS)

    def test_picklable_and_printable(self, row: str) -> None:
        partitioner = PARTITIONERS[row.split(",")[0]](**TABLE[row])
        assert pickle.loads(pickle.dumps(partitioner)) == partitioner
        assert repr(partitioner)


def test_iid_parts_are_even() -> None:
    assert {len(part) for part in split("iid", 16)} == {62, 63}


def test_shards_limit_the_labels_of_a_node() -> None:
    labels = np.repeat(np.arange(10), 100)
    partitioner = PARTITIONERS["shards"](shards_per_node=2)
    rng = np.random.default_rng(1)
    parts = partitioner.split(num_samples=1000, num_nodes=20, labels=labels, keys=None, rng=rng)
    assert {len(part) for part in parts} == {50}
    assert max(len(np.unique(labels[part])) for part in parts) == 2


def test_shards_mix_the_samples_of_a_label() -> None:
    """A shard is a random part of its label's samples, not a run of the file."""
    labels = np.zeros(100, dtype=np.int64)
    rng = np.random.default_rng(1)
    parts = PARTITIONERS["shards"]().split(num_samples=100, num_nodes=5, labels=labels, keys=None, rng=rng)
    assert all(part[-1] - part[0] > 40 for part in parts)


@pytest.mark.parametrize("alpha", [0.1, 1000.0])
def test_dirichlet_concentrates_as_alpha_falls(alpha: float) -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 500)
    parts = PARTITIONERS["dirichlet"](alpha=alpha).split(
        num_samples=5000, num_nodes=8, labels=labels, keys=None, rng=rng
    )
    largest = [np.bincount(labels[part]).max() / len(part) for part in parts]
    assert (np.mean(largest) > 0.3) == (alpha < 1)


def test_dirichlet_keeps_min_samples() -> None:
    assert min(len(part) for part in split("dirichlet, concentrated")) >= 2


def test_by_key_keeps_owners_together() -> None:
    owners = [set(KEYS[part].tolist()) for part in split("by_key")]
    assert sum(map(len, owners)) == len(set(KEYS.tolist()))
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


@pytest.mark.parametrize(
    ("kind", "options", "num_nodes", "path", "remedy"),
    [
        ("shards", {"shards_per_node": 0}, 4, "task.partition.shards_per_node", "at least 1"),
        ("dirichlet", {"alpha": 0.0}, 4, "task.partition.alpha", "above 0"),
        ("dirichlet", {"alpha": float("nan")}, 4, "task.partition.alpha", "above 0"),
        ("dirichlet", {"min_samples": 0}, 4, "task.partition.min_samples", "at least 1"),
        ("iid", {}, 11, "task.partition.kind", "10 training samples cannot fill 11 nodes"),
        ("shards", {}, 6, "task.partition.shards_per_node", "12 shards.*10 training samples; use fewer"),
        ("dirichlet", {"min_samples": 4}, 3, "task.partition.min_samples", "use a smaller number"),
        ("dirichlet", {"alpha": 1e-3}, 9, "task.partition.alpha", "use a larger alpha, fewer nodes"),
        ("by_key", {}, 4, "task.partition.kind", "3 owners of samples for 4 nodes"),
    ],
)
def test_impossible_partitions_are_refused(
    kind: str, options: dict[str, object], num_nodes: int, path: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        PARTITIONERS[kind](**options).split(
            num_samples=10,
            num_nodes=num_nodes,
            labels=np.arange(10) % 2,
            keys=np.arange(10) % 3,
            rng=np.random.default_rng(0),
        )
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("table", "path", "remedy"),
    [
        ({"kind": "sorted"}, "task.partition.kind", "kinds: iid, shards, dirichlet, quantity, by_key"),
        ({"kind": "iid", "alpha": 1.0}, "task.partition.alpha", "this key is for kind"),
        ({"kind": "shards", "alpha": 1.0}, "task.partition.alpha", 'kind = "dirichlet" or "quantity"'),
    ],
)
def test_tables_of_no_partitioner_are_refused(table: dict[str, Any], path: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        Experiment(task={"name": "digits", "partition": table})  # type: ignore[arg-type]
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("shards", "no labels"), ("dirichlet", r"partition_labels\(\)"), ("by_key", "no natural owner")],
)
def test_what_the_task_does_not_have(kind: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        PARTITIONERS[kind]().split(
            num_samples=10, num_nodes=2, labels=None, keys=None, rng=np.random.default_rng(0)
        )


# --- a partitioner of one's own ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """Gives 12 samples to 3 nodes as a function has it."""

    parts: Callable[..., Any]

    def split(self, **given: Any) -> Any:
        return self.parts(given)


def thirds() -> list[np.ndarray]:
    return np.array_split(np.arange(12), 3)


def checked(parts: Callable[..., Any], **given: Any) -> list[np.ndarray]:
    settings = {"labels": None, "keys": None, "rng": np.random.default_rng(0), **given}
    return checked_split(Own(parts), num_samples=12, num_nodes=3, **settings)


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (lambda given: [np.arange(10)] * 3, r"gives nodes 0 and 1 sample 0; each sample needs one node"),
        (
            lambda given: [np.arange(4), np.arange(3, 8), np.arange(8, 12)],
            "gives nodes 0 and 1 sample 3; each sample needs",
        ),
        (lambda given: [part[:3] for part in thirds()], "gives sample 3 to no node \\(3 such"),
        (lambda given: [*thirds()[:2], np.arange(8, 13)], "gives node 2 sample 12; expected 0 to 11"),
        (lambda given: [np.arange(-1, 4), *thirds()[1:]], "gives node 0 sample -1; expected 0 to 11"),
        (
            lambda given: [*thirds()[:2], np.arange(8, 12)[::-1]],
            "gives node 2 sample 10 after 11; expected inc",
        ),
        (lambda given: [np.array([0, 0, 1, 2, 3]), *thirds()[1:]], "gives node 0 sample 0 after 0; expected"),
        (lambda given: [np.arange(12), *[np.arange(0)] * 2], "gives node 1 no samples"),
        (lambda given: thirds()[:2], "returns a list of 2; expected a list of 3, one per node"),
        (lambda given: dict(enumerate(thirds())), "returns a dict; expected a list of 3"),
        (lambda given: None, "returns a NoneType; expected a list of 3"),
        (lambda given: [part.tolist() for part in thirds()], "returns list for node 0; expected a NumPy array"),
        (lambda given: [part.astype(float) for part in thirds()], r"float64 of shape \(4,\) for node 0"),
        (lambda given: [part[None] for part in thirds()], r"int64 of shape \(1, 4\) for node 0"),
        (lambda given: given["tables"], "raises KeyError: 'tables'"),
    ],
)
def test_an_own_partitioner_is_held_to_its_promise_by_name(parts: Callable[..., Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"test_partitioners\.Own'?: Own\.split\(\) .*{problem}") as caught:
        checked(parts)
    assert caught.value.path == "task.partition"
    assert str(caught.value.value).endswith(".Own")


def test_an_own_partitioner_that_does_as_it_must_is_taken_as_it_is() -> None:
    parts = checked(lambda given: [np.array([0, 11]), np.arange(1, 10), np.array([10])])
    assert [part.tolist() for part in parts] == [[0, 11], list(range(1, 10)), [10]]


def test_an_own_partitioner_cannot_change_the_tasks_owners() -> None:
    def changes(given: dict[str, Any]) -> list[np.ndarray]:
        given["keys"][:] = 0
        given["labels"][:] = 0
        return thirds()

    keys, labels = np.arange(12), np.arange(12)
    checked(changes, keys=keys, labels=labels)
    assert keys.tolist() == labels.tolist() == list(range(12))


def test_an_experiment_checks_a_partitioner_of_its_own() -> None:
    experiment = Experiment(
        task={"name": "digits", "partition": Own(lambda given: [np.arange(10)] * given["num_nodes"])},  # type: ignore[arg-type]
        nodes={"count": 2},  # type: ignore[arg-type]
        topology={"kind": "ring"},  # type: ignore[arg-type]
    )
    with pytest.raises(ConfigError, match=r"Own\.split\(\) gives nodes 0 and 1 sample 0"):
        build_partition(experiment, make_task("digits"))
