"""FEMNIST: handwritten digits and letters by writer.

Source: Caldas, Duddu, Wu, Li, Konecny, McMahan, Smith, Talwalkar, "LEAF: A Benchmark for Federated Settings",
2018, arXiv 1812.01097; Cohen, Afshar, Tapson, van Schaik, "EMNIST", 2017.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from jwins.tasks.base import Task
from jwins.tasks.parquet import images_by_owner
from jwins.tasks.source import hub_files

_REPO = "flwrlabs/femnist"
_CLASSES = 62


class Femnist(Task):
    """62 characters in 28x28 grey images, divided by writer.

    10 % of each writer's images are for testing, drawn once with a fixed seed. The model is the CNN of LEAF,
    two 5x5 convolutions of 32 and 64 channels and a hidden layer of 512: 1,690,046 parameters.

    Args:
        data: folder with ``train-*.parquet`` of ``flwrlabs/femnist`` (columns ``image``, ``writer_id``,
            ``character``); None downloads it once.
        writers: number of writers, drawn once with a fixed seed; None uses all.

    Raises:
        ConfigError: more writers than the data have.
        DataError: no data, or data of another schema.
    """

    def __init__(self, *, data: Path | None = None, writers: int | None = None) -> None:
        self.name = "femnist"
        files = hub_files(self.name, _REPO, data, ("train",))
        self.train, self.test = images_by_owner(
            self.name,
            files,
            owner="writer_id",
            label="character",
            num_classes=_CLASSES,
            option="writers",
            count=writers,
            mode="L",
            size=(28, 28),
        )

    def model(self) -> nn.Module:
        """Make a LEAF CNN."""
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(), nn.Linear(512, _CLASSES)),
        )

    def prepare(self, inputs: Tensor) -> Tensor:
        """Convert (B, 1, 28, 28) uint8 to float32 in [-1, 1]."""
        return inputs.float() / 127.5 - 1.0
