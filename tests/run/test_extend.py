"""A run that has ended goes on with more rounds, to what a longer run measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

import jwins
from jwins.cli import app
from jwins.errors import ConfigError, ResumeError
from jwins.run.result import Result
from jwins.run_folder import checkpoint
from jwins.run_folder.rows import EvalRow

CHOCO = {"kind": "choco", "fraction": 0.3, "gamma": 0.5}


def experiment(folder: Path, rounds: int, **tables: Any) -> jwins.Experiment:
    run = {"rounds": rounds, "eval_every": 3, "eval_samples": 50, "checkpoint_every": 2, "folder": folder}
    base: dict[str, Any] = {
        "nodes": {"count": 4},
        "topology": {"kind": "ring"},
        "train": {"local_steps": 1, "batching": "loop"},
        "compute": {"spread": 0.8, "jitter": 0.3},
        "sharing": CHOCO,
        "run": {**run, **tables.pop("run", {})},
    }
    return jwins.Experiment(**{**base, **tables})


def measured(result: Result) -> Any:
    """All but the seconds of the process."""
    end = result.record.end
    assert end is not None
    models = {path.name: path.read_bytes() for path in (result.folder / "final").glob("*.safetensors")}
    start = msgspec.structs.replace(result.record.start, machine={})
    return start, result.record.evaluations, msgspec.structs.replace(end, wall_s={}), result.edges, models


CASES: dict[str, dict[str, Any]] = {
    "choco": {},
    "jwins": {"sharing": {"kind": "jwins"}},
    "closed-loop": {"sharing": {"kind": "closed_loop"}},
    "paper-codec": {"wire": {"codec": "paper"}},
    "no-checkpoint": {"run": {"checkpoint_every": 50}},
    "each-round": {"run": {"checkpoint_every": 1}},
    "faults": {
        "faults": [{"kind": "crash", "node": 1, "round": 2}, {"kind": "rejoin", "node": 1, "round": 4}],
        "run": {"deadline_s": 0.5},
    },
    "asynchronous": {
        "compute": {"step_ms": [20.0, 25.0, 25.0, 25.0]},
        "run": {"mode": "async", "checkpoint_every": 1},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_longer_run_is_what_it_would_have_been(case: str, tmp_path: Path) -> None:
    tables = CASES[case]
    whole = jwins.simulate(experiment(tmp_path / "whole", 12, **tables))
    jwins.simulate(experiment(tmp_path / "grown", 7, **tables))
    grown = jwins.simulate(experiment(tmp_path / "grown", 9, **tables), extend=True)
    assert grown.status == "finished"
    grown = jwins.simulate(experiment(tmp_path / "grown", 12, **tables), extend=True)
    assert measured(grown) == measured(whole)
    assert jwins.simulate(experiment(tmp_path / "grown", 12, **tables), resume=True).was_complete
    assert grown.experiment == whole.experiment.changed({"run": {"folder": tmp_path / "grown"}})


def test_frames_under_way_are_those_of_the_longer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name the experiment; without that, the checkpoint of the shorter run would be of no use."""
    short = experiment(tmp_path / "grown", 7)
    jwins.simulate(short)
    found = checkpoint.latest
    used: list[str] = []

    def latest(*args: Any) -> Any:
        state, path = found(*args)
        used.append(path.name)
        return state, path

    monkeypatch.setattr(checkpoint, "latest", latest)
    grown = jwins.simulate(experiment(tmp_path / "grown", 12), extend=True)
    assert used, "it began anew"
    assert grown.sha256 == jwins.simulate(experiment(tmp_path / "whole", 12)).sha256


def test_a_stopped_run_goes_on_without_its_rule(tmp_path: Path) -> None:
    whole = jwins.simulate(experiment(tmp_path / "whole", 12))
    rule = {"metric": "loss", "target": loss_after(whole, 6)}
    stopped = jwins.simulate(experiment(tmp_path / "grown", 12, run={"stop": rule}))
    assert (stopped.status, stopped.record.status) == ("stopped", "stopped @ 6")
    assert stopped.record.evaluations == whole.record.evaluations[:3]
    assert stopped.model(0) is not None
    with pytest.raises(ResumeError, match=r"holds another experiment \(run.stop = .* there, None here\)"):
        jwins.simulate(experiment(tmp_path / "grown", 12), resume=True)
    grown = jwins.simulate(experiment(tmp_path / "grown", 12), extend=True)
    assert measured(grown) == measured(whole)


def loss_after(result: Result, round: int) -> float:
    (found,) = [row.metrics["loss"].mean for row in result.record.evaluations if row.round == round]
    assert found is not None
    return found


def test_an_unfinished_run_and_none_at_all_go_on_too(tmp_path: Path) -> None:
    whole = jwins.simulate(experiment(tmp_path / "whole", 12))
    asked = iter([False] * 40 + [True] * 1000)
    part = jwins.simulate(experiment(tmp_path / "grown", 7), stop=asked.__next__)
    assert part.status == "interrupted"
    assert measured(jwins.simulate(experiment(tmp_path / "grown", 12), extend=True)) == measured(whole)
    assert measured(jwins.simulate(experiment(tmp_path / "new", 12), extend=True)) == measured(whole)


def test_what_cannot_be_made_longer_is_refused_by_name(tmp_path: Path) -> None:
    jwins.simulate(experiment(tmp_path / "a", 4))
    with pytest.raises(ConfigError, match=r"run.rounds = 3: the run in .* has 4 rounds; give more"):
        jwins.simulate(experiment(tmp_path / "a", 3), extend=True)
    other = {**CHOCO, "gamma": 0.4}
    with pytest.raises(ResumeError, match=r"holds another experiment \(sharing.gamma"):
        jwins.simulate(experiment(tmp_path / "a", 6, sharing=other), extend=True)
    jwins.simulate(experiment(tmp_path / "b", 4, run={"consensus_rounds": 2}))
    with pytest.raises(ConfigError, match=r"run.consensus_rounds = 2: the consensus rounds followed"):
        jwins.simulate(experiment(tmp_path / "b", 6, run={"consensus_rounds": 2}), extend=True)
    early = {"eval_samples_early": 10, "eval_last": 1}
    jwins.simulate(experiment(tmp_path / "c", 4, run=early))
    with pytest.raises(ConfigError, match=r"run.eval_samples_early = 10: the last evaluations used more"):
        jwins.simulate(experiment(tmp_path / "c", 6, run=early), extend=True)
    cosine = {"local_steps": 1, "schedule": {"kind": "cosine"}}
    jwins.simulate(experiment(tmp_path / "e", 4, train=cosine))
    with pytest.raises(ConfigError, match=r"train.schedule.kind = 'cosine': depends on the number of rounds"):
        jwins.simulate(experiment(tmp_path / "e", 6, train=cosine), extend=True)
    log = tmp_path / "a" / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"batching":', b'"clock":"wall","batching":', 1))
    with pytest.raises(ResumeError, match="a run of `jwins launch` cannot be made longer"):
        jwins.simulate(experiment(tmp_path / "a", 6), extend=True)
    wild = {"local_steps": 1, "optimizer": {"kind": "sgd", "lr": 1e30}}
    assert jwins.simulate(experiment(tmp_path / "d", 4, train=wild)).status == "diverged"
    with pytest.raises(ResumeError, match=r"the run ended early \(diverged @ .*\), so it cannot be extended"):
        jwins.simulate(experiment(tmp_path / "d", 6, train=wild), extend=True)


@pytest.mark.parametrize("moment", ["log", "checkpoints", "config"])
def test_a_kill_on_the_way_leaves_a_run_that_goes_on(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the shorter run, until the configuration is written."""
    from jwins.run import extend as module

    short = jwins.simulate(experiment(tmp_path / "a", 6))
    before = short.sha256

    class KilledError(Exception):
        pass

    def die(*args: Any, **options: Any) -> Any:
        raise KilledError

    real = module.write_atomically
    if moment == "checkpoints":
        monkeypatch.setattr(module, "_can_go_on", die)
    else:
        word = {"log": "metrics.jsonl", "config": "config.toml"}[moment]
        monkeypatch.setattr(
            module,
            "write_atomically",
            lambda path, data: die() if path.name == word else real(path, data),
        )
    with pytest.raises(KilledError):
        jwins.simulate(experiment(tmp_path / "a", 9), extend=True)
    monkeypatch.undo()
    again = jwins.simulate(experiment(tmp_path / "a", 6), resume=True)
    assert (again.status, again.sha256) == ("finished", before)
    longer = jwins.simulate(experiment(tmp_path / "a", 9), extend=True)
    assert measured(longer) == measured(jwins.simulate(experiment(tmp_path / "whole", 9)))


def test_the_command_goes_on_and_says_why_a_run_stopped(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(experiment(tmp_path / "run", 4).to_toml(tmp_path))
    runner = CliRunner()
    assert runner.invoke(app, ["run", str(path)]).exit_code == 0
    longer = runner.invoke(app, ["run", str(path), "--extend", "6"])
    assert (longer.exit_code, "finished after 6 rounds" in longer.output) == (0, True), longer.output
    stop = ["--set", "run.stop={metric='loss', target=1000.0}", "--set", f"run.folder={tmp_path / 'other'}"]
    stopped = runner.invoke(app, ["run", str(path), *stop])
    assert stopped.exit_code == 0, stopped.output
    assert "stopped after 0 rounds" in stopped.output
    assert "run.stop: loss reached 1000" in stopped.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows if row["kind"] == "eval"] == [0, 3, 6]
    assert isinstance(
        jwins.simulate(experiment(tmp_path / "run", 6), resume=True).record.evaluations[0], EvalRow
    )


def test_a_metric_without_direction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.stop.metric = 'acuracy': the task declares .*accuracy.*mean"):
        jwins.simulate(experiment(tmp_path, 4, run={"stop": {"metric": "acuracy", "target": 0.5}}))
