"""Handwritten digits, 8x8 pixels, that come with the package: the task for demos and tests.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
1998, doi 10.24432/C50P49, CC BY 4.0; see ``data/README.md``.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from importlib import resources

import numpy as np
import torch
from torch import Tensor, nn

from jwins.errors import ConfigError
from jwins.rng import stream
from jwins.tasks.base import Dataset, Task
from jwins.tasks.source import SPLIT_SEED

_TEST_EVERY = 5
"""One in this number of samples is for testing."""

_MEAN, _SD = 4.9, 6.0
"""Mean and standard deviation of the training samples' pixels, which range from 0 to 16."""


class Digits(Task):
    """Ten digits in 1,437 training and 360 test images of 8x8 pixels.

    Args:
        model: ``"mlp"``, one hidden layer of 160 (12,010 parameters), or ``"cnn"``, two 3x3 convolutions
            of 16 and 32 channels with GroupNorm (6,186 parameters).

    Raises:
        ConfigError: no such model.

    >>> task = Digits()
    >>> len(task.train), len(task.test), sum(p.numel() for p in task.model().parameters())
    (1437, 360, 12010)
    """

    def __init__(self, *, model: str = "mlp") -> None:
        if model not in ("mlp", "cnn"):
            raise ConfigError("task.options.model", model, "expected 'mlp' or 'cnn'")
        self.name = "digits"
        self.train, self.test = _read()
        self._model = model

    def model(self) -> nn.Module:
        """Make a model of the chosen kind."""
        if self._model == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 160), nn.ReLU(), nn.Linear(160, 10))
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(2, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10)),
        )

    def prepare(self, inputs: Tensor) -> Tensor:
        """Convert (B, 1, 8, 8) uint8 of 0 to 16 to float32 of mean 0 and standard deviation 1."""
        return (inputs.float() - _MEAN) / _SD


@lru_cache(maxsize=1)
def _read() -> tuple[Dataset, Dataset]:
    """Read training and test samples; every fifth of the shuffled samples of each digit is for testing."""
    packed = resources.files("jwins.tasks").joinpath("data", "digits.csv.gz").read_bytes()
    table = np.loadtxt(gzip.decompress(packed).decode("ascii").splitlines(), delimiter=",", dtype=np.uint8)
    shuffled = stream(SPLIT_SEED, "digits split").permutation(len(table))
    by_digit = shuffled[np.argsort(table[shuffled, -1], kind="stable")]
    is_test = np.zeros(len(table), dtype=bool)
    is_test[by_digit[::_TEST_EVERY]] = True
    return _dataset(table[~is_test]), _dataset(table[is_test])


def _dataset(rows: np.ndarray) -> Dataset:
    images = torch.from_numpy(rows[:, :-1].reshape(-1, 1, 8, 8).copy())
    return Dataset(images, torch.from_numpy(rows[:, -1].astype(np.int64)))
