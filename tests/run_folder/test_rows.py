"""Rows survive the log, a killed run's half line does no harm, and resuming cuts where the checkpoint says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from jwins.errors import DataError
from jwins.run_folder.rows import (
    EndRow,
    EvalRow,
    MetricsLog,
    Row,
    Spread,
    StartRow,
    Traffic,
    TrafficSplit,
    read_rows,
)

START = StartRow(
    name="digits ☃",
    digest="00ff",
    seed=-(2**63),
    num_nodes=2,
    dim=3,
    neighbours_mean=1.0,
    versions={"torch": "2.6"},
    machine={"processor": "x"},
    fingerprints={"model": "ab"},
    batching="loop",
)


def evaluation(round: int, **more: Any) -> EvalRow:
    fields: dict[str, Any] = {
        "round": round,
        "time_s": 0.1 * round,
        "nodes": [0, 1],
        "metrics": {"accuracy": Spread(0.5, 0.1, 0.4, 0.6, 0.7), "loss": Spread(None, None, 1.0, None)},
        "per_node": {"accuracy": [0.4, 0.6], "loss": [1.0, None]},
        "train_loss": None if round == 0 else 1.5,
        "consensus_distance": 0.25,
        "traffic": TrafficSplit(1, 2, 3, 4, 2**40),
        "samples": 360,
    }
    return EvalRow(**fields | more)


END = EndRow(
    status="diverged",
    round=3,
    time_s=1.5,
    reason="node 1, round 3: …",
    sha256="cd",
    traffic=[Traffic(0, 1, TrafficSplit(5, 4, 3, 2, 1)), Traffic(1, 0, TrafficSplit())],
    wall_s={"total": 0.5},
)
ROWS: list[Row] = [START, evaluation(0), evaluation(1, early={"accuracy": 0.25, "loss": None}), END]


def write(path: Path, rows: list[Row] = ROWS) -> list[int]:
    """Lengths of the file after each row."""
    sizes = []
    with MetricsLog(path) as log:
        for row in rows:
            log.append(row)
            sizes.append(log.size_bytes)
    return sizes


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sizes = write(path)
    assert list(read_rows(path)) == ROWS
    assert sizes[-1] == path.stat().st_size
    lines = path.read_bytes().splitlines()
    assert len(lines) == len(ROWS)
    assert [msgspec.json.decode(line)["kind"] for line in lines] == ["start", "eval", "eval", "end"]
    assert ["early" in msgspec.json.decode(line) for line in lines] == [False, False, True, False]


def test_rows_are_on_the_file_as_soon_as_they_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for count, row in enumerate(ROWS, start=1):
            log.append(row)
            assert len(list(read_rows(path))) == count
        log.sync()


def test_floats_keep_all_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = evaluation(1, time_s=0.1 + 0.2, consensus_distance=5e-324, train_loss=1.7976931348623157e308)
    write(path, [row])
    assert list(read_rows(path)) == [row]


def test_every_truncation_loses_only_the_last_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sizes = write(path)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        assert list(read_rows(path)) == ROWS[: sum(size <= length for size in sizes)]


@pytest.mark.parametrize("line", [b"{}", b"garbage", b'{"kind":"eval"}', b'{"kind":"other"}', b"", b"\xff\xfe"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS[:2])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 3: not a metrics row"):
        list(read_rows(path))


def test_unknown_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [START])
    path.write_bytes(path.read_bytes().replace(b'{"kind"', b'{"more":1,"kind"'))
    assert list(read_rows(path)) == [START]


# --- Resuming -------------------------------------------------------------------------------------------------


def test_resuming_goes_on_where_the_checkpoint_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sizes = write(path)
    expected = path.read_bytes()
    for kept, size in enumerate([0, *sizes]):
        path.write_bytes(expected + b'{"half')
        with MetricsLog(path, keep_bytes=size) as log:
            assert log.size_bytes == size
            for row in ROWS[kept:]:
                log.append(row)
        assert path.read_bytes() == expected


def test_a_log_that_is_shorter_than_the_checkpoint_remembers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    (size,) = write(path, [START])
    with pytest.raises(DataError, match=f"{size} bytes, but the checkpoint needs the first {size + 1}"):
        MetricsLog(path, keep_bytes=size + 1)
    assert list(read_rows(path)) == [START]


def test_a_half_written_row_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS[:2])
    for half in (b'{"kind":"ev', b"x" * 100_000):
        path.write_bytes(path.read_bytes() + half)
        write(path, [])
        assert list(read_rows(path)) == ROWS[:2]
    write(path, ROWS[2:])
    assert list(read_rows(path)) == ROWS


def test_a_file_of_half_a_row_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind"')
    write(path)
    assert list(read_rows(path)) == ROWS


# --- Numbers --------------------------------------------------------------------------------------------------


def test_traffic_adds_up() -> None:
    a, b = TrafficSplit(1, 2, 3, 4, 5), TrafficSplit(10, 20, 30, 40, 50)
    assert a + b == TrafficSplit(11, 22, 33, 44, 55)
    assert (a + b).total == a.total + b.total == 165
    assert TrafficSplit().total == 0


def test_rows_cannot_be_changed() -> None:
    for row in (*ROWS, TrafficSplit(), Spread(1, 1, 1, 1)):
        with pytest.raises(AttributeError):
            setattr(row, row.__struct_fields__[0], 1)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_json_cannot_say_never_reaches_the_file(tmp_path: Path, number: float) -> None:
    """It would be written as null, and the whole file could not be read any more."""
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(START)
        log.append(evaluation(1, train_loss=number))
        log.append(evaluation(2, consensus_distance=number))
    first, second, third = read_rows(path)
    assert first == START
    assert isinstance(second, EvalRow)
    assert second.train_loss is None
    assert isinstance(third, EvalRow)
    assert third.consensus_distance is None
