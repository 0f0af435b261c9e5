"""The closed loop on a transformer with the cosines of each matrix, and with a step for each tensor.

``.venv/bin/python experiments/gpt_transforms.py`` takes the settings of ``gpt-budgets.toml`` and prints loss
and bits of each transform. A run takes about two minutes of one core; its folder is removed at the end.
"""

import math
import tempfile
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import jwins
from jwins.sharing import closed_loop
from jwins.tasks.gpt import Gpt

SETTINGS = tomllib.loads(Path(__file__).with_name("gpt-budgets.toml").read_text(encoding="utf-8"))
SHAPES = [tuple(p.shape) for p in Gpt(**SETTINGS["task"]["options"]).model().parameters()]
LENGTHS = tuple(math.prod(shape) for shape in SHAPES)
CHANGES = (76, 78, 95, 80, 61, 47, 56, 52, 45, 66, 66, 60, 46, 46, 79)
"""Root mean square of each tensor's change by training in round 15 at one node, in 1e-4."""


def cosines(size: int) -> Tensor:
    """Return the orthonormal cosine transform of ``size`` numbers, (size, size)."""
    place = torch.arange(size, dtype=torch.float64)
    frequency = place[:, None]
    matrix = torch.cos(math.pi * (2 * place + 1) * frequency / (2 * size)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


@dataclass(frozen=True)
class PerTensor:
    """Transform of each tensor by itself, with a subband for each.

    Attributes:
        kind: ``cosine`` transforms rows and columns of each matrix; ``scaled`` divides each tensor by its
            change, so that all have the same step in proportion to it; ``none`` changes nothing.
    """

    kind: Literal["cosine", "scaled", "none"]

    def size(self, num_params: int) -> int:
        """Return the number of coefficients."""
        return num_params

    def subbands(self, num_params: int) -> tuple[int, ...]:
        """Return the lengths of the tensors."""
        return LENGTHS

    def forward(self, change: Tensor) -> Tensor:
        """Return the coefficients (P,) of a change (P,)."""
        return torch.cat([self._tensor(i, part, False) for i, part in enumerate(change.split(LENGTHS))])

    def inverse(self, coefficients: Tensor, num_params: int) -> Tensor:
        """Return the change (P,) of coefficients (P,)."""
        return torch.cat([self._tensor(i, part, True) for i, part in enumerate(coefficients.split(LENGTHS))])

    def _tensor(self, number: int, part: Tensor, inverse: bool) -> Tensor:
        if self.kind == "scaled":
            factor = 60 / CHANGES[number]
            return part / factor if inverse else part * factor
        if self.kind == "none" or len(SHAPES[number]) < 2:
            return part
        rows, columns = (cosines(size) for size in SHAPES[number])
        if inverse:
            rows, columns = rows.T, columns.T
        return (rows @ part.view(SHAPES[number]) @ columns.T).reshape(-1)


if __name__ == "__main__":
    sections = {name: SETTINGS[name] for name in ("task", "nodes", "topology", "train", "run")}
    plain = closed_loop(budget=0.22, wavelet=None, gamma=0.5, residual_rate=0.3, dead_zone=1.2)
    for kind in ("scaled", "cosine"):
        with tempfile.TemporaryDirectory() as folder:
            algorithm = replace(plain, transform=PerTensor(kind))
            experiment = jwins.Experiment(name=kind, sharing=algorithm, **sections)
            result = jwins.simulate(experiment.changed({"run.folder": f"{folder}/run", "run.seed": 1}))
            bits = result.bits_per_step
            print(
                f"{kind}: loss {result.rows[-1]['loss_mean']:.4f}, {bits[0] if bits else 0.0:.5f} bits",
                flush=True,
            )
