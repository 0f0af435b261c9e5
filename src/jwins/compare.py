"""Several variants of one experiment, over several seeds, like for like.

A comparison is a list of cells, one per variant and seed. Each cell is a run of its own, in
``<folder>/<variant>/seed-<seed>``: what is finished is not run again, what was interrupted goes on. All
variants of a seed must start from the same model, hold the same samples, see the same batches and use the
same codec.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from jwins.errors import ConfigError, ResumeError, UsageError
from jwins.experiment import Experiment, FullConfig, lay_over, read
from jwins.report import Group, Line, Record, Target, figure, lines, save_figure, save_tables
from jwins.run import FolderState, folder_state, raw_bytes_per_node, simulate
from jwins.settings import MISSING, Settings, TomlPath, Within, parse_overrides, refuse, write_toml

if TYPE_CHECKING:
    from jwins.engines.simulator import Progress

__all__ = [
    "Cell",
    "CellProgress",
    "CompareConfig",
    "Compared",
    "Comparison",
    "TargetConfig",
    "Variant",
    "compare",
    "load_comparison",
]

Like = Literal["model", "partition", "batches", "evaluation", "codec"]


# --- Settings ---------------------------------------------------------------------------------------------


class TargetConfig(Settings):
    """The value of the metric that bytes, rounds and seconds are counted to. One of the keys is given."""

    accuracy: float | None = Field(default=None, description="reach this value of the metric")
    fraction: Annotated[float, Within("a fraction", 0, open_low=True)] | None = Field(
        default=None, description="reach this fraction of full sharing's final value"
    )
    way: Annotated[float, Within("a fraction", 0, 1, open_low=True)] | None = Field(
        default=None, description="go this fraction of full sharing's way from its first to its final value"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [key for key in ("accuracy", "fraction", "way") if getattr(self, key) is not None]
        if len(given) != 1:
            raise refuse("", self.model_dump(exclude_none=True), "expected one of accuracy, fraction, way")
        return self


class CompareConfig(Settings):
    """How variants are compared."""

    seeds: Annotated[
        tuple[Annotated[int, Within("a signed 64-bit number", -(2**63), 2**63 - 1)], ...],
        Field(strict=False, min_length=1),
    ] = Field(default=(1,), description="each variant runs once per seed")
    metric: str = Field(default="accuracy", description="what is compared: a metric of the task")
    lower_is_better: bool = Field(default=False, description="for metrics such as loss")
    target: TargetConfig = TargetConfig(fraction=0.95)
    final_over: Annotated[int, Within("a whole number", 1)] = Field(
        default=1, description="last evaluations whose mean is the final value"
    )
    full: str | None = Field(
        default=None, description="variant that savings refer to; left out: the first with full sharing"
    )
    folder: TomlPath | None = Field(
        default=None, description="where everything is written; left out: runs/<name>"
    )

    @model_validator(mode="after")
    def _different(self) -> Self:
        for index, seed in enumerate(self.seeds):
            if seed in self.seeds[:index]:
                raise refuse(f"seeds[{index}]", seed, "is in the list already")
        return self


class Variant(Settings):
    """One variant of the comparison.

    Attributes:
        name: what table and figure call it.
        experiment: as it is run, but for seed and folder.
        allow_different: what need not be the same as in the other variants.
    """

    name: str = Field(min_length=1)
    experiment: Experiment
    allow_different: Annotated[tuple[Like, ...], Field(strict=False)] = ()

    @property
    def slug(self) -> str:
        """The variant's folder."""
        return re.sub(r"[^a-z0-9._]+", "-", self.name.lower()).strip("-.") or "variant"


class VariantTable(Settings):
    """An entry of ``[[variants]]``: its own keys; all others are an experiment's."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="what table and figure call it", min_length=1)
    allow_different: Annotated[tuple[Like, ...], Field(strict=False)] = Field(
        default=(), description="what need not be as in the other variants"
    )


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    variant: Variant
    seed: int
    experiment: Experiment

    @property
    def folder(self) -> Path:
        """The cell's run folder."""
        return self.experiment.folder


class Comparison(Settings):
    """Variants, seeds and how they are compared; see :func:`load_comparison` for the TOML form."""

    name: str = Field(min_length=1)
    variants: Annotated[tuple[Variant, ...], Field(strict=False, min_length=1)]
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        slugs: dict[str, int] = {}
        for index, variant in enumerate(self.variants):
            if variant.slug in slugs:
                other = self.variants[slugs[variant.slug]].name
                raise refuse(
                    f"variants[{index}].name",
                    variant.name,
                    f"has the same folder as {other!r}; choose another name",
                )
            slugs[variant.slug] = index
        names = [variant.name for variant in self.variants]
        if self.compare.full is not None and self.compare.full not in names:
            raise refuse("compare.full", self.compare.full, f"expected a variant: {', '.join(names)}")
        if self.full is None and self.compare.target.accuracy is None:
            raise refuse(
                "compare.target",
                self.compare.target.model_dump(exclude_none=True),
                "refers to full sharing, but no variant has sharing.kind = 'full'; write { accuracy = 0.9 }",
            )
        for index, variant in enumerate(self.variants):
            self._check_alike(index, variant)
        return self

    def _check_alike(self, index: int, variant: Variant) -> None:
        """What must differ by the settings alone is found before anything runs."""
        first = self.variants[0]
        keys = {"wire.codec": "codec", "train.batch_size": "batches", "train.local_steps": "batches"}
        keys |= {"task.partition": "partition", "nodes.count": "partition"}
        for key, like in keys.items():
            section, _, name = key.partition(".")
            mine = getattr(getattr(variant.experiment, section), name)
            other = getattr(getattr(first.experiment, section), name)
            if mine != other and like not in (*variant.allow_different, *first.allow_different):
                raise refuse(
                    f"variants[{index}].{key}",
                    mine,
                    f"{first.name!r} has {other!r}, so the two are not like for like; "
                    f"use the same, or say allow_different = [{like!r}]",
                )

    @property
    def full(self) -> Variant | None:
        """The variant that savings refer to."""
        if self.compare.full is not None:
            return next(variant for variant in self.variants if variant.name == self.compare.full)
        return next((v for v in self.variants if isinstance(v.experiment.sharing, FullConfig)), None)

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.compare.folder if self.compare.folder is not None else Path("runs") / self.name

    def cells(self, *, threads: int | None = None) -> list[Cell]:
        """All runs, all variants of a seed before the next seed.

        Args:
            threads: for each cell, instead of what the experiment says.
        """
        return [
            Cell(variant, seed, variant.experiment.changed(self._of_cell(variant, seed, threads)))
            for seed in self.compare.seeds
            for variant in self.variants
        ]

    def _of_cell(self, variant: Variant, seed: int, threads: int | None) -> dict[str, Any]:
        run: dict[str, Any] = {"seed": seed, "folder": self.folder / variant.slug / f"seed-{seed}"}
        if threads is not None:
            run["threads"] = threads
        return {"name": f"{self.name}: {variant.name}".replace("/", "-"), "run": run}


def load_comparison(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] | None = None,
) -> Comparison:
    """A comparison from a TOML file, or a bundled one by name.

    ``base`` names the experiment all variants start from; the file's own sections lie over it, each
    variant's keys over those, and ``overrides`` over everything.

    Args:
        source: file or name.
        overrides: ``key=value`` assignments; ``compare.…`` concerns the comparison, all else every variant.
        seeds: instead of the file's.

    Raises:
        ConfigError: with TOML path, value and remedy.
    """
    tables, origin = read(source)
    try:
        return _comparison(tables, parse_overrides(overrides), seeds, source)
    except ConfigError as error:
        error.add_note(f"in {origin}")
        raise


def _comparison(
    tables: dict[str, Any], given: dict[str, Any], seeds: Sequence[int] | None, source: str | Path
) -> Comparison:
    if "variants" not in tables:
        raise ConfigError(
            "variants", MISSING, "required in a comparison; run a single experiment with `jwins run`"
        )
    tables = dict(tables)
    entries, settings, base = tables.pop("variants"), tables.pop("compare", {}), tables.pop("base", None)
    if isinstance(settings, Mapping):
        settings = {**settings, **given.pop("compare", {})}
    if seeds is not None:
        settings = {**settings, "seeds": list(seeds)}
    if not isinstance(entries, list):
        raise ConfigError("variants", entries, "expected an array of tables: [[variants]]")
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError("base", base, "expected the name or the file of an experiment")
        beside = Path(source).parent / base
        start, _ = read(beside if beside.is_file() else base)
        name = tables.get("name", Path(str(source)).stem)
        tables = {**lay_over(start, tables), "name": name}
    tables.setdefault("name", Path(str(source)).stem)
    variants = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"variants[{index}]", entry, "expected a table")
        try:
            table = VariantTable(**entry)
        except ConfigError as error:
            raise ConfigError(f"variants[{index}].{error.path}", error.value, error.problem) from None
        own = table.model_extra or {}
        try:
            experiment = Experiment(**lay_over(lay_over(tables, own), given))
        except ConfigError as error:
            error.add_note(f"in variants[{index}], {table.name!r}")
            raise
        variants.append(Variant(name=table.name, experiment=experiment, allow_different=table.allow_different))
    return Comparison(name=tables["name"], variants=tuple(variants), compare=settings)


# --- Running the cells ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CellProgress:
    """How far a cell is.

    Attributes:
        cell: its number in :meth:`Comparison.cells`.
        round: completed rounds.
        rounds: of the whole cell.
        bytes_total: sent so far, by all nodes.
        metrics: newest means over the nodes, by metric.
        status: ``running``, ``finished``, ``diverged`` or ``interrupted``.
    """

    cell: int
    round: int
    rounds: int
    bytes_total: int = 0
    metrics: Mapping[str, float | None] | None = None
    status: str = "running"


@dataclass(frozen=True)
class Compared:
    """A comparison's outcome.

    Attributes:
        comparison: what was compared.
        folder: has ``table.md``, ``table.csv``, ``summary.json``, ``comparison.png`` and ``.pdf``.
        table: one line per variant.
        target: what bytes, rounds and seconds were counted to.
        groups: the runs.
        status: ``finished``, or ``interrupted`` with an empty table.
    """

    comparison: Comparison
    folder: Path
    table: list[Line]
    target: Target | None
    groups: list[Group]
    status: str


def compare(
    comparison: Comparison,
    *,
    jobs: int | None = None,
    progress: Callable[[CellProgress], None] | None = None,
) -> Compared:
    """Run all cells that are not finished, check that they are like for like, and write tables and figure.

    Args:
        comparison: what to compare.
        jobs: cells side by side, each in a process of its own with one thread; None: one per core, at
            most one per unfinished cell. With 1, cells run in this process.
        progress: told how far the cells are.

    Raises:
        ConfigError: a cell cannot be built as written, or variants are not like for like.
        DataError: data are missing.
        ResumeError: a cell's folder holds another experiment.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs = {jobs}: expected at least 1")
    tell = progress or (lambda _: None)
    cells = comparison.cells()
    todo = [index for index, cell in enumerate(cells) if _state(cell) is not FolderState.COMPLETE]
    comparison.folder.mkdir(parents=True, exist_ok=True)
    for index in sorted(set(range(len(cells))) - set(todo)):
        tell(_last_progress(cells[index], index, Record.read(cells[index].folder)))
    jobs = min(jobs or _cores(), len(todo)) or 1
    if jobs > 1:
        cells = comparison.cells(threads=1)
        statuses = _run_side_by_side(cells, todo, jobs, tell)
    else:
        statuses = _run_one_by_one(cells, todo, tell)
    if "interrupted" in statuses:
        return Compared(comparison, comparison.folder, [], None, [], "interrupted")
    return summarize(comparison)


def summarize(comparison: Comparison) -> Compared:
    """Tables and figure of a comparison whose cells have all been run.

    Raises:
        DataError: a cell has not been run.
        ConfigError: variants are not like for like.
    """
    cells = comparison.cells()
    records = {(cell.variant.name, cell.seed): Record.read(cell.folder) for cell in cells}
    _check_like_for_like(comparison, records)
    groups = []
    for variant in comparison.variants:
        own = tuple(records[variant.name, seed] for seed in comparison.compare.seeds)
        raw = tuple(
            raw_bytes_per_node(cell.experiment, record.start.dim, record.rounds)
            for cell in cells
            if cell.variant is variant
            for record in [records[variant.name, cell.seed]]
        )
        groups.append(Group(variant.name, getattr(variant.experiment.sharing, "kind", "own"), own, raw))
    target = _target(comparison, groups)
    full = comparison.full.name if comparison.full is not None else None
    settings = comparison.compare
    table = lines(groups, target, full=full, final_over=settings.final_over)
    folder = comparison.folder
    about = {
        "name": comparison.name,
        "seeds": list(settings.seeds),
        "full_sharing": full,
        "final_over": settings.final_over,
        "versions": groups[0].records[0].start.versions,
        "machine": groups[0].records[0].start.machine,
    }
    save_tables(folder, table, target, about)
    drawing = figure(groups, target, metric=settings.metric, title=_title(comparison, groups))
    save_figure(drawing, folder / "comparison.png")
    _save_configs(comparison)
    return Compared(comparison, folder, table, target, groups, "finished")


def _title(comparison: Comparison, groups: Sequence[Group]) -> str:
    seeds = len(comparison.compare.seeds)
    nodes = groups[0].records[0].start.num_nodes
    return f"{comparison.name} · {nodes} nodes · {seeds} seed{'s' if seeds != 1 else ''}"


def _save_configs(comparison: Comparison) -> None:
    """``<variant>/experiment.toml``: each variant as it was run, but for the seed."""
    for variant in comparison.variants:
        folder = comparison.folder / variant.slug
        tables = variant.experiment.resolved(folder)
        del tables["run"]["seed"], tables["run"]["folder"]
        (folder / "experiment.toml").write_text(write_toml(tables), encoding="utf-8")


def _state(cell: Cell) -> FolderState:
    return folder_state(cell.experiment, cell.folder)[0]


def _target(comparison: Comparison, groups: Sequence[Group]) -> Target:
    settings, wanted = comparison.compare, comparison.compare.target
    if wanted.accuracy is not None:
        return Target(settings.metric, wanted.accuracy, settings.lower_is_better)
    assert comparison.full is not None  # checked when the comparison was made
    full = next(group for group in groups if group.name == comparison.full.name)
    final = statistics.fmean(record.final(settings.metric, settings.final_over) for record in full.records)
    if wanted.fraction is not None:
        value, meaning = final * wanted.fraction, f"{wanted.fraction:.0%} of the final value of {full.name}"
    else:
        assert wanted.way is not None
        start = statistics.fmean(record.series(settings.metric)[0] for record in full.records)
        value = start + wanted.way * (final - start)
        meaning = f"{wanted.way:.0%} of the way of {full.name} from start to end"
    return Target(settings.metric, value, settings.lower_is_better, meaning.replace("%", " %"))


def _check_like_for_like(comparison: Comparison, records: Mapping[tuple[str, int], Record]) -> None:
    """All variants of a seed have the same fingerprints, as far as they do not say otherwise."""
    first = comparison.variants[0]
    for seed in comparison.compare.seeds:
        expected = records[first.name, seed].start.fingerprints
        for variant in comparison.variants[1:]:
            found = records[variant.name, seed].start.fingerprints
            for what in expected:
                allowed = what in (*first.allow_different, *variant.allow_different)
                if found.get(what) != expected[what] and not allowed:
                    raise ConfigError(
                        f"variants: {variant.name!r}, seed {seed}, {what}",
                        found.get(what),
                        f"{first.name!r} has {expected[what]!r}, so the two are not like for like; make them "
                        f"the same, or say allow_different = [{what!r}] in the variant",
                    )


def _last_progress(cell: Cell, index: int, record: Record) -> CellProgress:
    last = record.evaluations[-1] if record.evaluations else None
    metrics = {} if last is None else {name: spread.mean for name, spread in last.metrics.items()}
    sent = 0 if last is None else last.traffic.total
    status = "interrupted" if record.end is None else record.end.status
    return CellProgress(index, record.rounds, cell.experiment.run.rounds, sent, metrics, status)


class _Reporter:
    """Turns a simulator's progress into a cell's: one message per round, not per event."""

    def __init__(self, index: int, send: Callable[[CellProgress], None], stop: Callable[[], bool]) -> None:
        self._index, self._send, self._stop = index, send, stop
        self._round = -1
        self._metrics: dict[str, float | None] = {}
        self._stopped = False

    def __call__(self, progress: Progress) -> None:
        if progress.row is not None:
            self._metrics = {name: spread.mean for name, spread in progress.row.metrics.items()}
        if progress.row is not None or progress.round != self._round:
            self._round = progress.round
            self._send(
                CellProgress(
                    self._index, progress.round, progress.rounds, progress.bytes_total, dict(self._metrics)
                )
            )
        if not self._stopped and self._stop():
            self._stopped = True
            signal.raise_signal(signal.SIGINT)  # the simulator leaves a checkpoint


def _run_cell(
    cell: Cell, index: int, send: Callable[[CellProgress], None], stop: Callable[[], bool] = lambda: False
) -> str:
    result = simulate(cell.experiment, resume=True, progress=_Reporter(index, send, stop))
    send(_last_progress(cell, index, result.record))
    return result.status


def _run_one_by_one(
    cells: Sequence[Cell], todo: Sequence[int], tell: Callable[[CellProgress], None]
) -> list[str]:
    statuses = []
    for index in todo:
        statuses.append(_run_cell(cells[index], index, tell))
        if statuses[-1] == "interrupted":
            break
    return statuses


# Worker processes. They are no part of the terminal's process group, so Ctrl-C reaches the parent only, which
# sets ``stop``; every cell then ends with a checkpoint. If the parent is killed, they go, too.

_to_parent: Any = None
_stop: Any = None


def _begin_worker(to_parent: Any, stop: Any) -> None:
    global _to_parent, _stop
    _to_parent, _stop = to_parent, stop
    with contextlib.suppress(AttributeError, OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _work(cell: Cell, index: int) -> str:
    if _stop.is_set():
        return "interrupted"
    return _run_cell(cell, index, _to_parent.put, _stop.is_set)


def _run_side_by_side(
    cells: Sequence[Cell], todo: Sequence[int], jobs: int, tell: Callable[[CellProgress], None]
) -> list[str]:
    context = multiprocessing.get_context("spawn")
    messages, stop = context.SimpleQueue(), context.Event()  # what a worker puts is there before its result
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=(messages, stop))
    try:
        waiting = {pool.submit(_work, cells[index], index) for index in todo}
        done: list[Future[str]] = []
        with _interrupts_set(stop):
            while waiting:
                finished, waiting = wait(waiting, timeout=0.1)
                for message in _drain(messages):
                    tell(message)
                done += finished
                if any(future.exception() is not None for future in finished):
                    stop.set()
        for message in _drain(messages):
            tell(message)
        errors = [error for future in done if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in done]
    except BrokenProcessPool:
        raise ResumeError(
            "a worker process died, perhaps for lack of memory; run again with a lower --jobs, and finished "
            "cells stay finished"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        messages.close()


@contextlib.contextmanager
def _interrupts_set(stop: Any) -> Iterator[None]:
    """Ctrl-C asks the workers to stop, and waits until they have."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _drain(messages: Any) -> Iterator[CellProgress]:
    while not messages.empty():
        yield messages.get()


def _cores() -> int:
    with contextlib.suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
