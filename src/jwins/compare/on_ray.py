"""A comparison's runs as tasks of a Ray cluster.

No shared file system is needed. The files that a run writes on its machine are copied here during the run. So
its folder here is always in a state that a local run would have had a little earlier. If its machine is lost,
the run continues elsewhere from the checkpoint that is here.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jwins.compare.workers import CellProgress, Job, OnProgress, run_job, with_one_thread
from jwins.engines.interrupts import interrupts
from jwins.engines.ray.cluster import Demand, check_capacity
from jwins.engines.ray.files import FileSharing
from jwins.errors import JwinsError, ResumeError
from jwins.experiment.experiment import Experiment
from jwins.experiment.toml import read_toml
from jwins.run.memory import memory_needed
from jwins.run.on_ray import RemoteExperiment, cluster_of, pack_experiment
from jwins.run.run import Ray
from jwins.run_folder.atomic import write_atomically
from jwins.training.allocator import keep_freed_memory, trim_freed_memory
from jwins.training.training_context import resolve_device

_PULSE_S = 0.3
"""Minimum interval between a run's reports; a report takes a few milliseconds."""

_LOG, _CONFIG = "metrics.jsonl", "config.toml"


def on_cluster(jobs: Sequence[Job], on_progress: OnProgress, *, engine: Ray) -> list[str]:
    """Carry out runs on the machines of a Ray cluster, each with one thread."""
    with cluster_of(engine):
        return _Runs([with_one_thread(job) for job in jobs], engine.restarts, on_progress).run()


# --- Copies of run folders ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delta:
    """Changes in a run's folder.

    Attributes:
        files: new or changed files, by name.
    """

    files: Mapping[str, bytes]
    gone: tuple[str, ...]


class _Watch:
    """Detector of changes in a folder since the last call. No other code writes there during a call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = self._stamps()

    def changes(self) -> Delta:
        now = self._stamps()
        changed = [name for name in now if self._seen.get(name) != now[name]]
        gone = tuple(name for name in self._seen if name not in now)
        self._seen = now
        return Delta({name: (self._folder / name).read_bytes() for name in changed}, gone)

    def _stamps(self) -> dict[str, tuple[int, int]]:
        stats = {name: path.stat() for name, path in _files(self._folder).items()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _files(folder: Path) -> dict[str, Path]:
    """Return the files by name, without locks and incomplete files."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _apply(delta: Delta, folder: Path, experiment: Experiment) -> None:
    """Update a folder in an order that allows a run to continue after an interruption at any time.

    The log's last row marks a complete run, so all files but checkpoints are written before it. A checkpoint
    refers to earlier rows, and is written after its shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    late = (_LOG, "checkpoints/shard-", "checkpoints/round-")

    def place(name: str) -> int:
        return next((k for k, start in enumerate(late, 2) if name.startswith(start)), int(name != _CONFIG))

    for name in sorted(delta.files, key=place):
        content = delta.files[name]
        if name == _CONFIG:
            content = _as_from_here(content, experiment).encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content)
    for name in delta.gone:
        (folder / name).unlink(missing_ok=True)


def _as_from_here(content: bytes, experiment: Experiment) -> str:
    """Return the resolved experiment with the folders of this machine."""
    stored = read_toml(content.decode(), _CONFIG)
    resolved = {
        "run": {"device": stored["run"]["device"], "folder": experiment.folder},
        "train": {"batching": stored["train"]["batching"]},
    }
    return experiment.changed(resolved).to_toml(experiment.folder)


# --- On the machines ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunReport:
    """Report of a run."""

    index: int
    attempt: int
    progress: tuple[CellProgress, ...]
    delta: Delta


class _Mailbox:
    """Actor to which runs report, and which tells them whether to stop."""

    def __init__(self) -> None:
        self._reports: list[RunReport] = []
        self._stop = False

    def post(self, report: RunReport | None) -> bool:
        if report is not None:
            self._reports.append(report)
        return self._stop

    def collect(self, stop: bool) -> list[RunReport]:
        self._stop = stop
        reports, self._reports = self._reports, []
        return reports


def _carry_out(
    job: Job, attempt: int, there: RemoteExperiment, before: Mapping[str, bytes], mailbox: Any
) -> str:
    """Run one job in a temporary folder of this machine."""
    if ray.get(mailbox.post.remote(None)):
        return "interrupted"
    keep_freed_memory()
    root = Path(tempfile.mkdtemp(prefix="jwins-run-"))
    try:
        folder = root / "run"
        for name, content in before.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        experiment = there.unpack().changed({"run": {"folder": folder}})
        courier = _Courier(job, attempt, folder, mailbox)
        status = run_job(replace(job, experiment=experiment), courier.on_progress, courier.stop)
        courier.send()
        return status
    except JwinsError as error:
        error.add_note(f"on {platform.node()}")
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)
        trim_freed_memory()  # Ray reuses the process for the next run


class _Courier:
    """Sender of a run's reports: at intervals, and at checkpoints, so that only later rounds can be lost."""

    def __init__(self, job: Job, attempt: int, folder: Path, mailbox: Any) -> None:
        self._job, self._attempt, self._mailbox = job, attempt, mailbox
        self._watch, self._checkpoints = _Watch(folder), folder / "checkpoints"
        self._unsent: list[CellProgress] = []
        self._stop, self._last, self._written = False, 0.0, 0

    def on_progress(self, progress: CellProgress) -> None:
        self._unsent.append(progress)

    def stop(self) -> bool:
        """Return whether to stop. The driver calls this before every step, so reports are sent here."""
        written = self._checkpoints.stat().st_mtime_ns if self._checkpoints.exists() else 0
        if written != self._written or time.monotonic() - self._last >= _PULSE_S:
            self._written = written
            self.send()
        return self._stop

    def send(self) -> None:
        """Send a report now."""
        report = RunReport(self._job.index, self._attempt, tuple(self._unsent), self._watch.changes())
        self._stop = ray.get(self._mailbox.post.remote(report)) or self._stop
        self._unsent = []
        self._last = time.monotonic()


# --- On this machine ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Running:
    job: Job
    there: RemoteExperiment
    demand: Demand
    attempt: int = 0


class _Runs:
    """Jobs on the cluster until all have ended."""

    def __init__(self, jobs: Sequence[Job], restarts: int, on_progress: OnProgress) -> None:
        self._restarts, self._on_progress = restarts, on_progress
        self._running: dict[Any, _Running] = {}
        self._newest: dict[int, _Running] = {}
        self._error: Exception | None = None
        self._statuses: list[str] = []
        self._shipping = FileSharing()
        memory_bytes = memory_needed([job.experiment for job in jobs])
        planned = []
        for job in jobs:
            device = resolve_device(job.experiment.run.device).type
            there = pack_experiment(job.experiment.changed({"run": {"device": device}}), self._shipping)
            planned.append(_Running(job, there, Demand(1, memory_bytes, gpus=int(device == "cuda"))))
        for demand in {run.demand for run in planned}:
            check_capacity(demand, 1, "runs")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = ray.remote(num_cpus=0)(_Mailbox).options(scheduling_strategy=here).remote()
        for run in planned:
            self._submit(run)

    def run(self) -> list[str]:
        try:
            with interrupts() as interrupted:
                while self._running:
                    ended, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0.1)
                    stop = interrupted() or self._error is not None
                    self._take_in(ray.get(self._mailbox.collect.remote(stop)))
                    for reference in ended:
                        self._end(reference, self._running.pop(reference), stop)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise ResumeError(
                f"the cluster is gone ({reason}); the same command continues from the files here"
            ) from None
        finally:
            for reference in self._running:
                ray.cancel(reference, force=True)
            ray.kill(self._mailbox)
        if self._error is not None:
            raise self._error
        return self._statuses

    def _submit(self, run: _Running) -> None:
        self._newest[run.job.index] = run
        folder = run.job.experiment.folder
        before = {name: path.read_bytes() for name, path in _files(folder).items()}
        task = ray.remote(max_retries=0)(_carry_out)
        named = task.options(name=run.job.name, **run.demand.resources)
        reference = named.remote(run.job, run.attempt, run.there, ray.put(before), self._mailbox)
        self._running[reference] = run

    def _take_in(self, reports: Sequence[RunReport]) -> None:
        progress_made: list[CellProgress] = []
        for report in reports:
            run = self._newest[report.index]
            if report.attempt == run.attempt:
                _apply(report.delta, run.job.experiment.folder, run.job.experiment)
                progress_made += report.progress
        for progress in progress_made:
            if self._error is None:
                try:
                    self._on_progress(progress)
                except Exception as error:  # stops all runs, and is raised when they have ended
                    self._error = error

    def _end(self, reference: Any, run: _Running, stop: bool) -> None:
        try:
            self._statuses.append(ray.get(reference))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # raised by the run, not by Ray
            if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(
                cause, ray.exceptions.RayError
            ):
                self._error = self._error or (cause if isinstance(cause, JwinsError | OSError) else error)
            elif stop:
                self._statuses.append("interrupted")
            elif run.attempt < self._restarts:
                self._submit(replace(run, attempt=run.attempt + 1))
            else:
                reason = str(error).strip().splitlines()[0]
                self._error = self._error or ResumeError(
                    f"{run.job.name}: lost {run.attempt + 1} times ({reason}); "
                    f"the same command continues from its last checkpoint"
                )
