"""Rows of the hub's parquet files: checked cells, labels, owners and images."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jwins.errors import DataError
from jwins.tasks.base import Dataset
from jwins.tasks.source import chosen_keys, decoded_once, key_numbers, refuse_repeats, split_within_keys

_INT64 = range(-(2**63), 2**63)

_BATCH_ROWS = 2048
"""Number of rows in memory at a time: some MB of encoded images."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a parquet file.

    Attributes:
        first: index of the first row in the file, from 0.
        columns: the cells, by column.
    """

    task: str
    file: Path
    first: int
    columns: Mapping[str, list[Any]]

    def cells(self, column: str, fits: Callable[[Any], bool], expected: str) -> list[Any]:
        """Return the cells of a column after checking their type and range.

        Raises:
            DataError: a cell is wrong; the message names file, column and row.
        """
        cells = self.columns[column]
        for row, cell in enumerate(cells):
            if not fits(cell):
                raise DataError(f"{self.place(column, row)}: {_shown(cell)}; expected {expected}")
        return cells

    def owners(self, column: str, before: Sequence[Any]) -> list[Any]:
        """Return the cells of a column of owners, which must be all text or all whole numbers.

        Raises:
            DataError: a cell is neither, or of another kind than those before.
        """
        kind = type(before[0]) if before else type(next(iter(self.columns[column]), None))
        if kind is int:
            return self.cells(column, lambda c: type(c) is int and c in _INT64, "a whole number of 64 bits")
        return self.cells(
            column, lambda c: type(c) is str and c != "", "a name, as text or as a whole number, in all files"
        )

    def place(self, column: str, row: int) -> str:
        """Return file, column and row for messages; ``row`` counts from the first of these rows."""
        return f"{self.task}: {self.file}, column {column!r}, row {self.first + row} (the first is 0)"


def _shown(cell: object) -> str:
    if cell is None:
        return "the cell is empty"
    if isinstance(cell, bytes | bytearray):
        return f"plain bytes, {len(cell)} of them"
    text = repr(cell)
    return f"{type(cell).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def read_rows(task: str, files: Sequence[Path], columns: Sequence[str]) -> Iterator[Rows]:
    """Read rows of parquet files, some thousands at a time.

    Raises:
        DataError: a file is damaged, lacks a column, or holds a cell that cannot be read.
    """
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{task}: reading parquet needs an extra: pip install 'jwins[hf]'") from error
    for file in files:
        try:
            with parquet.ParquetFile(file) as opened:
                present = opened.schema_arrow.names
                absent = [column for column in columns if column not in present]
                if absent:
                    raise DataError(f"{task}: {file} has no column {absent[0]!r}, only {', '.join(present)}")
                first = 0
                for batch in opened.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                    rows = Rows(task, file, first, {name: [] for name in columns})
                    for name in columns:
                        _fill(rows, name, batch.column(batch.schema.names.index(name)))
                    yield rows
                    first += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{task}: {file} cannot be read as parquet ({error}); download it again") from error


def _fill(rows: Rows, column: str, cells: Any) -> None:
    try:
        rows.columns[column].extend(cells.to_pylist())
    except Exception as error:  # text that is not UTF-8, dates beyond Python's range, and more
        for row, cell in enumerate(cells):
            try:
                cell.as_py()
            except Exception:
                place = rows.place(column, row)
                raise DataError(f"{place}: a {cell.type} that cannot be read ({error})") from error
        raise


def decode_images(
    task: str,
    files: Sequence[Path],
    column: str,
    rows: npt.NDArray[np.int64],
    *,
    mode: str,
    size: tuple[int, int],
) -> Tensor:
    """Decode images of parquet files into one tensor.

    Args:
        task: the task's name, for messages.
        files: parquet files whose ``column`` holds ``{"bytes": ..., "path": ...}``, as the hub stores images.
        column: the column's name.
        rows: (n,) increasing row numbers, counted through all files.
        mode: ``"RGB"`` or ``"L"`` (grey).
        size: (height, width); other images are resized (bicubic).

    Returns:
        (n, 3 or 1, height, width) uint8.

    Raises:
        DataError: a file is damaged, lacks the column, or holds an image that cannot be decoded; or two files
            have the same images.
    """
    height, width = size
    hashes: dict[Path, list[int]] = {file: [] for file in files}
    images = np.empty((len(rows), len(mode), height, width), dtype=np.uint8)
    first = 0
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        for batch in read_rows(task, files, (column,)):
            cells = batch.cells(column, _is_image, 'an image, {"bytes": ..., "path": ...} as the hub stores it')
            lo, hi = np.searchsorted(rows, (first, first + len(cells)))
            wanted = [(batch.place(column, row), cells[row]) for row in (rows[lo:hi] - first).tolist()]
            for number, pixels in enumerate(
                pool.map(lambda found: decode_image(found[0], found[1], mode, width, height), wanted), lo
            ):
                images[number] = pixels
                hashes[batch.file].append(hash(images[number].tobytes()))
            first += len(cells)
    refuse_repeats(task, hashes)
    return torch.from_numpy(images)


def _is_image(cell: object) -> bool:
    return isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes)


def decode_image(place: str, cell: Any, mode: str, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Decode an image file.

    Args:
        place: place of the cell, for errors.
        cell: cell of a column of images, ``{"bytes": ...}``.
        mode: Pillow's mode, "RGB" or "L".
        width: width in pixels; an image of another size is resized (bicubic).
        height: height in pixels.

    Returns:
        (3 or 1, height, width) uint8.

    Raises:
        DataError: Pillow is missing, or cannot decode the image.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{place}: decoding images needs an extra: pip install 'jwins[hf]'") from error
    try:
        with Image.open(io.BytesIO(cell["bytes"])) as opened:
            image = opened.convert(mode)
            if image.size != (width, height):
                image = image.resize((width, height))
            return np.asarray(image, dtype=np.uint8).reshape(height, width, len(mode)).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises SyntaxError for a file that is not a PNG, and many other errors
        raise DataError(f"{place}: an image cannot be decoded ({error}); download the files again") from error


def labels_of(task: str, files: Sequence[Path], column: str, num_classes: int) -> Tensor:
    """Read a column of class labels, (n,) int64.

    Raises:
        DataError: no labels, or one is not in range(num_classes).
    """
    expected = f"rows whose {column!r} is 0 to {num_classes - 1}"
    labels: list[int] = []
    for batch in read_rows(task, files, (column,)):
        labels += batch.cells(column, lambda c: isinstance(c, int) and 0 <= c < num_classes, expected)
    if not labels:
        raise DataError(f"{task}: {files[0].parent} holds no samples; expected {expected}")
    return torch.tensor(labels, dtype=torch.int64)


def images_by_owner(
    task: str,
    files: Mapping[str, Sequence[Path]],
    *,
    owner: str,
    label: str,
    num_classes: int,
    option: str,
    count: int | None,
    mode: str,
    size: tuple[int, int],
) -> tuple[Dataset, Dataset]:
    """Read labelled images of some owners once; 10 % of each owner's images are for testing, as in LEAF.

    Args:
        task: the task's name.
        files: parquet files with a column ``image`` and the next two, by published split; all are joined.
        owner: column of the owners.
        label: column of the labels.
        num_classes: number of labels.
        option: name of ``count`` in ``task.options``.
        count: number of owners to keep, or None for all.
        mode: see :func:`decode_images`.
        size: see :func:`decode_images`.

    Returns:
        Training and test samples.

    Raises:
        DataError: no test samples.
    """

    def read() -> dict[str, Tensor]:
        together = [file for split in files.values() for file in split]
        labels = labels_of(task, together, label, num_classes)
        owners: list[Any] = []
        for batch in read_rows(task, together, (owner,)):
            owners += batch.owners(owner, owners)
        keys = key_numbers(owners)
        kept = chosen_keys(task, option, keys, count)
        tensors = {}
        for split, chosen in zip(("train", "test"), split_within_keys(task, keys[kept], 0.1), strict=True):
            rows = kept[chosen]
            tensors[f"{split}_images"] = decode_images(task, together, "image", rows, mode=mode, size=size)
            tensors[f"{split}_labels"] = labels[torch.from_numpy(rows)]
            tensors[f"{split}_keys"] = torch.from_numpy(keys[rows])
        return tensors

    tensors = decoded_once(task, files, count, read)
    train, test = (
        Dataset(tensors[f"{split}_images"], tensors[f"{split}_labels"], tensors[f"{split}_keys"])
        for split in ("train", "test")
    )
    if not len(test):
        raise DataError(
            f"{task}: every owner has fewer than six images, so 10 % for testing is no image; use the "
            "complete data set"
        )
    return train, test
