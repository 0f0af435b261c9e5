"""``jwins node`` and ``jwins launch`` as a script sees them."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from members import member, roster_of
from rich.console import Console
from typer.testing import CliRunner

from jwins.cli.app import app
from jwins.cli.node import _Lines
from jwins.experiment.load import load
from jwins.net.driver import NodeProgress, RealTimeDriver
from jwins.net.roster import write_roster
from jwins.run.node import run_node


def jwins(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_what_does_not_fit_is_said_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = jwins("node", "digits", "--as", "alice")
    assert code == 2
    assert "roster = 'roster.toml': cannot be read (No such file or directory); `jwins roster add`" in said
    write_roster(roster_of(tmp_path, 2), tmp_path / "roster.toml")
    code, said = jwins("node", "digits", "--as", "alice")
    assert code == 2
    assert "roster.members = 2: expected nodes.count = 16 members" in said
    code, said = jwins("node", "digits", "--as", "alex", "--set", "nodes.count=2")
    assert code == 2
    assert "NAME = 'alex': not in the roster" in said
    code, said = jwins("node", "digits", "--as", "alice", "--set", "nodes.count=2", "--bootstrap-from", "alice")
    assert code == 2
    assert "bootstrap_from = 'alice': expected other members" in said
    for command in (("node", "digits", "--as", "alice"), ("launch", "digits")):
        code, said = jwins(*command, "--neighbour-timeout", "0")
        assert code == 2
        assert "--neighbour-timeout = 0.0: expected a time in seconds" in said
    code, said = jwins("launch", "digits", "--set", "train.batching=stacked")
    assert code == 2
    assert "train.batching = 'stacked': a process holds one node" in said
    assert not (tmp_path / "runs").exists()


def test_members_that_cannot_dial_each_other_are_no_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    roster = roster_of(tmp_path, 2)
    hidden = tuple(member.model_copy(update={"reachable": False}) for member in roster.members)
    write_roster(roster.model_copy(update={"members": hidden}), tmp_path / "roster.toml")
    code, said = jwins(
        *(
            "node",
            "digits",
            "--as",
            "alice",
            "--set",
            "nodes.count=2",
            "--set",
            'topology.kind="fully_connected"',
        )
    )
    assert code == 2
    assert "makes alice and bob neighbours, and neither can be dialled" in said


def test_progress_has_the_name_of_a_member_that_joins(tmp_path: Path) -> None:
    roster = roster_of(tmp_path, 2).model_copy(update={"places": 3})
    file = tmp_path / "roster.toml"
    write_roster(roster, file)
    known: list[str] = []
    out = io.StringIO()

    def tell(now: NodeProgress, names: Sequence[str]) -> None:
        if not known:  # the node has begun, and waits for bob
            write_roster(roster.with_member(member(tmp_path, 2, "carol"), from_round=9), file)
        known[:] = names
        _Lines(Console(file=out, width=200))(dataclasses.replace(now, suspect=(2,)), names)

    experiment = load(
        "digits", ["nodes.count=3", "topology.kind=fully_connected", f"run.folder={tmp_path / 'run'}"]
    )
    result = run_node(
        experiment,
        roster,
        "alice",
        tmp_path / "alice.key",
        roster_file=file,
        progress=tell,
        stop=lambda: "carol" in known,
    )
    assert result.status == "interrupted"
    said = out.getvalue().splitlines()
    assert said[0].endswith("without node 2, to join")
    assert said[-1].endswith("without carol")


def test_a_node_signs_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers: list[RealTimeDriver] = []

    class Kept(RealTimeDriver):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            drivers.append(self)

    monkeypatch.setattr("jwins.run.node.RealTimeDriver", Kept)
    settings = ["nodes.count=2", "topology.kind=fully_connected", f"run.folder={tmp_path / 'run'}"]
    roster = roster_of(tmp_path, 2)
    run_node(load("digits", settings), roster, "bob", tmp_path / "bob.key", stop=lambda: True)
    signatures = drivers[0].session.settings.signatures
    assert signatures is not None
    assert signatures.verify(1, b"text", signatures.sign(b"text"))


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (OSError, "failed")])
def test_the_status_file_tells_that_an_error_ended_the_node(
    error: type[BaseException], status: str, tmp_path: Path
) -> None:
    def fails(now: NodeProgress, names: Sequence[str]) -> None:
        raise error

    settings = ["nodes.count=2", "topology.kind=fully_connected", f"run.folder={tmp_path / 'run'}"]
    roster = roster_of(tmp_path, 2)
    with pytest.raises(error):
        run_node(load("digits", settings), roster, "bob", tmp_path / "bob.key", progress=fails)
    assert json.loads((tmp_path / "run/nodes/1/status.json").read_text())["status"] == status
