"""A run folder that somebody else has prepared: with links, pipes and open permissions."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from jwins.net.driver import NodeProgress
from jwins.net.journal import Journal, write_journal
from jwins.net.status import StatusFile
from jwins.report.comparison_table import _write_csv
from jwins.run_folder import checkpoint
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.lock import locked
from jwins.run_folder.own_files import open_own, private_folder
from jwins.run_folder.rows import MetricsLog

PRECIOUS = b"what somebody wrote\n"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file outside the run folder."""
    path = tmp_path / "precious"
    path.write_bytes(PRECIOUS)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_the_lock_follows_no_link(folder: Path, precious: Path) -> None:
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(OSError, match="is a symbolic link"), locked(folder, "this run"):
        pass
    assert precious.read_bytes() == PRECIOUS


@pytest.mark.parametrize("keep_bytes", [None, 0])
def test_the_metrics_follow_no_link(folder: Path, precious: Path, keep_bytes: int | None) -> None:
    (folder / "metrics.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match="is a symbolic link"):
        MetricsLog(folder / "metrics.jsonl", keep_bytes=keep_bytes)
    assert precious.read_bytes() == PRECIOUS


def test_the_log_of_a_node_follows_no_link(folder: Path, precious: Path) -> None:
    (folder / "log.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match="is a symbolic link"), write_journal(folder / "log.jsonl"):
        pass
    assert precious.read_bytes() == PRECIOUS


def test_the_log_of_a_node_is_written_and_only_its_owner_reads_it(folder: Path) -> None:
    with write_journal(folder / "log.jsonl"):
        Journal("alice").info("started", rounds=3)
    assert '"event":"started","rounds":3' in (folder / "log.jsonl").read_text()
    assert not (folder / "log.jsonl").stat().st_mode & 0o077


def test_partial_files_follow_no_link_and_what_a_killed_process_left_is_replaced(
    folder: Path, precious: Path
) -> None:
    (folder / f".table.md.{os.getpid()}.partial").symlink_to(precious)
    (folder / "table.md").symlink_to(precious)
    write_atomically(folder / "table.md", b"new")
    assert (folder / "table.md").read_bytes() == b"new"
    assert not (folder / "table.md").is_symlink()
    assert precious.read_bytes() == PRECIOUS
    assert [path.name for path in folder.iterdir()] == ["table.md"]


def test_the_status_follows_no_link_and_only_its_owner_reads_it(folder: Path, precious: Path) -> None:
    (folder / "status.json").symlink_to(precious)
    StatusFile(folder / "status.json", ["a"])(NodeProgress(1, 2, 3.0, 4), "ended")
    assert precious.read_bytes() == PRECIOUS
    assert not (folder / "status.json").stat().st_mode & 0o077


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_nobody_waits_for_a_pipe(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    with pytest.raises(OSError, match="not a regular file"):
        open_own(folder / name)


def test_a_file_that_must_be_new_is(folder: Path) -> None:
    with open_own(folder / "a", new=True) as file:
        file.write(b"1")
    with pytest.raises(FileExistsError):
        open_own(folder / "a", new=True)


def test_checkpoints_are_their_owners_alone(folder: Path) -> None:
    checkpoint.write(folder / "checkpoints", 1, {"params": 1})
    assert stat.S_IMODE((folder / "checkpoints").stat().st_mode) == 0o700
    assert private_folder(folder / "new" / "models").stat().st_mode & 0o077 == 0


def test_cells_of_csv_that_begin_like_a_formula_are_text(folder: Path) -> None:
    names = ["=HYPERLINK(1)", "+1", "@a", "-x", "plain"]
    _write_csv(folder / "table.csv", [{"variant": name, "gain": -1.5} for name in names])
    lines = (folder / "table.csv").read_text().splitlines()
    assert lines == ["variant,gain", *(f"'{name},-1.5" for name in names[:4]), "plain,-1.5"]
