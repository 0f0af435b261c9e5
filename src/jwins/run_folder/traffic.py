"""File of bytes by directed edge: one line for each pair of nodes that exchanged messages."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from jwins.errors import DataError
from jwins.run_folder.archive import is_file, open_file
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.rows import Traffic, TrafficSplit

FILE = "traffic.csv"
_HEAD = ["source", "target", *TrafficSplit.KINDS]


def write(folder: Path, edges: Sequence[Traffic]) -> Path:
    """Write ``folder/traffic.csv`` atomically.

    Raises:
        OSError: e.g. a full disk.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_HEAD)
    table.writerows([edge.source, edge.target, *edge.bytes.by_kind().values()] for edge in edges)
    write_atomically(folder / FILE, text.getvalue().encode())
    return folder / FILE


def read(folder: Path) -> list[Traffic] | None:
    """Read the edges of a run, in the order of (source, target); None if the file does not exist.

    Raises:
        DataError: the file has another format or is damaged.
    """
    path = folder / FILE
    if not is_file(path):
        return None
    with io.TextIOWrapper(open_file(path), encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if not lines or lines[0] != _HEAD:
        raise DataError(f"{path}: does not begin with {','.join(_HEAD)}")
    edges = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            source, target, *sent = map(int, line)
            if len(sent) != len(TrafficSplit.KINDS):
                raise ValueError(f"expected {2 + len(TrafficSplit.KINDS)} numbers, found {len(line)}")
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not an edge ({error})") from None
        edges.append(Traffic(source, target, TrafficSplit(*sent)))
    return edges
