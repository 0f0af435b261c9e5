"""CIFAR-10: ten kinds of things in 32x32 colour images.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from jwins.tasks.base import Dataset, Task
from jwins.tasks.parquet import decode_images, labels_of
from jwins.tasks.source import decoded_once, hub_files

_REPO = "uoft-cs/cifar10"
_CLASSES = 10


class Cifar10(Task):
    """50,000 training and 10,000 test images, divided by shards or Dirichlet shares of the ten labels.

    The model is the GN-LeNet of Hsieh, Phanishayee, Mutlu, Gibbons, "The Non-IID Data Quagmire of Decentralized
    Machine Learning", ICML 2020, as wide as in the paper's experiments: 89,834 parameters.

    Args:
        data: folder with ``train-*.parquet`` and ``test-*.parquet`` of ``uoft-cs/cifar10`` (columns ``img``,
            ``label``); None downloads them once.

    Raises:
        DataError: no data, or data of another schema.
    """

    def __init__(self, *, data: Path | None = None) -> None:
        self.name = "cifar10"
        files = hub_files(self.name, _REPO, data, ("train", "test"))
        tensors = decoded_once(self.name, files, None, lambda: _read(files))
        self.train = Dataset(tensors["train_images"], tensors["train_labels"])
        self.test = Dataset(tensors["test_images"], tensors["test_labels"])

    def model(self) -> nn.Module:
        """Make a GN-LeNet."""
        return nn.Sequential(
            *(nn.Conv2d(3, 32, 5, padding=2), nn.GroupNorm(2, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 5, padding=2), nn.GroupNorm(2, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.GroupNorm(2, 64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, _CLASSES)),
        )

    def prepare(self, inputs: Tensor) -> Tensor:
        """Convert (B, 3, 32, 32) uint8 to float32 in [-1, 1], channels last for fast convolutions."""
        return inputs.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _read(files: Mapping[str, Sequence[Path]]) -> dict[str, Tensor]:
    labels = {split: labels_of("cifar10", files[split], "label", _CLASSES) for split in ("train", "test")}
    together = [file for split in labels for file in files[split]]
    rows = np.arange(sum(len(own) for own in labels.values()))
    images = decode_images("cifar10", together, "img", rows, mode="RGB", size=(32, 32))
    count = len(labels["train"])
    tensors = {f"{split}_labels": own for split, own in labels.items()}
    return tensors | {"train_images": images[:count].clone(), "test_images": images[count:].clone()}
