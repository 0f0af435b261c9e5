"""Experiments that do not fit into memory are refused before they start."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import jwins
from jwins.errors import ConfigError
from jwins.experiment import TaskConfig
from jwins.run import memory
from jwins.run.assembly import build
from jwins.tasks import Dataset, Task


class Wide(Task):
    """Of each sample, which is one number, the model keeps 4,000 numbers and more for its gradient."""

    name = "wide"

    def __init__(self) -> None:
        self.train = self.test = Dataset(torch.zeros(10, 1), torch.zeros(10, dtype=torch.int64))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4000), nn.ReLU(), nn.Linear(4000, 2))


def with_batches_of(size: int) -> jwins.Experiment:
    given = ["nodes.count=2", "topology.kind=ring", "train.local_steps=1", "run.device=cpu", "run.threads=1"]
    return jwins.load("digits", [*given, f"train.batch_size={size}"]).model_copy(
        update={"task": TaskConfig(own=Wide())}
    )


def test_batches_that_no_memory_holds_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.batch_size = 1000000000000000: needs at least .* GB of memory"
    ):
        build(with_batches_of(10**15))


def test_the_largest_batch_that_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample takes what the model keeps of it: 4,000 numbers of four bytes, and little else."""
    monkeypatch.setattr(memory, "memory_free", lambda: 20e6)
    with pytest.raises(ConfigError, match="use at most") as caught:
        memory.check_batch_fits(with_batches_of(2000), Wide(), at_once=1)
    found = re.search(r"at most ([\d,]+)$", caught.value.problem)
    assert found is not None
    most = int(found[1].replace(",", ""))
    assert 0.9 * 20e6 / 16_000 < most < 20e6 / 16_000
    memory.check_batch_fits(with_batches_of(most), Wide(), at_once=1)
    with pytest.raises(ConfigError):
        memory.check_batch_fits(with_batches_of(most + 1), Wide(), at_once=1)
    with pytest.raises(ConfigError):
        memory.check_batch_fits(with_batches_of(most), Wide(), at_once=2)


def test_small_batches_and_unknown_memory_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_free", lambda: 1.0)
    memory.check_batch_fits(with_batches_of(8), Wide(), at_once=1)
    monkeypatch.setattr(memory, "memory_free", lambda: None)
    memory.check_batch_fits(with_batches_of(10**15), Wide(), at_once=1)


def test_the_callers_generator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_free", lambda: 1e12)
    before = torch.get_rng_state()
    memory.check_batch_fits(with_batches_of(1000), Wide(), at_once=1)
    assert torch.equal(torch.get_rng_state(), before)
