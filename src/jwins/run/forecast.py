"""Forecast of a run's memory, seconds and bytes, from a few rounds of a few of its nodes.

Two small runs, each in a separate process, measure the cost of a node and the fixed cost: memory by their
peaks, seconds by activity. The rest is computed from the experiment: nodes of an actor, recipients,
rounds, evaluations. Nothing is written.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jwins.engines.simulator.driver import Progress
from jwins.errors import ConfigError, ResumeError
from jwins.experiment.experiment import Experiment
from jwins.experiment.plugins import TopologyTable
from jwins.run.assembly import AssembledRun, build
from jwins.run.builders import build_topology, sends
from jwins.run.evaluation_plan import evaluation_rounds
from jwins.run.memory import peak_bytes
from jwins.run.placement import node_blocks
from jwins.run.run import Ray
from jwins.run_folder.rows import EndRow, EvalRow
from jwins.training.allocator import keep_freed_memory

_ROUNDS = 6
"""Rounds of a calibration. The first does not count, because it allocates memory and records steps."""

_SAMPLES = 1000, 4000
"""Test samples of an evaluation in the larger and in the smaller calibration. Two are needed because testing a
model has a fixed cost that differs between tasks."""

_LARGER_BYTES = 200e6
"""Difference in memory of the larger calibration, because the memory of a process varies by some MB."""

_MIN_NODES, _MAX_NODES = 12, 512
"""Nodes of the larger calibration."""

_GUESSED_VECTORS = 16
"""Assumed vectors of float32 per node for choosing the number of nodes of the larger calibration."""

_ACTIVITIES = ("training", "share and merge", "decoding")


@dataclass(frozen=True, slots=True)
class Forecast:
    """Forecast of a run.

    Attributes:
        actors: processes that share the nodes.
        memory_bytes: peak of each actor, including the process and the data of the task.
        start_s: seconds before the first round, including a process's imports.
        round_s: seconds per round of the slowest actor, by activity.
        evaluation_s: seconds of an evaluation of all nodes.
        frame_bytes: mean length of a frame.
        round_bytes: bytes that all nodes send in a round, mean over the rounds.
        stored_bytes: bytes of these between actors, each frame once per actor.
    """

    num_nodes: int
    dim: int
    actors: int
    rounds: int
    evaluations: int
    memory_bytes: float
    start_s: float
    round_s: Mapping[str, float]
    evaluation_s: float
    checkpoint_s: float
    checkpoints: int
    frame_bytes: float
    round_bytes: float
    stored_bytes: float

    @property
    def total_s(self) -> float:
        """Return the seconds of the run; before the first round one model is evaluated for all nodes."""
        rounds = self.rounds * sum(self.round_s.values())
        evaluations = (self.evaluations - 1) * self.evaluation_s
        return self.start_s + rounds + evaluations + self.checkpoints * self.checkpoint_s

    @property
    def total_bytes(self) -> float:
        """Return the bytes sent by all nodes over the whole run."""
        return self.rounds * self.round_bytes


@dataclass(frozen=True, slots=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        degree: mean number of recipients.
        start_s: seconds of the process until everything was built.
        own_s: seconds of the calibration itself.
        round_s: seconds of the counted rounds, by activity.
        checkpoint_s: seconds of the last checkpoint.
        sends: frames times recipients.
        sent_bytes: bytes of these.
    """

    nodes: int
    dim: int
    degree: float
    samples: int
    all_samples: int
    peak_bytes: float
    start_s: float
    own_s: float
    round_s: Mapping[str, float]
    evaluation_s: float
    checkpoint_s: float
    sends: int
    sent_bytes: int


def forecast(experiment: Experiment, engine: Ray | None = None) -> Forecast:
    """Forecast a run before it starts.

    Args:
        experiment: the experiment.
        engine: the cluster that will run it; its machines are assumed to be as fast as this one, and it need
            not exist yet. None for this process.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
        ResumeError: a calibration ran out of memory.
    """
    graph = build_topology(experiment).at(0)
    degree = sum(map(len, graph.recipients)) / graph.num_nodes
    threads = experiment.run.threads or (1 if engine is not None else None)
    if threads is not None:
        experiment = experiment.changed({"run": {"threads": threads}})
    fewer, more = _SAMPLES
    few = _apart(_small(experiment, 4, degree, more))
    wanted = math.ceil(_LARGER_BYTES / (4 * few.dim * _GUESSED_VECTORS))
    much = min(experiment.nodes.count, max(_MIN_NODES, min(_MAX_NODES, wanted)))
    many = _apart(_small(experiment, much, degree, fewer))
    return _extrapolated(experiment, degree, few, many, 1 if engine is None else engine.actors)


def _small(experiment: Experiment, nodes: int, degree: float, samples: int) -> Experiment:
    """Return the same experiment with few nodes, of the same degree if possible, and few test samples."""
    nodes = min(nodes, experiment.nodes.count)
    run = experiment.run
    changes: dict[str, Any] = {
        "nodes": {"count": nodes},
        "run": {
            "rounds": _ROUNDS,
            "eval_every": _ROUNDS,
            "eval_at": [],
            "eval_samples": samples,
            "eval_samples_early": None,
            "stop": None,
            "checkpoint_every": _ROUNDS - 1 if run.checkpoint_every < run.rounds else _ROUNDS + 1,
            "tensorboard": False,
        },
        "faults": [],
    }
    for section, key in (("links", "uplink_mbps"), ("compute", "step_ms"), ("train", "local_steps")):
        value = getattr(getattr(experiment, section), key)
        if isinstance(value, tuple):
            changes[section] = {key: list(value[:nodes])}
    if nodes < experiment.nodes.count and isinstance(experiment.topology, TopologyTable):
        near = min(nodes - 1, max(1, round(degree)))
        near -= near * nodes % 2  # a regular graph has an even number of ends
        changes["topology"] = {
            "kind": "regular",
            "degree": max(near, 1),
            "dynamic": experiment.topology_changes,
        }
    return experiment.changed(changes)


def _apart(experiment: Experiment) -> Calibration:
    """Calibrate in a separate process, whose peak of memory is that of the run."""
    context = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(_calibrate, experiment).result()
            imports_s = time.perf_counter() - started - found.own_s
            return replace(found, start_s=found.start_s + imports_s)
    except BrokenProcessPool:
        raise ResumeError(
            f"a calibration with {experiment.nodes.count} nodes died, perhaps for lack of memory: the "
            f"experiment does not fit this machine"
        ) from None


def _calibrate(experiment: Experiment) -> Calibration:
    keep_freed_memory()
    started = time.perf_counter()
    seen: dict[int, tuple[float, dict[str, float]]] = {}

    def look(progress: Progress) -> None:
        if progress.round not in seen:
            seen[progress.round] = time.perf_counter(), dict(assembled.driver.groups[0].wall_s)

    with tempfile.TemporaryDirectory() as folder:
        assembled = _built(experiment.changed({"run": {"folder": Path(folder)}}), Path(folder), look)
        start_s = time.perf_counter() - started
        outcome = assembled.driver.run()
    end, last = outcome.rows[-1], outcome.rows[-2]
    assert isinstance(end, EndRow)
    assert isinstance(last, EvalRow)
    rounds = sorted(seen.keys() & set(range(1, _ROUNDS)))  # the last one ends with an evaluation
    counted = max(1, rounds[-1] - rounds[0])
    (since, before), (until, after) = seen[rounds[0]], seen[rounds[-1]]
    round_s = {name: (after[name] - before[name]) / counted for name in _ACTIVITIES}
    busy_s = (until - since - end.wall_s["checkpoints"]) / counted
    at_start_s = before["evaluation"]
    round_s["driver"] = max(0.0, busy_s - sum(round_s.values()))
    graphs = [assembled.driver.rules.topology.at(r) for r in range(_ROUNDS)]
    return Calibration(
        nodes=experiment.nodes.count,
        dim=assembled.start.dim,
        degree=assembled.start.neighbours_mean,
        samples=last.samples,
        all_samples=len(assembled.task.test),
        peak_bytes=peak_bytes(),
        start_s=start_s,
        own_s=time.perf_counter() - started,
        round_s=round_s,
        evaluation_s=end.wall_s["evaluation"] - at_start_s,
        checkpoint_s=end.wall_s["checkpoints"],
        sends=sum(len(receivers) for graph in graphs for receivers in graph.recipients),
        sent_bytes=sum(edge.bytes.total for edge in outcome.traffic),
    )


def _built(experiment: Experiment, folder: Path, look: Callable[[Progress], None]) -> AssembledRun:
    try:
        return build(experiment, folder=folder, on_progress=look)
    except ConfigError as error:
        if error.path != "run.eval_samples":
            raise
        return build(experiment.changed({"run": {"eval_samples": "all"}}), folder=folder, on_progress=look)


def _extrapolated(
    experiment: Experiment, degree: float, few: Calibration, many: Calibration, actors: int
) -> Forecast:
    run, num_nodes = experiment.run, experiment.nodes.count
    topology = build_topology(experiment)
    blocks = node_blocks(topology, actors, 1)
    largest = max(map(len, blocks))
    graph = topology.at(0)
    senders = [{sender for node in block for sender in graph.senders[node]} for block in blocks]
    per_degree = degree / many.degree if many.degree else 1.0

    def line(value: Callable[[Calibration], float], at: float) -> float:
        """Extrapolate two measurements linearly; in proportion to the nodes if 0 nodes would be below 0."""
        most = value(many) / many.nodes
        apart = many.nodes - few.nodes
        slope = min(max(0.0, (value(many) - value(few)) / apart), most) if apart else most
        return value(many) + slope * (at - many.nodes)

    round_s = {
        "training": line(lambda m: m.round_s["training"], largest),
        "share and merge": line(lambda m: m.round_s["share and merge"], largest) * per_degree,
        "decoding": line(lambda m: m.round_s["decoding"], max(map(len, senders))),
        "driver": line(lambda m: m.round_s["driver"], num_nodes) * per_degree,
    }
    completed = sorted(evaluation_rounds(experiment))  # 0 is the first
    all_samples = many.all_samples if run.eval_samples == "all" else run.eval_samples
    early = run.eval_samples_early or all_samples
    last = min(run.eval_last, len(completed) - 1)
    samples = (all_samples * last + early * (len(completed) - 1 - last)) / (len(completed) - 1)
    frame_bytes = (few.sent_bytes + many.sent_bytes) / max(1, few.sends + many.sends)
    own = [set(block) for block in blocks]
    crossing = sum(len(of - mine) for of, mine in zip(senders, own, strict=True))
    return Forecast(
        num_nodes=num_nodes,
        dim=many.dim,
        actors=actors,
        rounds=run.rounds,
        evaluations=len(completed),
        memory_bytes=line(lambda m: m.peak_bytes, largest),
        start_s=line(lambda m: m.start_s, largest),
        round_s=round_s,
        evaluation_s=largest * _model_test_s(few, many, samples),
        checkpoint_s=line(lambda m: m.checkpoint_s, num_nodes),
        checkpoints=(run.rounds - 1) // run.checkpoint_every,
        frame_bytes=frame_bytes,
        round_bytes=frame_bytes * sends(experiment, run.rounds) / run.rounds,
        stored_bytes=frame_bytes * crossing,
    )


def _model_test_s(few: Calibration, many: Calibration, samples: float) -> float:
    """Return the seconds of testing one model on a number of samples."""
    less, more = many.evaluation_s / many.nodes, few.evaluation_s / few.nodes
    apart = few.samples - many.samples
    slope = min(max(0.0, (more - less) / apart), less / many.samples) if apart else less / many.samples
    return less + slope * (samples - many.samples)
