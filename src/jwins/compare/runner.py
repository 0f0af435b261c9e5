"""Carry out the runs of a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from jwins.compare.comparability import TaskChangeCheck, version_note
from jwins.compare.comparison import Cell, Comparison
from jwins.compare.plan import plan, set_aside
from jwins.compare.result import ComparisonResult, summarize
from jwins.compare.settings import CompareConfig
from jwins.compare.workers import (
    CellProgress,
    Job,
    Workers,
    in_process,
    last_progress,
    runs_that_fit,
    side_by_side,
)
from jwins.engines.memory import memory_free
from jwins.errors import ConfigError, DataError, ResumeError, UsageError
from jwins.experiment.error_messages import nearest
from jwins.run.folder import FolderState, check_folder, folder_state
from jwins.run.memory import memory_needed
from jwins.run.provenance import cores
from jwins.run.run import Ray
from jwins.run_folder.lock import locked
from jwins.run_folder.record import Record
from jwins.run_folder.rows import StartRow
from jwins.training.training_context import resolve_device


def compare(
    comparison: Comparison,
    *,
    jobs: int | None = None,
    progress: Callable[[CellProgress], None] | None = None,
    only: Collection[str] = (),
    log: Callable[[str], None] | None = None,
    engine: Ray | None = None,
) -> ComparisonResult:
    """Run all cells that are not finished, check that they are comparable, and write tables and figure.

    Args:
        comparison: the comparison.
        jobs: number of parallel cells, each in a process with one thread. None: one per core, as far as
            memory allows. At most one per unfinished cell. With 1, cells run in this process.
        progress: called with the progress of cells.
        only: names of variants to run; the tables then have all finished runs. Empty for all.
        log: called with notes for the user, for example about a lack of memory.
        engine: Ray cluster that carries out the cells in place of this machine's processes; leave ``jobs``
            out then.

    Raises:
        ConfigError: a cell cannot be built, variants are not comparable, or the first evaluation
            lacks a metric that the comparison requires.
        DataError: data are missing.
        ResumeError: a cell's folder has another experiment, or another process runs this comparison.
        UsageError: no such cluster exists, or it is unsuitable.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs = {jobs}: expected at least 1")
    if jobs is not None and engine is not None:
        raise UsageError(f"jobs = {jobs}: with a Ray cluster, its size decides; leave jobs out")
    workers = None if engine is None else _on_ray(engine)
    _check_only(comparison, only)
    outer, log_line = progress or (lambda _: None), log or (lambda _: None)

    def on_progress(of: CellProgress) -> None:
        _check_metrics(comparison.compare, of.metrics or ())
        outer(of)

    check_folder("compare.folder", comparison.folder)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    with locked(comparison.folder, "this comparison"):
        return _compare(comparison, jobs, on_progress, only, log_line, workers)


def _compare(
    comparison: Comparison,
    jobs: int | None,
    on_progress: Callable[[CellProgress], None],
    only: Collection[str],
    log_line: Callable[[str], None],
    workers: Workers | None,
) -> ComparisonResult:
    numbers: dict[tuple[Path, str], int] = {}
    cells: dict[int, Cell] = {}
    done: set[str] = set()
    starts: dict[int, StartRow] = {}
    unchanged, noted = TaskChangeCheck(), False

    def report_on(of: CellProgress) -> None:
        """Pass the progress on, and check the first row of a run as soon as it is written."""
        nonlocal noted
        cell = cells[of.cell]
        if of.cell not in starts and (start := _start_of(cell)) is not None:
            starts[of.cell] = start
            unchanged.check(cell, start)
            note = version_note(starts.values())
            if note is not None and not noted:
                noted = True
                log_line(note)
        on_progress(of)

    while True:
        todo: list[Job] = []
        for cell in plan(comparison, only).cells:
            begun = (cell.folder, cell.name) in numbers
            number = numbers.setdefault((cell.folder, cell.name), len(numbers))
            cells[number] = cell
            job = Job(number, cell.name, cell.experiment)
            set_aside(cell)
            if folder_state(cell.experiment, cell.folder)[0] is not FolderState.COMPLETE:
                todo.append(job)
            elif not begun:
                report_on(last_progress(job, Record.read(cell.folder)))
        if not todo:
            break
        again = [job for job in todo if job.name in done]  # a further attempt at equal bytes has another name
        if again:
            raise ResumeError(
                f"{again[0].experiment.folder}: this run has ended but is incomplete; remove "
                f"its folder and run again"
            )
        done |= {job.name for job in todo}
        run = workers
        if run is None:
            count = _workers(todo, jobs, log_line)
            run = partial(side_by_side, workers=count) if count > 1 else in_process
        statuses = run(todo, report_on)
        if "interrupted" in statuses:
            return ComparisonResult(comparison, comparison.folder, [], None, [], "interrupted")
    return summarize(comparison, only=only)


def _start_of(cell: Cell) -> StartRow | None:
    """Return the first row of a run; None if it has not arrived yet."""
    with contextlib.suppress(DataError):
        return Record.read(cell.folder).start
    return None


def _check_only(comparison: Comparison, only: Collection[str]) -> None:
    names = [variant.name for variant in comparison.variants]
    for name in only:
        if name not in names:
            raise ConfigError("--only", name, f"expected a variant: {', '.join(names)}{nearest(name, names)}")


def _check_metrics(settings: CompareConfig, measured: Collection[str]) -> None:
    """Check that an evaluation has all required metrics, if there is one."""
    wanted = [("compare.metric", settings.metric)]
    wanted += [(f"compare.also[{index}]", name) for index, name in enumerate(settings.also)]
    for path, name in wanted:
        if measured and name not in measured:
            problem = f"expected a metric of the task: {', '.join(measured)}{nearest(name, measured)}"
            raise ConfigError(path, name, problem)


def _on_ray(engine: Ray) -> Workers:
    from jwins.compare.on_ray import on_cluster  # imports ray, which is an extra

    return partial(on_cluster, engine=engine)


def _workers(todo: Sequence[Job], wanted: int | None, log: Callable[[str], None]) -> int:
    """Return the requested number of parallel runs, with a note if it is too large."""
    workers = min(wanted or cores(), len(todo))
    if workers == 1:
        return 1
    if wanted is None and any(resolve_device(job.experiment.run.device).type == "cuda" for job in todo):
        log("one run at a time, as they share a GPU; --jobs runs more side by side")
        return 1
    fit, remark = runs_that_fit(workers, memory_needed([job.experiment for job in todo]), memory_free())
    if not remark:
        return workers
    if wanted is not None:
        log(f"memory may not do for {workers} runs side by side, as asked for: {remark.partition(': ')[2]}")
        return workers
    log(remark)
    return fit
