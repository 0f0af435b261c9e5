"""Partitions are disjoint and complete, and owners stay together, for any labels and keys."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jwins.errors import ConfigError
from jwins.tasks.partition import ByKey, Dirichlet, Iid, Partitioner, Shards
from jwins.tasks.source import split_within_keys

labels_lists = st.lists(st.integers(-5, 5), min_size=1, max_size=200)
partitioners = st.one_of(
    st.just(Iid()),
    st.builds(Shards, st.integers(1, 5)),
    st.builds(Dirichlet, st.floats(0.05, 100), st.integers(1, 3)),
    st.just(ByKey()),
)


@settings(deadline=None)  # Dirichlet shares are redrawn until every node has samples
@given(partitioners, labels_lists, st.integers(1, 20), st.integers(0, 2**32))
def test_disjoint_and_complete_or_refused(
    partitioner: Partitioner, numbers: list[int], num_nodes: int, seed: int
) -> None:
    values = np.array(numbers, dtype=np.int64)
    n = len(values)
    try:
        parts = partitioner.split(
            num_samples=n, num_nodes=num_nodes, labels=values, keys=values, rng=np.random.default_rng(seed)
        )
    except ConfigError:
        assert not isinstance(partitioner, Iid) or n < num_nodes
        return
    assert len(parts) == num_nodes
    assert all(len(part) and part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    if isinstance(partitioner, ByKey):
        owners = [set(values[part].tolist()) for part in parts]
        assert sum(map(len, owners)) == len(set(numbers))


@given(labels_lists, st.floats(0.01, 0.99), st.booleans())
def test_train_and_test_samples_of_each_owner(numbers: list[int], fraction: float, last: bool) -> None:
    keys = np.array(numbers, dtype=np.int64)
    train, test = split_within_keys("any", keys, fraction, last=last)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(keys)))
    for owner in set(numbers):
        own, tested = np.flatnonzero(keys == owner), test[keys[test] == owner]
        assert len(tested) == min(round(fraction * len(own)), len(own) - 1)
        if last:
            np.testing.assert_array_equal(tested, own[len(own) - len(tested) :])
