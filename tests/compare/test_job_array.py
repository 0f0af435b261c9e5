"""Runs of a comparison one at a time, and the script that has a cluster do so."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jwins.cli import app
from jwins.compare import compare
from jwins.compare.comparison import Comparison, load_comparison
from jwins.compare.job_array import array_script, run_cell
from jwins.errors import ConfigError, UsageError
from jwins.run_folder.record import Record

FILE = """
name = "tiny"
base = "digits"
[nodes]
count = 4
[topology]
kind = "ring"
[train]
batching = "loop"
[run]
rounds = 4
eval_every = 2
[compare]
seeds = [1, 2]
target = { accuracy = 0.15 }
folder = "FOLDER"
[[variants]]
name = "full sharing"
sharing = { kind = "full" }
[[variants]]
name = "JWINS"
"""


def comparison(tmp_path: Path, name: str, extra: str = "", *overrides: str) -> Comparison:
    path = tmp_path / "tiny.toml"
    path.write_text(FILE.replace("FOLDER", str(tmp_path / name)) + extra)
    return load_comparison(path, overrides)


def nothing(progress: Any) -> None:
    pass


def listed(script: str) -> list[str]:
    """The folders that a script's tasks run."""
    return shlex.split(script.partition("cells=(\n")[2].partition("\n)\n")[0])


def test_cells_one_at_a_time_make_the_same_comparison(tmp_path: Path) -> None:
    whole = compare(comparison(tmp_path, "whole"), jobs=1)
    apart = comparison(tmp_path, "apart")
    script = array_script(apart, ["jwins", "compare", "my tiny.toml"])
    assert listed(script) == ["full-sharing/seed-1", "jwins/seed-1", "full-sharing/seed-2", "jwins/seed-2"]
    assert "#SBATCH --array=0-3\n" in script
    assert "exec srun jwins compare 'my tiny.toml' --cell " in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)

    assert run_cell(apart, "full-sharing/seed-2", nothing) == "finished"
    assert run_cell(apart, "0", nothing) == "finished"
    assert listed(array_script(apart, ["jwins"])) == ["jwins/seed-1", "jwins/seed-2"]
    for folder in listed(script):
        told: list[Any] = []
        assert run_cell(apart, folder, told.append) == "finished"
        assert told[-1].status == "finished"
    with pytest.raises(UsageError, match="all runs have ended; make the tables with `--report-only`"):
        array_script(apart, ["jwins"])

    gathered = compare(apart, jobs=1)
    assert gathered.table == whole.table
    for folder in listed(script):
        ends = [Record.read(tmp_path / name / folder).end for name in ("whole", "apart")]
        assert ends[0] is not None
        assert ends[1] is not None
        assert ends[0].sha256 == ends[1].sha256


def test_the_next_stage_of_tuning_has_a_script_of_its_own(tmp_path: Path) -> None:
    tuned = comparison(
        tmp_path, "tuned", "[tune]\nkey = 'train.optimizer.lr'\nvalues = [0.01, 0.1]\n", "run.rounds=2"
    )
    first = listed(array_script(tuned, ["jwins"]))
    assert first == ["full-sharing/tuning/lr=0.01/seed-101", "full-sharing/tuning/lr=0.1/seed-101"]
    with pytest.raises(ConfigError, match=r"--cell = 'jwins/seed-1': .*still being tuned"):
        run_cell(tuned, "jwins/seed-1", nothing)
    for folder in first:
        run_cell(tuned, folder, nothing)
    assert listed(array_script(tuned, ["jwins"]))[0] == "full-sharing/seed-1"


def test_a_cell_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for which in ("4", "-1", "jwins", "../x"):
        with pytest.raises(
            ConfigError, match=r"--cell = .*from 0 to 3, or a folder such as full-sharing/seed-1"
        ):
            run_cell(comparison(tmp_path, "out"), which, nothing)
    assert not (tmp_path / "out").exists()


def test_the_command_line_prints_the_script_and_runs_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison(tmp_path, "out")
    monkeypatch.chdir(tmp_path)
    given = ["compare", "tiny.toml", "--set", "run.rounds=2", "--seeds", "3", "--only", "JWINS"]
    printed = CliRunner().invoke(app, [*given, "--print-array"])
    assert printed.exit_code == 0
    assert listed(printed.stdout) == ["jwins/seed-3"]
    (line,) = re.findall(r"^exec srun (.*) --cell ", printed.stdout, re.MULTILINE)
    again = CliRunner().invoke(app, [*shlex.split(line)[1:], "--cell", "jwins/seed-3"])
    assert again.exit_code == 0, again.output
    assert "JWINS, seed 3: finished, round 2 of 2" in again.stdout
    both = CliRunner().invoke(app, [*given, "--print-array", "--cell", "0"])
    assert both.exit_code == 2
    assert "--cell and --print-array exclude each other" in both.output
