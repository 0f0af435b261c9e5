"""CIFAR-10 as a task of one's own: parquet files read through Hugging Face `datasets`, and a GN-LeNet.

The package has a workload `cifar10` as well, which keeps decoded images. This file shows how little a task
takes, and that any data set of the hub can be one. It needs `pip install 'jwins[hf]'` and a folder with
`train-*.parquet` and `test-*.parquet` of `uoft-cs/cifar10`, named by `--data` or `task.data`.
"""

import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from jwins.tasks import Dataset, Task


class Cifar10(Task):
    """50,000 training and 10,000 test images of 3 x 32 x 32 pixels in ten classes."""

    def __init__(self, *, data: Path) -> None:
        self.name = "cifar10"
        self.train = read(data, "train")
        self.test = read(data, "test")

    def model(self) -> nn.Module:
        """GN-LeNet with 89,834 parameters (Hsieh et al., ICML 2020)."""
        return nn.Sequential(
            *(nn.Conv2d(3, 32, 5, padding=2), nn.GroupNorm(2, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 5, padding=2), nn.GroupNorm(2, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.GroupNorm(2, 64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10)),
        )

    def prepare(self, inputs: Tensor) -> Tensor:
        """Bytes to numbers in [-1, 1]."""
        return inputs.float() / 127.5 - 1.0


def read(folder: Path, split: str) -> Dataset:
    """All images of a split, held once as bytes."""
    files = sorted(str(path) for path in folder.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} has no {split}-*.parquet; get them from the hub's uoft-cs/cifar10")
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        rows = rows.cast_column("img", datasets.Image(mode="RGB"))
        images = np.stack([np.asarray(image) for image in rows["img"]]).transpose(0, 3, 1, 2)
        labels = torch.as_tensor(rows["label"][:])
    return Dataset(torch.from_numpy(np.ascontiguousarray(images)), labels)
