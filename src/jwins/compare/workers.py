"""Workers that carry out runs: this process, or processes side by side; progress and Ctrl-C.

Each run continues where it stopped and leaves a checkpoint when it is interrupted, as with
``simulate(resume=True)``. This module does not depend on the purpose of the runs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from jwins.engines.interrupts import interrupts
from jwins.engines.simulator.driver import Progress
from jwins.errors import ResumeError
from jwins.experiment.experiment import Experiment
from jwins.report.formatting import size
from jwins.run.run import simulate
from jwins.run_folder.record import Record
from jwins.training.allocator import keep_freed_memory


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    index: int
    name: str
    experiment: Experiment


@dataclass(frozen=True, slots=True)
class CellProgress:
    """Progress of a run.

    Attributes:
        round: completed rounds.
        bytes_total: bytes sent so far by all nodes.
        metrics: newest means over the nodes, by metric.
        status: ``running``, ``finished``, ``diverged`` or ``interrupted``.
        name: name for people, such as "JWINS, seed 1".
    """

    cell: int
    round: int
    rounds: int
    bytes_total: int = 0
    metrics: Mapping[str, float | None] | None = None
    status: str = "running"
    name: str = ""


OnProgress = Callable[[CellProgress], None]


def last_progress(job: Job, record: Record) -> CellProgress:
    """Return the end of a run, or the round of its interruption."""
    last = record.evaluations[-1] if record.evaluations else None
    metrics = {} if last is None else last.means
    sent = 0 if last is None else last.traffic.total
    status = "interrupted" if record.end is None else record.end.status
    return CellProgress(job.index, record.rounds, job.experiment.run.rounds, sent, metrics, status, job.name)


Workers = Callable[[Sequence[Job], OnProgress], list[str]]
"""Function that carries out runs, and returns their ends, fewer if interrupted.

Runs start in this order; an interrupted run in a folder continues. At the end each run's folder is on this
machine, even if it ran elsewhere. Progress is reported on the calling thread, and an error there ends all
runs. If a run raises a JwinsError, the others stop with a checkpoint. A ResumeError means that a worker died,
and that its run cannot continue elsewhere.
"""


def in_process(jobs: Sequence[Job], on_progress: OnProgress) -> list[str]:
    """Carry out one run after the other in this process, with the experiment's number of threads."""
    statuses = []
    for job in jobs:
        statuses.append(run_job(job, on_progress))
        if statuses[-1] == "interrupted":
            break
    return statuses


def with_one_thread(job: Job) -> Job:
    """Return the same run with one thread, for parallel runs."""
    return replace(job, experiment=job.experiment.changed({"run": {"threads": 1}}))


def run_job(job: Job, send: OnProgress, stop: Callable[[], bool] = lambda: False) -> str:
    """Run one job in this process; the driver calls ``stop`` after every step."""
    newest, metrics = -1, dict[str, float | None]()

    def report(now: Progress) -> None:
        """Send one message per round and evaluation, in place of one per event."""
        nonlocal newest, metrics
        if now.row is None and now.round == newest:
            return
        newest, metrics = now.round, metrics if now.row is None else now.row.means
        send(CellProgress(job.index, now.round, now.rounds, now.bytes_total, metrics, name=job.name))

    result = simulate(job.experiment, resume=True, progress=report, stop=stop)
    send(last_progress(job, result.record))
    return result.status


# They are no part of the terminal's process group, so Ctrl-C reaches the parent only, which sets ``stop``;
# every run then ends with a checkpoint. If the parent is killed, they go, too.
_to_parent: Any = None

_stop: Any = None


def _begin_worker(to_parent: Any, stop: Any) -> None:
    global _to_parent, _stop
    _to_parent, _stop = to_parent, stop
    keep_freed_memory()
    with contextlib.suppress(AttributeError, OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _work(job: Job) -> str:
    if _stop.is_set():
        return "interrupted"
    return run_job(job, _to_parent.put, _stop.is_set)


def side_by_side(jobs: Sequence[Job], on_progress: OnProgress, *, workers: int) -> list[str]:
    """Carry out runs in parallel on this machine, each in a process with one thread."""
    context = multiprocessing.get_context("spawn")
    messages, stop = context.SimpleQueue(), context.Event()  # messages of a worker arrive before its result
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin_worker, initargs=(messages, stop)
    )
    futures: set[Future[str]] = set()
    try:
        futures = {pool.submit(_work, with_one_thread(job)) for job in jobs}
        waiting = set(futures)
        done: list[Future[str]] = []
        with interrupts() as interrupted:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.1)
                if interrupted():
                    stop.set()
                for message in _drain(messages):
                    on_progress(message)
                done += finished
                if any(future.exception() is not None for future in finished):
                    stop.set()
        for message in _drain(messages):
            on_progress(message)
        errors = [error for future in done if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in done]
    except BrokenProcessPool:
        raise ResumeError(
            "a worker process died, perhaps for lack of memory; run again with a lower --jobs; finished "
            "cells are kept"
        ) from None
    finally:
        stop.set()
        # If ``on_progress`` raised, a full pipe would block the workers.
        while wait(futures, timeout=0.1).not_done:
            for _ in _drain(messages):
                pass
        pool.shutdown(cancel_futures=True)
        messages.close()


def _drain(messages: Any) -> Iterator[CellProgress]:
    while not messages.empty():
        yield messages.get()


def runs_that_fit(wanted: int, needed: float, free: float | None) -> tuple[int, str]:
    """Return the number of parallel runs that fit, at least one, and a note if it was reduced.

    >>> runs_that_fit(8, 4e9, 10e9)
    (2, '2 runs side by side instead of 8: each may need 4 GB of memory, and 10 GB are free')
    """
    if free is None or wanted * needed <= free:
        return wanted, ""
    fit = max(1, int(free // needed))
    if fit == wanted:  # not even one fits, but one was requested
        return fit, f"a run may need {size(needed)} of memory, and {size(free)} are free"
    return fit, (
        f"{fit} run{'s' if fit != 1 else ''} side by side instead of {wanted}: each may need {size(needed)} of "
        f"memory, and {size(free)} are free"
    )
