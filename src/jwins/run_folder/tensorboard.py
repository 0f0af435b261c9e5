"""Evaluations as TensorBoard event files; needs the extra ``tensorboard``.

Event files have the content of ``metrics.jsonl`` and nothing else. A run that continues does not append to its
event files. They are written again from the measurements, so no step occurs twice.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from jwins.errors import ConfigError
from jwins.run_folder.rows import EvalRow, read_rows

FOLDER = "tensorboard"
"""Folder of the event files within the run folder."""


class TensorBoard:
    """Event files of one run; steps are completed rounds.

    Args:
        folder: the run folder; earlier event files in its ``tensorboard`` are replaced at the first row.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            problem = 'TensorBoard is not installed; pip install "jwins[tensorboard]", or leave it out'
            raise ConfigError("run.tensorboard", True, problem) from error
        self._make: Any = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def add(self, row: EvalRow) -> None:
        """Write one evaluation; the first call also writes all earlier ones of ``metrics.jsonl``."""
        if self._writer is None:
            self.replay(before=row.round)
        self._write(row)
        self._writer.flush()

    def replay(self, before: float = math.inf) -> None:
        """Write the evaluations of ``metrics.jsonl`` after fewer than ``before`` rounds in new files."""
        self.close()
        place = self._folder / FOLDER
        shutil.rmtree(place, ignore_errors=True)
        self._writer = self._make(log_dir=str(place))
        for row in _evaluations(self._folder):
            if row.round < before:
                self._write(row)

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, row: EvalRow) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, global_step=row.round)


def scalars(row: EvalRow) -> dict[str, float]:
    """Return the scalars of an evaluation by TensorBoard tag, without those that are not finite."""
    found: dict[str, float | None] = {}
    for metric, spread in row.metrics.items():
        for field in ("mean", "min", "max", "average_model"):
            found[f"{metric}/{field}"] = getattr(spread, field)
    found["train/loss"] = row.train_loss
    found["train/consensus_distance"] = row.consensus_distance
    found["train/epsilon"] = row.epsilon
    found["time/virtual_s"] = row.time_s
    found["bytes/total"] = row.traffic.total
    found |= {f"bytes/{kind}": size_bytes for kind, size_bytes in row.traffic.by_kind().items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _evaluations(folder: Path) -> list[EvalRow]:
    path = folder / "metrics.jsonl"
    return [row for row in read_rows(path) if isinstance(row, EvalRow)] if path.is_file() else []
