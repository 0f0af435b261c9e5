"""CelebA: smiling or not, by celebrity.

Source: Liu, Luo, Wang, Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015; as a task by owner:
Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018, arXiv 1812.01097.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from jwins.tasks.base import Task
from jwins.tasks.parquet import images_by_owner
from jwins.tasks.source import hub_files

_REPO = "flwrlabs/celeba"
_SPLITS = ("train", "valid", "test")
_SIZE = 84


class Celeba(Task):
    """Two classes of 84x84 colour images, divided by celebrity.

    The published splits have different celebrities. As in LEAF they are joined, and 10 % of each celebrity's
    images are for testing, drawn once with a fixed seed. The model is the CNN of LEAF in the variant of the
    paper's experiments, four 3x3 convolutions of 32 channels and one linear layer: 30,242 parameters.

    Args:
        data: folder with ``train-*``, ``valid-*`` and ``test-*.parquet`` of ``flwrlabs/celeba`` (columns
            ``image``, ``celeb_id``, ``Smiling``); None downloads them once.
        celebrities: number of celebrities, drawn once with a fixed seed; None uses all 10,177, which take
            4.3 GB of memory.

    Raises:
        ConfigError: more celebrities than the data have.
        DataError: no data, or data of another schema.
    """

    def __init__(self, *, data: Path | None = None, celebrities: int | None = None) -> None:
        self.name = "celeba"
        files = hub_files(self.name, _REPO, data, _SPLITS)
        self.train, self.test = images_by_owner(
            self.name,
            files,
            owner="celeb_id",
            label="Smiling",  # stored as a bool, which is 0 or 1
            num_classes=2,
            option="celebrities",
            count=celebrities,
            mode="RGB",
            size=(_SIZE, _SIZE),
        )

    def model(self) -> nn.Module:
        """Make a LEAF CNN; pooling reduces the side from 84 to 42, 21, 10 and 5 pixels."""
        return nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 5 * 5, 2)),
        )

    def prepare(self, inputs: Tensor) -> Tensor:
        """Convert (B, 3, 84, 84) uint8 to float32 in [-1, 1]."""
        return inputs.float() / 127.5 - 1.0
