"""Shakespeare: the next character of a speech, by speaking role.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
2017; Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018, arXiv 1812.01097.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from jwins.errors import ConfigError, DataError
from jwins.tasks.base import Dataset, Task
from jwins.tasks.parquet import read_rows
from jwins.tasks.plays import CLASSES, codes, read_plays, speeches
from jwins.tasks.source import (
    chosen_keys,
    decoded_once,
    hub_files,
    key_numbers,
    refuse_copies,
    refuse_repeats,
    split_within_keys,
)

_REPO = "flwrlabs/shakespeare"
_LENGTH = 80
"""Length of the model's input in characters, as in LEAF."""

_SCHEMA = f"x of {_LENGTH} characters and y of one"
_TEST_FRACTION = 0.1


class NextCharacter(nn.Module):
    """An embedding of 8, two stacked LSTM layers of 256 units, and a linear layer on the last state."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.linear = nn.Linear(256, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, 80) int64 characters to (B, classes) logits of the next one."""
        states, _ = self.lstm(self.embedding(inputs))
        logits: Tensor = self.linear(states[:, -1])
        return logits


class Shakespeare(Task):
    """Sequences of 80 characters and the next one, divided by speaking role.

    The last 10 % of a role's sequences are for testing. The characters to predict there come after the training
    text, and no training sequence contains one. The model is LEAF's; with this alphabet of 97 it has 824,425
    parameters.

    Args:
        data: a plain text of plays, in which a line ``NAME:`` after an empty line starts a speech; or a folder
            of such ``*.txt``, where equal names in different files are different roles; or a folder with
            ``train-*.parquet`` of ``flwrlabs/shakespeare`` (columns ``character_id``, ``x``, ``y``). None
            downloads the last.
        roles: number of roles, drawn once with a fixed seed; None uses all with more than 80
            characters.
        stride: use every stride-th sequence of a role's text; 1 uses all.

    Raises:
        ConfigError: more roles than the data have, or a stride below 1.
        DataError: no data, or data of another schema.
    """

    def __init__(self, *, data: Path | None = None, roles: int | None = None, stride: int = 1) -> None:
        if stride < 1:
            raise ConfigError("task.options.stride", stride, "expected at least 1")
        self.name = "shakespeare"
        texts = _texts(data)
        if texts is not None:
            tensors = _windows(speeches(self.name, read_plays(self.name, texts), texts), roles, stride)
        else:
            files = hub_files(self.name, _REPO, data, ("train",))
            tensors = decoded_once(
                self.name, files, (roles, stride), lambda: _sequences(files["train"], roles, stride)
            )
        self.train = _dataset(tensors, "train")
        self.test = _dataset(tensors, "test")
        if not len(self.train) or not len(self.test):
            raise DataError(
                f"shakespeare: no role has enough text for sequences of {_LENGTH} characters and a test; use "
                f"a longer text"
            )

    def model(self) -> nn.Module:
        """Make a stacked LSTM."""
        return NextCharacter(CLASSES)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Convert (B, 80) uint8 to int64."""
        return inputs.long()


def _dataset(tensors: Mapping[str, Tensor], split: str) -> Dataset:
    inputs, targets, keys = (tensors[f"{split}_{field}"] for field in ("inputs", "targets", "keys"))
    return Dataset(inputs, targets, keys.numpy())


def _texts(data: Path | None) -> list[Path] | None:
    """Return files of plays, or None if the data are parquet."""
    if data is None:
        return None
    if data.is_file():
        return [data]
    if any(data.rglob("train*.parquet")):
        return None
    texts = [path for path in sorted(data.rglob("*.txt")) if not path.stem.lower().startswith("readme")]
    refuse_copies("shakespeare", texts)
    if not texts:
        raise DataError(
            f"shakespeare: {data} has neither *.txt nor train-*.parquet; put a plain text of plays there, in "
            f"which a line NAME: starts a speech, or the files of https://huggingface.co/datasets/{_REPO}"
        )
    return texts


def _windows(of_roles: Sequence[str], roles: int | None, stride: int) -> dict[str, Tensor]:
    texts = [codes(speech) for speech in of_roles if len(speech) > _LENGTH]
    chosen = chosen_keys("shakespeare", "roles", np.arange(len(texts)), roles)
    windows, keys = [np.empty((0, _LENGTH + 1), dtype=np.uint8)], [np.empty(0, dtype=np.int64)]
    for role in chosen:
        windows.append(np.lib.stride_tricks.sliding_window_view(texts[role], _LENGTH + 1)[::stride])
        keys.append(np.full(len(windows[-1]), role))
    return _divided(np.concatenate(windows), np.concatenate(keys))


def _sequences(files: Sequence[Path], roles: int | None, stride: int) -> dict[str, Tensor]:
    names: list[str] = []
    windows = [np.empty((0, _LENGTH + 1), dtype=np.uint8)]
    hashes: dict[Path, list[int]] = {file: [] for file in files}
    for rows in read_rows("shakespeare", files, ("character_id", "x", "y")):
        x = rows.cells("x", lambda c: isinstance(c, str) and len(c) == _LENGTH, _SCHEMA)
        y = rows.cells("y", lambda c: isinstance(c, str) and len(c) == 1, _SCHEMA)
        names += rows.owners("character_id", names)
        texts = list(map(str.__add__, x, y))
        hashes[rows.file] += map(hash, texts)
        windows.append(codes("".join(texts)).reshape(-1, _LENGTH + 1))
    refuse_repeats("shakespeare", hashes)
    keys = key_numbers(names)
    kept = chosen_keys("shakespeare", "roles", keys, roles)
    kept = kept[np.argsort(keys[kept], kind="stable")]
    _, starts, counts = np.unique(keys[kept], return_index=True, return_counts=True)
    kept = kept[(np.arange(len(kept)) - np.repeat(starts, counts)) % stride == 0]
    return _divided(np.concatenate(windows)[kept], keys[kept])


def _divided(windows: npt.NDArray[np.uint8], keys: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    tensors = {}
    rows_of = split_within_keys("shakespeare", keys, _TEST_FRACTION, last=True)
    for split, rows in zip(("train", "test"), rows_of, strict=True):
        tensors[f"{split}_inputs"] = torch.from_numpy(windows[rows, :-1])
        tensors[f"{split}_targets"] = torch.from_numpy(windows[rows, -1].astype(np.int64))
        tensors[f"{split}_keys"] = torch.from_numpy(keys[rows])
    return tensors
