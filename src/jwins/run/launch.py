"""Run all nodes of an experiment as processes of this machine, and combine their measurements.

The run folder has the same form as the simulator's: ``config.toml``, ``partition.json``,
``partition.safetensors``, ``metrics.jsonl`` with rows over all nodes, ``traffic.csv`` and ``final/``. Each node
has its own result in ``nodes/<i>``, checkpoints included, and ``keys/`` has the identities that were made for
this machine alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from jwins.engines.evaluation_results import (
    EvalResult,
    PartialSum,
    average,
    reduce_results,
    squared_distance,
)
from jwins.engines.interrupts import interrupts
from jwins.engines.node_group import NodeGroup
from jwins.errors import DataError, JwinsError, UsageError
from jwins.experiment.experiment import Experiment
from jwins.net.driver import NodeEvaluation
from jwins.net.roster import Member, Roster, write_roster
from jwins.run.assembly import Components, assemble
from jwins.run.builders import write_partition
from jwins.run.folder import FolderState, check_resume, folder_state
from jwins.run.fork_server import Forked, can_fork, start_forked
from jwins.run.node import for_network, for_real_time, node_folder, timeout_of
from jwins.run.result import Result
from jwins.run_folder import checkpoint, traffic
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.lock import locked
from jwins.run_folder.own_files import open_own, private_folder
from jwins.run_folder.record import Record
from jwins.run_folder.rows import EndRow, EvalRow, MetricsLog, Traffic, TrafficSplit, read_rows

LOOK_EVERY_S = 0.2
MAX_RESTARTS = 100
"""Maximum number of restarts of a node that was killed by a signal."""
RESTART_AFTER_S = 1.0
_FIRST_PORT, _PORTS = 20_000, 12_768
INTERRUPT_S = 60.0
"""Time for all nodes together to end with a checkpoint."""


class NodeFailedError(JwinsError):
    """The process of a node ended with an error."""


@dataclass(slots=True)
class NodeView:
    """State of one node while it runs.

    Attributes:
        state: ``starting``, ``running``, ``killed``, or its end.
        bytes_total: bytes that it has sent so far.
        waiting_for: names of the neighbours that it waits for.
        suspect: names of the peers that it does not wait for.
    """

    name: str
    state: str = "starting"
    round: int = 0
    bytes_total: int = 0
    waiting_for: tuple[str, ...] = ()
    waiting_s: float = 0.0
    suspect: tuple[str, ...] = ()
    restarts: int = 0
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Launched:
    """Progress of a launch.

    Attributes:
        row: the newest evaluation, if there is a new one.
    """

    rounds: int
    nodes: tuple[NodeView, ...]
    row: EvalRow | None = None


def launch(
    experiment: Experiment,
    *,
    resume: bool = False,
    timeout_s: float | None = None,
    progress: Callable[[Launched], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run all nodes of an experiment as processes of this machine, and combine their measurements.

    Args:
        experiment: experiment to run, in ``experiment.folder``. ``train.batching = "auto"`` means "loop" here.
        resume: continue the run in the folder; if it is complete, only read it.
        timeout_s: minimum time to wait for a neighbour; None for the experiment's deadline, or 30.
        progress: called a few times per second.
        stop: called equally often; True ends each node with a checkpoint.

    Returns:
        The measurements, as of a simulation, in real seconds.

    Raises:
        ConfigError: the experiment cannot be run over a network as written.
        ResumeError: the folder has another experiment, or this one without ``resume``.
        NodeFailedError: a node's process ended with an error.
    """
    experiment = for_network(experiment)
    least_s = timeout_of(experiment, timeout_s)
    folder = experiment.folder
    state, experiment = folder_state(experiment, folder)
    check_resume(folder, state, resume)
    if state is FolderState.COMPLETE:
        record = Record.read(folder)
        assert record.end is not None
        return Result(experiment, folder, record.end.status, record, was_complete=True)
    components = for_real_time(assemble(experiment, nodes=[0]))
    folder.mkdir(parents=True, exist_ok=True)
    # Nodes are not in the terminal's process group, so this process ends them when the terminal closes.
    with locked(folder, "this experiment"), interrupts("SIGTERM", "SIGHUP") as interrupted:
        if state is FolderState.ABSENT:
            write_atomically(folder / "config.toml", components.experiment.to_toml(folder).encode())
            write_partition(folder, components.task, components.partition)
        with _Nodes(components, folder, least_s) as nodes, MetricsLog(folder / "metrics.jsonl") as log:
            collected = _Collected(components, folder, log)
            status = _watch(nodes, collected, progress, lambda: interrupted() or stop())
    return Result(components.experiment, folder, status, Record.read(folder))


def _watch(
    nodes: _Nodes,
    collected: _Collected,
    progress: Callable[[Launched], None] | None,
    stop: Callable[[], bool],
) -> str:
    """Watch until all nodes have ended, and return the end of the run."""
    started = time.perf_counter()
    nodes.start()
    while True:
        running = nodes.look()
        row = collected.look(nodes.ended)
        if progress is not None:
            progress(Launched(collected.rounds, tuple(nodes.views), row))
        if not running:
            return collected.finish(nodes, time.perf_counter() - started)
        if stop():
            nodes.interrupt()
            return "interrupted"
        time.sleep(LOOK_EVERY_S)


# --- Processes --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Process:
    """Process of a node, and the time to start the next one if it was killed."""

    popen: Forked | subprocess.Popen[bytes] | None = None
    again_at: float = 0.0


class _Nodes:
    """The processes of all nodes."""

    def __init__(self, components: Components, folder: Path, timeout_s: float) -> None:
        self._folder, self._timeout_s = folder, timeout_s
        self._threads = components.experiment.run.threads or 1
        count = components.experiment.nodes.count
        self.names = [f"node-{node}" for node in range(count)]
        self.views = [NodeView(name) for name in self.names]
        self._processes = [_Process() for _ in range(count)]
        self.ended: dict[int, str] = {}

    def __enter__(self) -> _Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        running = self._running()
        for popen in running:
            popen.kill()
        for popen in running:
            popen.wait()

    def start(self) -> None:
        """Make identities, and start all nodes."""
        roster = self._make_roster()
        for node in range(len(self.names)):
            private_folder(node_folder(self._folder, node))
            self._processes[node].popen = self._spawn(node, roster)

    def _make_roster(self) -> Path:
        shutil.rmtree(self._folder / "keys", ignore_errors=True)
        return make_roster(self._folder, self.names)

    def _spawn(self, node: int, roster: Path) -> Forked | subprocess.Popen[bytes]:
        name, place = self.names[node], node_folder(self._folder, node).resolve()
        arguments = [
            *("node", str(self._folder / "config.toml")),
            *("--as", name, "--roster", str(roster)),
            *("--key", str(self._folder / "keys" / f"{name}.key")),
            *("--folder", str(place), "--keep-models", "--quiet"),
            *("--set", f"run.threads={self._threads}"),
            *("--neighbour-timeout", str(self._timeout_s)),
        ]
        out = self._folder / "nodes" / f"{node}.out"
        start = start_forked if can_fork() else _popen
        process: Forked | subprocess.Popen[bytes] = start(arguments, out)
        self.views[node].pid = process.pid
        return process

    def look(self) -> bool:
        """Update the views, and restart nodes that were killed; return False if all have ended.

        Raises:
            NodeFailedError: a node ended with an error.
        """
        for node, process in enumerate(self._processes):
            view = self.views[node]
            if node in self.ended:
                continue
            read_status(node_folder(self._folder, node) / "status.json", view)
            code = None if process.popen is None else process.popen.poll()
            if process.popen is None and time.monotonic() >= process.again_at:
                view.restarts += 1
                view.state = "starting"
                (node_folder(self._folder, node) / "status.json").unlink(missing_ok=True)
                process.popen = self._spawn(node, self._folder / "roster.toml")
            elif code is not None and code < 0 and sum(v.restarts for v in self.views) < MAX_RESTARTS:
                process.popen, process.again_at = None, time.monotonic() + RESTART_AFTER_S
                view.state = "killed"
            elif code is not None:
                self.ended[node] = view.state = self._how_it_ended(node, code)
        return len(self.ended) < len(self._processes)

    def _how_it_ended(self, node: int, code: int) -> str:
        status = {0: "finished", 3: "diverged", 130: "interrupted"}.get(code)
        if status is None:
            out = self._folder / "nodes" / f"{node}.out"
            last = out.read_text(errors="replace").strip().splitlines()[-3:]
            raise NodeFailedError(f"{self.names[node]} ended with code {code}: {' '.join(last)} (see {out})")
        return status

    def interrupt(self) -> None:
        """Ask all nodes to end with a checkpoint, and wait for them."""
        running, until = self._running(), time.monotonic() + INTERRUPT_S
        for popen in running:
            popen.send_signal(signal.SIGINT)
        for popen in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(max(0.0, until - time.monotonic()))

    def _running(self) -> list[Forked | subprocess.Popen[bytes]]:
        return [p.popen for p in self._processes if p.popen is not None and p.popen.poll() is None]


def read_status(path: Path, view: NodeView) -> None:
    """Update a view from the node's status file, if there is one."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    view.round, view.bytes_total = found["round"], found["bytes_total"]
    view.waiting_for, view.waiting_s = tuple(found["waiting_for"]), found["waiting_s"]
    view.suspect = tuple(found["suspect"])
    if view.state != "killed":
        view.state = found["status"]


def _popen(arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    with open_own(out) as file:
        return subprocess.Popen(
            [sys.executable, "-m", "jwins", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            # One SIGINT each: with the terminal's own at Ctrl-C it would be the second.
            process_group=None if os.name == "nt" else 0,
        )


def make_roster(folder: Path, names: Sequence[str]) -> Path:
    """Make keys and a roster of nodes on this machine in ``folder``; return the roster's file.

    Raises:
        UsageError: too few ports are free.
    """
    keys, path = private_folder(folder / "keys"), folder / "roster.toml"
    members = [
        Member.new(node, name, f"127.0.0.1:{port}", keys)
        for node, (name, port) in enumerate(zip(names, free_ports(len(names)), strict=True))
    ]
    write_roster(Roster(members=tuple(members)), path)
    return path


def free_ports(count: int) -> list[int]:
    """Return different ports of this machine that nothing listens on.

    They are below the ports that systems use for outgoing connections. Nodes dial each other before all of them
    listen, so a restarted node could otherwise find its port used by an outgoing connection.

    Raises:
        UsageError: too few are free.
    """
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        for port in secrets.SystemRandom().sample(range(_FIRST_PORT, _FIRST_PORT + _PORTS), _PORTS):
            if len(ports) == count:
                return ports
            with contextlib.suppress(OSError):
                sock = held.enter_context(socket.socket())
                sock.bind(("127.0.0.1", port))
                ports.append(port)
    raise UsageError(f"{count} nodes need a port each, and this machine has {len(ports)} free")


# --- Measurements ------------------------------------------------------------------------------------


class _Collected:
    """Rows over all nodes, made when all have measured the same round."""

    def __init__(self, components: Components, folder: Path, log: MetricsLog) -> None:
        self._components, self._folder, self._log = components, folder, log
        self.rounds = components.experiment.run.rounds
        self._count = components.experiment.nodes.count
        self._rows = list(read_rows(folder / "metrics.jsonl"))
        if not self._rows:
            self._append(components.start)
        self._sent = [TrafficSplit() for _ in range(self._count)]
        self._group: NodeGroup | None = None

    def _append(self, row: Any) -> None:
        self._log.append(row)
        self._rows.append(row)

    def look(self, ended: Mapping[int, str]) -> EvalRow | None:
        """Combine complete measurements, and return the newest row if there is a new one."""
        newest = None
        last = max((row.round for row in self._rows if isinstance(row, EvalRow)), default=-1)
        for at in sorted(r for r in self._components.rules.evaluate_at if r > last):
            paths = {node: self._model(node, at) for node in range(self._count)}
            there = [node for node, path in paths.items() if path.is_file()]
            late = [n for n in paths if n not in there and n not in ended and not self._is_past(n, at)]
            if late or not there:
                break
            newest = self._combined(at, [_read(paths[node]) for node in there])
            self._append(newest)
            for node in there:
                paths[node].unlink()
        return newest

    def _model(self, node: int, round: int) -> Path:
        return node_folder(self._folder, node) / "models" / f"round-{round:08d}.safetensors"

    def _is_past(self, node: int, round: int) -> bool:
        """Return whether a node has passed a round; one that returned later does not measure earlier rounds."""
        return any(
            path.name > self._model(node, round).name for path in self._model(node, 0).parent.glob("round-*")
        )

    def _combined(self, round: int, every: list[NodeEvaluation]) -> EvalRow:
        sums = [[PartialSum(0, found.node, found.params.to(torch.float64))] for found in every]
        buffers = {found.node: found.buffers for found in every}
        mean = average(sums, len(every), buffers)
        results = [found.result for found in every]
        if round > 0:
            if self._group is None:
                self._group = self._components.node_group()
            results = [
                replace(found.result, squares={found.node: squared_distance(found.params, mean.params)})
                for found in every
            ]
            results.append(self._group.measure(round, mean, test_average=True))
        for found in every:
            self._sent[found.node] = TrafficSplit(*found.sent)
        return reduce_results(
            results,
            round=round,
            time_s=max(found.time_s for found in every),
            nodes=[found.node for found in every],
            traffic=sum(self._sent, TrafficSplit()),
            samples=every[0].samples,
        )

    def finish(self, nodes: _Nodes, total_s: float) -> str:
        statuses = nodes.ended
        if "interrupted" in statuses.values():
            return "interrupted"
        status = "diverged" if "diverged" in statuses.values() else "finished"
        ends = [_end_of(node_folder(self._folder, node)) for node in range(self._count)]
        edges: dict[tuple[int, int], Traffic] = {}
        for node in range(self._count):
            for edge in traffic.read(node_folder(self._folder, node)) or []:
                edges[edge.source, edge.target] = edge
        traffic.write(self._folder, [edges[edge] for edge in sorted(edges)])
        final = self._folder / "final"
        final.mkdir(exist_ok=True)
        for node in range(self._count):
            name = f"node-{node}.safetensors"
            write_atomically(final / name, (node_folder(self._folder, node) / "final" / name).read_bytes())
        wall_s: dict[str, float] = {}
        for end in ends:
            for activity, seconds in end.wall_s.items():
                wall_s[activity] = round(wall_s.get(activity, 0.0) + seconds, 3)
        reason = next((end.reason for end in ends if end.status == "diverged"), "")
        last = EndRow(
            status,
            min(end.round for end in ends),
            max(end.time_s for end in ends),
            reason,
            self._sha256(),
            wall_s | {"total": round(total_s, 3)},
        )
        self._append(last)
        self._log.sync()
        return status

    def _sha256(self) -> str:
        """Return the hash of all final parameters, as the simulator computes it."""
        layout = self._components.trainer.layout
        digest = hashlib.sha256()
        for node in range(self._count):
            tensors = load_file(self._folder / "final" / f"node-{node}.safetensors")
            params = torch.cat([tensors[slot.name].reshape(-1) for slot in layout.slots])
            digest.update(params.numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()


def _read(path: Path) -> NodeEvaluation:
    found = checkpoint.load(path.read_bytes(), (NodeEvaluation, EvalResult))
    if not isinstance(found, NodeEvaluation):
        raise DataError(f"{path}: not a node's measurements; remove the file and run again")
    return found


def _end_of(folder: Path) -> EndRow:
    row = list(read_rows(folder / "metrics.jsonl"))[-1]
    if not isinstance(row, EndRow):
        raise DataError(f"{folder}: the node ended, but its log has no end; look at log.jsonl there")
    return row
