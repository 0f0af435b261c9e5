"""Run experiments in run folders.

A run folder has ``config.toml`` (the experiment, resolved), ``partition.json`` and
``partition.safetensors`` (the samples of each node), ``metrics.jsonl`` (append-only), ``checkpoints/`` and, in
the end, ``final/node-<i>.safetensors``. The experiment's digest decides whether it can be continued.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from jwins.engines.callbacks import Callback, MeasuredModels
from jwins.engines.interrupts import interrupts
from jwins.engines.simulator.driver import Progress
from jwins.errors import ActorLostError, ResumeError, UsageError
from jwins.experiment.experiment import Experiment
from jwins.run.assembly import Place, build
from jwins.run.builders import write_partition
from jwins.run.extend import extend as make_longer
from jwins.run.folder import FolderState, check_resume, folder_state, goes_on
from jwins.run.result import Result
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.lock import locked
from jwins.run_folder.record import Record
from jwins.run_folder.rows import EvalRow
from jwins.run_folder.tensorboard import TensorBoard


@dataclass(frozen=True, slots=True)
class Ray:
    """Ray cluster as the engine of a run (extra ``ray``). Results do not depend on its machines.

    A program that has called ``ray.init`` uses the cluster of that connection.

    Attributes:
        actors: actors that share the nodes of a simulation, each with ``run.threads`` cores (1 if left out).
        address: address of a running cluster; ``auto`` for the one on this machine. None for ``$RAY_ADDRESS``
            or, without it, for a cluster of this machine alone.
        restarts: number of times that a simulation continues from its last checkpoint after the loss of an
            actor, and each run of a comparison after the loss of its machine.

    Raises:
        UsageError: a number out of range.

    Example::

        result = jwins.simulate(experiment, engine=jwins.Ray(actors=4, address="auto"))
    """

    actors: int = 1
    address: str | None = None
    restarts: int = 3

    def __post_init__(self) -> None:
        for name, value, least in (("actors", self.actors, 1), ("restarts", self.restarts, 0)):
            if value < least:
                raise UsageError(f"{name} = {value}: expected at least {least}")


def simulate(
    experiment: Experiment,
    *,
    resume: bool = False,
    extend: bool = False,
    progress: Callable[[Progress], None] | None = None,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] = lambda: False,
    engine: Ray | None = None,
) -> Result:
    """Run an experiment in its folder.

    Args:
        experiment: experiment to run, in ``experiment.folder``.
        resume: continue from the newest checkpoint, or from the start without one; if the run is
            complete, only read it.
        extend: as ``resume``, also where the run in the folder had fewer rounds or another ``run.stop``. The
            result is that of a run of this experiment from the start.
        progress: called after every step of the driver.
        callbacks: called at the start, after rounds and evaluations, and at the end, in this order; see
            :class:`jwins.Callback`. A complete run calls only ``on_end``.
        stop: called after every step, from any thread; True ends the run.
        engine: Ray cluster whose machines have the nodes; None for this process.

    Returns:
        The measurements. A run that its ``run.stop`` ended has status ``stopped``. The argument ``stop`` and,
        on the main thread, Ctrl-C leave a checkpoint and return with status ``interrupted``; a second Ctrl-C
        ends at once.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
        ResumeError: the folder has another experiment, or this one without ``resume``.
        ActorLostError: actors were lost more often than ``engine.restarts``.
        UsageError: no such cluster exists, or it is unsuitable; an argument has a wrong type.
    """
    _check_arguments(experiment, progress, callbacks, stop, engine)
    started = time.perf_counter()
    folder = experiment.folder
    if extend:
        make_longer(experiment, folder)
    state, experiment = folder_state(experiment, folder)
    check_resume(folder, state, resume or extend)
    if state is FolderState.COMPLETE:
        record = Record.read(folder)
        assert record.end is not None
        if experiment.run.tensorboard:
            with TensorBoard(folder) as written:
                written.replay()
        return _ended(callbacks, Result(experiment, folder, record.end.status, record, was_complete=True))

    board = TensorBoard(folder) if experiment.run.tensorboard else contextlib.nullcontext()
    done: int | None = None

    def on_progress(now: Progress) -> None:
        nonlocal done
        if done is not None and now.round > done:
            for callback in callbacks:
                callback.on_round(now)
        done = now.round
        if now.row is not None and isinstance(board, TensorBoard):
            board.add(now.row)
        if progress is not None:
            progress(now)

    with _usual_torch(), board, interrupts() as interrupted:
        asked = experiment, folder, on_progress, lambda: interrupted() or stop(), started, callbacks
        once = partial(_simulate, *asked)
        return _ended(
            callbacks, once(state) if engine is None else _on_cluster(once, engine, experiment, folder)
        )


def _check_arguments(
    experiment: object, progress: object, callbacks: Sequence[Callback], stop: object, engine: object
) -> None:
    for name, value, fits, expected in (
        ("experiment", experiment, isinstance(experiment, Experiment), "an Experiment, as of jwins.load"),
        ("progress", progress, progress is None or callable(progress), "a function"),
        ("callbacks", callbacks, isinstance(callbacks, list | tuple), "a list of callbacks"),
        ("stop", stop, callable(stop), "a function"),
        ("engine", engine, engine is None or isinstance(engine, Ray), "jwins.Ray(...)"),
    ):
        if not fits:
            raise UsageError(f"simulate: {name} = {value!r}: expected {expected}")
    for index, callback in enumerate(callbacks):
        methods = ("on_start", "on_round", "on_evaluation", "on_end")
        missing = [name for name in methods if not callable(getattr(callback, name, None))]
        problem = "is a class; pass an instance" if isinstance(callback, type) else ""
        if missing and not problem:
            problem = f"has no {', '.join(missing)}; derive its class from jwins.Callback"
        if problem:
            raise UsageError(f"callbacks[{index}] = {callback!r}: {problem}")


def _ended(callbacks: Sequence[Callback], result: Result) -> Result:
    for callback in callbacks:
        callback.on_end(result)
    return result


def _on_cluster(once: Callable[..., Result], engine: Ray, experiment: Experiment, folder: Path) -> Result:
    """Run on a cluster; after the loss of an actor continue from the last checkpoint."""
    from jwins.run.on_ray import cluster_of, placing  # imports ray, which is an extra

    with cluster_of(engine):
        for attempt in itertools.count():
            try:
                with placing(engine) as place:
                    return once(folder_state(experiment, folder)[0], place)
            except ActorLostError as error:
                if attempt == engine.restarts:
                    error.add_note(f"it has happened {attempt + 1} times; continue with --resume (resume=True)")
                    raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _usual_torch() -> Iterator[None]:
    """Within the block, use torch's default type and device of new tensors; preserve the caller's settings.

    Training sets torch to one thread; the caller's number is restored at the end.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    elsewhere = torch.get_default_device().type != "cpu"  # otherwise a context only slows calls
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu") if elsewhere else contextlib.nullcontext(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def _simulate(
    experiment: Experiment,
    folder: Path,
    on_progress: Callable[[Progress], None],
    stop: Callable[[], bool],
    started: float,
    callbacks: Sequence[Callback],
    state: FolderState,
    place: Place | None = None,
) -> Result:
    def on_evaluation(row: EvalRow, models: MeasuredModels) -> None:
        for callback in callbacks:
            callback.on_evaluation(copy.deepcopy(row), models)

    assembled = build(
        experiment,
        folder=folder,
        place=place,
        on_progress=on_progress,
        stop=stop,
        on_evaluation=on_evaluation if callbacks else None,
        started=started,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "this experiment"):
        if folder_state(experiment, folder)[0] is not state:
            raise ResumeError(
                f"{folder}: another process has just run this experiment here; run the command again"
            )
        if state is FolderState.ABSENT:
            write_atomically(folder / "config.toml", assembled.experiment.to_toml(folder).encode())
        write_partition(folder, assembled.task, assembled.partition)
        going_on = goes_on(folder, assembled.start)
        for callback in callbacks:
            callback.on_start(assembled.experiment)
        outcome = assembled.driver.run(resume=going_on)
    return Result(assembled.experiment, folder, outcome.status, Record.of(folder, outcome.rows))
