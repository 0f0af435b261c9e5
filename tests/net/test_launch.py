"""Nodes as processes over real connections."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import jwins
from jwins.errors import ConfigError, ResumeError, UsageError
from jwins.experiment import Experiment
from jwins.run.fork_server import can_fork, start_forked
from jwins.run.launch import Launched, NodeFailedError, _Nodes, _Process, free_ports, launch

SHARINGS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "jwins": {"kind": "jwins"},
    "choco": {"kind": "choco", "fraction": 0.3, "gamma": 0.5},
}


def digits(folder: Path, count: int = 3, sharing: str = "jwins", **run: Any) -> Experiment:
    return jwins.load("digits").changed(
        {
            "nodes": {"count": count},
            "topology": {"kind": "ring"} if count < 5 else {"kind": "regular", "degree": 4},
            "train": {"batching": "loop"},
            "sharing": SHARINGS[sharing],
            "run": {"rounds": 6, "eval_every": 3, "checkpoint_every": 2, "threads": 1, "folder": folder, **run},
        }
    )


def same(simulated: jwins.Result, launched: jwins.Result) -> None:
    """Check that the results that must be equal under both drivers are."""
    assert launched.status == simulated.status == "finished"
    assert launched.sha256 == simulated.sha256
    for mine, theirs in zip(launched.record.evaluations, simulated.record.evaluations, strict=True):
        assert mine.metrics == theirs.metrics
        assert mine.per_node == theirs.per_node
        assert (mine.round, mine.train_loss, mine.nodes) == (theirs.round, theirs.train_loss, theirs.nodes)
        assert mine.consensus_distance == theirs.consensus_distance
        for kind in ("positions", "values", "header", "keyframe"):
            assert getattr(mine.traffic, kind) == getattr(theirs.traffic, kind)
    edges = {(e["source"], e["target"]): e for e in simulated.edges}
    for edge in launched.edges:
        for kind in ("positions", "values", "header", "keyframe"):
            assert edge[f"bytes_{kind}"] == edges[edge["source"], edge["target"]][f"bytes_{kind}"]
    for node in range(simulated.record.start.num_nodes):
        name = f"final/node-{node}.safetensors"
        assert (launched.folder / name).read_bytes() == (simulated.folder / name).read_bytes()


@pytest.mark.slow
def test_a_launch_writes_what_a_simulation_writes(tmp_path: Path) -> None:
    simulated = jwins.simulate(digits(tmp_path / "virtual", count=2))
    seen: list[Launched] = []
    launched = launch(digits(tmp_path / "wall", count=2), progress=seen.append)
    same(simulated, launched)
    assert launched.record.start.clock == "wall"
    assert simulated.record.start.clock == "virtual"
    assert [view.state for view in seen[-1].nodes] == ["finished"] * 2
    with pytest.raises(ResumeError, match="this experiment is complete there"):
        launch(digits(tmp_path / "wall", count=2))
    assert launch(digits(tmp_path / "wall", count=2), resume=True).was_complete


@pytest.mark.slow
def test_noise_of_privacy_is_the_same_in_every_process(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    private = {"train": {"privacy": {"epsilon": 8.0}}}
    simulated = jwins.simulate(digits(tmp_path / "virtual", sharing="full").changed(private))
    launched = launch(digits(tmp_path / "wall", sharing="full").changed(private), timeout_s=120.0)
    same(simulated, launched)
    spent = [[row.epsilon for row in result.record.evaluations] for result in (simulated, launched)]
    assert spent[0] == spent[1]
    assert 7.9 < spent[0][-1] <= 8.0  # type: ignore[operator]
    for mine, theirs in zip(simulated.partition, launched.partition, strict=True):
        assert mine.tolist() == theirs.tolist()


@pytest.mark.slow
def test_a_schedule_is_the_same_in_every_process(tmp_path: Path) -> None:
    long = {
        "local_steps": 4,
        "optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1, "weight_decay_on": "matrices"},
        "schedule": {"kind": "cosine", "warmup_steps": 5, "final_fraction": 0.1},
        "clip_norm": 1.0,
        "precision": "bfloat16",
        "outer": {"kind": "nesterov", "lr": 0.7, "momentum": 0.5},
    }
    simulated = jwins.simulate(digits(tmp_path / "virtual", sharing="full").changed({"train": long}))
    same(simulated, launch(digits(tmp_path / "wall", sharing="full").changed({"train": long}), timeout_s=120.0))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "sharing"), [(6, "jwins"), (3, "choco")])
def test_nodes_end_where_the_simulation_does(count: int, sharing: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"count": count, "sharing": sharing, "rounds": 20, "eval_every": 10}
    simulated = jwins.simulate(digits(tmp_path / "virtual", **options))
    same(simulated, launch(digits(tmp_path / "wall", **options), timeout_s=120.0))


@pytest.mark.slow
def test_kill_9_at_any_instant_changes_nothing(tmp_path: Path) -> None:
    victims = (0, 2, 5)
    options: dict[str, Any] = {"count": 6, "rounds": 60, "eval_every": 30, "checkpoint_every": 5}
    simulated = jwins.simulate(digits(tmp_path / "virtual", **options))
    killed: set[int] = set()
    back: set[int] = set()

    def kill(now: Launched) -> None:
        for victim in victims:
            view = now.nodes[victim]
            if view.restarts and view.state == "running":
                back.add(victim)
            if victim not in killed and view.round >= 20 and view.state == "running":
                os.kill(view.pid, signal.SIGKILL)
                killed.add(victim)

    last: list[Launched] = []
    launched = launch(
        digits(tmp_path / "wall", **options),
        timeout_s=200.0,
        progress=lambda now: (last.append(now), kill(now))[0],
    )
    assert killed == set(victims), "the run was long enough"
    assert back == killed, "a node that was started again is not called killed any longer"
    assert sum(view.restarts for view in last[-1].nodes) == len(victims)
    assert launched.sha256 == simulated.sha256


@pytest.mark.slow
def test_a_launch_is_interrupted_and_resumed(tmp_path: Path) -> None:
    simulated = jwins.simulate(digits(tmp_path / "virtual", rounds=30, eval_every=30))
    rounds: list[int] = []

    def note(now: Launched) -> None:
        rounds.append(min(view.round for view in now.nodes))

    options: dict[str, Any] = {"rounds": 30, "eval_every": 30}
    first = launch(
        digits(tmp_path / "wall", **options), progress=note, stop=lambda: rounds[-1] >= 1, timeout_s=60.0
    )
    if first.status == "interrupted":
        with pytest.raises(ResumeError, match="unfinished there"):
            launch(digits(tmp_path / "wall", **options))
        first = launch(digits(tmp_path / "wall", **options), resume=True, timeout_s=60.0)
    assert first.sha256 == simulated.sha256


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_leaves_a_checkpoint_of_every_node(tmp_path: Path) -> None:
    """There, the whole process group of the launcher gets the signal."""
    folder = tmp_path / "wall"
    settings = [
        *("nodes.count=2", "topology.kind=fully_connected", "run.rounds=100000", "run.eval_every=100000"),
        *("run.checkpoint_every=100000", "run.threads=1", f"run.folder={folder}"),
        "train.local_steps=200",  # longer than the launcher takes to pass the signal on
    ]
    overrides = [part for setting in settings for part in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "jwins",
        "launch",
        "digits",
        "--neighbour-timeout",
        "60",
        "--quiet",
        *overrides,
    ]
    launcher = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)

    def status(node: int) -> dict[str, Any]:
        path = folder / "nodes" / str(node) / "status.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"round": 0}
        return found

    try:
        until = time.monotonic() + 120.0
        while min(status(node)["round"] for node in range(2)) < 1:
            assert launcher.poll() is None
            assert time.monotonic() < until, "nodes train"
            time.sleep(0.05)
        os.killpg(launcher.pid, signal.SIGINT)
        _, said = launcher.communicate(timeout=120.0)
    finally:
        launcher.kill()
        launcher.wait()
    assert (launcher.returncode, said.strip()) == (130, "interrupted: continue with --resume")
    saved = [status(node) for node in range(2)]
    assert [found["status"] for found in saved] == ["interrupted"] * 2
    for node, found in enumerate(saved):
        (path,) = (folder / "nodes" / str(node) / "checkpoints").glob("round-*.safetensors")
        assert path.name.startswith(f"round-{found['round']:08d}-")

    rounds: list[int] = []
    again = launch(
        jwins.load("digits", settings),
        resume=True,
        timeout_s=60.0,
        progress=lambda now: rounds.append(min(view.round for view in now.nodes)),
        stop=lambda: rounds[-1] > max(found["round"] for found in saved),
    )
    assert again.status == "interrupted"
    for node, found in enumerate(saved):
        log = (folder / "nodes" / str(node) / "log.jsonl").read_text()
        (event,) = [line for line in map(json.loads, log.splitlines()) if line["event"] == "resumed"]
        assert event["round"] == found["round"]


@pytest.mark.slow
def test_a_node_started_twice_says_so(tmp_path: Path) -> None:
    from jwins.net.roster import read_roster
    from jwins.run.node import run_node

    experiment = digits(tmp_path / "wall", rounds=200)
    found: list[BaseException] = []

    def twice(now: Launched) -> None:
        if not found and all(view.state == "running" for view in now.nodes):
            roster = read_roster(tmp_path / "wall" / "roster.toml")
            try:
                run_node(experiment, roster, "node-1", tmp_path / "wall" / "keys" / "node-1.key")
            except ResumeError as error:
                found.append(error)

    launch(experiment, progress=twice, stop=lambda: bool(found), timeout_s=60.0)
    assert "another process is running node node-1 here" in str(found[0])


HOLDING = '''
"""Digits, and a step that holds the interpreter lock in whichever process comes first."""

import ctypes
import os

from jwins.tasks.digits import Digits


class Holding(Digits):
    def __init__(self, marker: str, seconds: int) -> None:
        super().__init__()
        self.marker, self.seconds, self.steps = marker, seconds, 0

    def loss(self, model, batch, generator):
        self.steps += 1
        if self.steps == 30:
            try:
                os.rename(self.marker, self.marker + ".taken")
            except OSError:
                pass
            else:
                ctypes.PyDLL(None).sleep(self.seconds)
        return super().loss(model, batch, generator)
'''


@pytest.mark.slow
def test_native_code_may_hold_the_interpreter_lock(tmp_path: Path) -> None:
    (tmp_path / "holding.py").write_text(HOLDING)
    marker = tmp_path / "marker"

    def experiment(folder: str) -> Experiment:
        return jwins.Experiment(
            **digits(tmp_path / folder, count=4, sharing="choco", rounds=40, eval_every=40).model_dump(
                exclude={"task"}
            ),
            task={
                "file": f"{tmp_path / 'holding.py'}:Holding",
                "options": {"marker": str(marker), "seconds": 45},
            },
        )

    simulated = jwins.simulate(experiment("virtual"))  # nobody holds it: there is no marker
    marker.touch()
    launched = launch(experiment("wall"), timeout_s=200.0)
    assert not marker.exists()
    assert launched.sha256 == simulated.sha256
    for node in range(4):
        log = (tmp_path / "wall" / "nodes" / str(node) / "log.jsonl").read_text()
        assert '"event":"timed_out"' not in log
        assert '"event":"suspect"' not in log


@pytest.mark.slow
@pytest.mark.alone
def test_a_stopped_process_is_not_waited_for_and_is_readmitted(tmp_path: Path) -> None:
    options: dict[str, Any] = {"count": 4, "rounds": 400, "eval_every": 400, "checkpoint_every": 20}
    simulated = jwins.simulate(digits(tmp_path / "virtual", **options))
    stopped_at: list[int] = []
    went_on: list[int] = []

    def stop_and_go(now: Launched) -> None:
        others = min(view.round for view in now.nodes if view.name != "node-2")
        view = now.nodes[2]
        if not stopped_at and view.round >= 20:
            os.kill(view.pid, signal.SIGSTOP)
            stopped_at.append(others)
        elif stopped_at and not went_on and others >= stopped_at[0] + 60:
            os.kill(view.pid, signal.SIGCONT)
            went_on.append(others)

    launched = launch(digits(tmp_path / "wall", **options), timeout_s=0.5, progress=stop_and_go)
    assert went_on, "the run was long enough"
    assert launched.status == "finished"
    mine, theirs = launched.record.evaluations[-1], simulated.record.evaluations[-1]
    assert mine.metrics["accuracy"].mean >= theirs.metrics["accuracy"].mean - 0.03


@pytest.mark.skipif(not can_fork(), reason="needs multiprocessing's fork server")
def test_processes_share_one_import(tmp_path: Path) -> None:
    processes = [start_forked(["list"], tmp_path / f"{i}.out") for i in range(2)]
    assert [process.wait(60.0) for process in processes] == [0, 0]
    assert "digits-compare" in (tmp_path / "1.out").read_text()
    wrong = start_forked(["node", "nowhere.toml", "--as", "a"], tmp_path / "wrong.out")
    assert wrong.wait(60.0) == 2
    (tmp_path / "other").symlink_to(tmp_path / "precious")
    stopped = start_forked(["list"], tmp_path / "other")
    assert stopped.wait(60.0) == 1, "it follows no link"
    assert not (tmp_path / "precious").exists()
    killed = [start_forked(["list"], tmp_path / f"killed-{i}.out") for i in range(2)]
    for process in killed:
        os.kill(process.pid, signal.SIGSTOP)
    assert _parent_of(killed[0].pid) == _parent_of(killed[1].pid) != os.getpid()
    for process in killed:
        process.kill()
        assert process.wait(60.0) == -signal.SIGKILL


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_an_interrupt_waits_for_all_nodes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight nodes that do not end keep nobody for eight minutes."""
    clock = [0.0]

    class Stuck:
        pid = 1

        def send_signal(self, sig: int) -> None:
            assert sig == signal.SIGINT

        def poll(self) -> None:
            return None

        def wait(self, timeout: float) -> None:
            clock[0] += timeout
            raise subprocess.TimeoutExpired(["jwins"], timeout)

    monkeypatch.setattr("jwins.run.launch.time.monotonic", lambda: clock[0])
    nodes = object.__new__(_Nodes)
    nodes._processes = [_Process(Stuck()) for _ in range(8)]  # type: ignore[arg-type]
    nodes.interrupt()
    assert clock[0] == pytest.approx(60.0)


def test_ports_are_not_tried_for_ever() -> None:
    assert len(set(free_ports(20))) == 20
    with pytest.raises(UsageError, match="20000 nodes need a port each"):
        free_ports(20_000)


def test_what_only_a_virtual_clock_can_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batching = 'stacked'"):
        launch(digits(tmp_path / "a").changed({"train": {"batching": "stacked"}}))
    with pytest.raises(ConfigError, match="faults = '1 tables'"):
        launch(digits(tmp_path / "b").changed({"faults": ({"kind": "crash", "node": 1, "round": 2},)}))
    with pytest.raises(ConfigError, match=r"wire\.codec = 'paper'"):
        launch(digits(tmp_path / "c").changed({"wire": {"codec": "paper"}}))


@pytest.mark.slow
def test_a_node_that_fails_ends_the_launch_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = digits(tmp_path / "wall")

    monkeypatch.setattr("jwins.run.launch._Nodes._make_roster", _roster_without_members)
    with pytest.raises(NodeFailedError, match=r"node-\d ended with code 2: error: members = 3"):
        launch(experiment)


def _roster_without_members(nodes: Any) -> Path:
    path: Path = nodes._folder / "roster.toml"
    path.write_text("members = 3\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["full", "choco"])
def test_only_some_nodes_take_part_in_a_round(sharing: str, tmp_path: Path) -> None:
    def half(folder: Path) -> Experiment:
        return digits(folder, 5, sharing, rounds=8, eval_every=4).changed({"nodes": {"participation": 0.6}})

    simulated = jwins.simulate(half(tmp_path / "virtual"))
    launched = launch(half(tmp_path / "wall"), timeout_s=120.0)
    assert (launched.status, launched.sha256) == ("finished", simulated.sha256)
    means = [[row.metrics for row in result.record.evaluations] for result in (simulated, launched)]
    assert means[0] == means[1]


def test_a_rule_that_ends_a_run_is_refused(tmp_path: Path) -> None:
    stop = {"run": {"stop": {"metric": "loss", "target": 0.1}}}
    with pytest.raises(ConfigError, match=r"run.stop = .*: no node knows the mean over all nodes"):
        launch(digits(tmp_path).changed(stop))
