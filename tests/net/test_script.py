"""A user's own loop as several peers of one machine, with one command."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import jwins
from jwins.cli.app import app
from jwins.errors import ConfigError
from jwins.run.launch import NodeFailedError, NodeView
from jwins.run.script import launch_script

LOOP = """
import sys
import time
import torch
import jwins

rounds, pause = int(sys.argv[1]), float(sys.argv[2])
torch.manual_seed(1)
model = torch.nn.Linear(4, 2)
with jwins.Peer(model, sharing=jwins.sharing.full(), timeout_s=20.0) as peer:
    for round in peer.rounds(rounds):
        time.sleep(pause)
        with torch.no_grad():
            model.weight += float(peer.name[-1])
        report = peer.exchange()
        print("round", round, "with", *report.merged_with)
print("sum", round, float(model.weight.sum()))
"""

SMALL = """
import os, sys, time
print(os.environ["JWINS_ROSTER"], *sys.argv[1:])
if os.environ["JWINS_KEY"].endswith("node-1.key"):
    if sys.argv[1] == "fail":
        raise SystemExit("the words of the script")
    if sys.argv[1] == "killed" and not os.path.exists(sys.argv[2]):
        open(sys.argv[2], "w").close()
        os.kill(os.getpid(), 9)
if sys.argv[1] in ("fail", "stay"):
    time.sleep(60)
sys.stdout.write("no end of line")
"""


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "train.py").write_text(text)
    return tmp_path / "train.py"


def test_every_process_has_roster_key_arguments_and_its_lines_a_prefix(tmp_path: Path) -> None:
    lines: list[tuple[str, str]] = []
    status = launch_script(
        written(tmp_path, SMALL), ["a", "--b"], count=3, line=lambda name, text: lines.append((name, text))
    )
    assert status == "finished"
    assert sorted(name for name, _ in lines) == sorted(2 * ["node-0", "node-1", "node-2"])
    assert all(text.endswith("roster.toml a --b") or text == "no end of line" for _, text in lines)
    (roster,) = {text.split()[0] for _, text in lines if text != "no end of line"}
    assert not Path(roster).exists(), "the folder was temporary"


def test_one_that_is_killed_starts_again(tmp_path: Path) -> None:
    lines: list[str] = []
    seen: list[tuple[NodeView, ...]] = []
    launch_script(
        written(tmp_path, SMALL),
        ["killed", str(tmp_path / "marker")],
        count=2,
        folder=tmp_path / "run",
        line=lambda name, text: lines.append(f"{name} | {text}"),
        progress=seen.append,
    )
    assert "node-1 | [killed by SIGKILL, starts again]" in lines
    assert [view.restarts for view in seen[-1]] == [0, 1]
    assert (tmp_path / "run" / "roster.toml").exists()


def test_one_that_fails_ends_the_others_and_its_words_are_told(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(NodeFailedError, match=r"node-1 ended with code 1: .*the words of the script"):
        launch_script(written(tmp_path, SMALL), ["fail"], count=3)
    assert time.monotonic() - begun < 50.0, "nobody waited for those that sleep"


def test_an_interrupt_ends_all(tmp_path: Path) -> None:
    lines: list[str] = []
    status = launch_script(
        written(tmp_path, SMALL),
        ["stay"],
        count=2,
        line=lambda name, text: lines.append(text),
        stop=lambda: len(lines) >= 2,
    )
    assert status == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--script", "nowhere.py", "--nodes", "2"], "there is no such file"),
        (["--script", __file__], "--nodes"),
        (["--script", __file__, "--nodes", "0"], "expected 1 to 256"),
        (["--script", __file__, "--nodes", "2", "--set", "run.rounds=2"], "is for experiments"),
        (["digits", "--nodes", "2"], "--set nodes.count"),
        (["digits", "--resme"], "no such option or argument"),
        ([], "expected one experiment"),
    ],
)
def test_what_cannot_be_launched_is_named(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["launch", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_without_roster_and_key_the_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("JWINS_ROSTER", raising=False)
    with pytest.raises(ConfigError, match=r"roster = None: .*JWINS_ROSTER"):
        jwins.Peer(torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_a_loop_of_ones_own_goes_on_when_one_of_its_peers_is_killed(tmp_path: Path) -> None:
    lines: list[tuple[str, str]] = []
    killed: list[int] = []

    def progress(views: tuple[NodeView, ...]) -> None:
        if not killed and views[2].round >= 5:
            os.kill(views[2].pid, signal.SIGKILL)
            killed.append(views[2].pid)

    status = launch_script(
        written(tmp_path, LOOP),
        ["25", "0.2"],
        count=3,
        line=lambda name, text: (lines.append((name, text)), print(name, "|", text, file=sys.stderr))[0],
        progress=progress,
    )
    assert status == "finished"
    assert killed
    ends = {name: text for name, text in lines if text.startswith("sum 24")}
    assert sorted(ends) == ["node-0", "node-1", "node-2"]
    assert ("node-2", "[killed by SIGKILL, starts again]") in lines
    again = [text for name, text in lines if name == "node-2" and text.startswith("round")]
    assert again[0] == "round 0 with node-0 node-1"
    assert len(again) < 30, "it went on from its checkpoint or the round of the others"
