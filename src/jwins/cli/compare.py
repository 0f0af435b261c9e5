"""``jwins compare``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from jwins.cli.app import (
    EPILOG,
    INTERRUPTED,
    Address,
    Data,
    EngineName,
    Overrides,
    Quiet,
    app,
    console_of,
    engine_of,
    leave,
    reported_errors,
    say,
)
from jwins.cli.progress import comparison_progress
from jwins.cli.run import data_override
from jwins.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from jwins.compare.comparison import Comparison
    from jwins.compare.result import ComparisonResult
    from jwins.compare.workers import CellProgress


@app.command(epilog=EPILOG)
def compare(
    comparison: Annotated[
        str,
        typer.Argument(
            metavar="COMPARISON.toml|NAME", help="File, or name of a bundled comparison (see `jwins list`)."
        ),
    ],
    overrides: Overrides = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Seeds that replace those of the file.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", min=1, help="Number of parallel runs, each with one thread. Default: one per core."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Keep finished runs and continue interrupted ones, or refuse to."
        ),
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT", help="Run only this variant and the runs that its tuning needs; repeatable."
        ),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; make tables and figure from finished runs.")
    ] = False,
    cell: Annotated[
        str | None,
        typer.Option(
            metavar="I", help="Run a single run, given by its number or its folder in that of the comparison."
        ),
    ] = None,
    print_array: Annotated[
        bool,
        typer.Option(
            "--print-array", help="Print a SLURM script that runs all unfinished runs as a job array."
        ),
    ] = False,
    engine: EngineName = None,
    address: Address = None,
    quiet: Quiet = False,
    data: Data = None,
) -> None:
    """Run several variants of an experiment over several seeds, and compare them."""
    with reported_errors():
        _check_together(
            {"--report-only": report_only, "--cell": cell is not None, "--print-array": print_array}
        )
        chosen_engine = engine_of(engine, address)
        if chosen_engine is not None and (cell is not None or print_array or jobs is not None):
            raise UsageError(
                "--engine ray fills the cluster by itself; leave out --jobs, --cell, --print-array"
            )
        from jwins.compare.comparison import load_comparison
        from jwins.compare.result import summarize
        from jwins.compare.runner import compare as run_comparison
        from jwins.run.builders import advice
        from jwins.training.allocator import keep_freed_memory

        given = [*(overrides or []), *data_override(data)]
        chosen = load_comparison(comparison, given, seeds=_seeds(seeds))
        if report_only and only:
            problem = "contradicts --report-only, which runs nothing; leave out one of them"
            raise ConfigError("--only", ", ".join(only), problem)
        if not resume and chosen.folder.exists() and not report_only:
            raise ConfigError(
                "compare.folder", str(chosen.folder), "exists already; leave out --no-resume to continue"
            )
        if print_array:
            from jwins.compare.job_array import array_script

            typer.echo(array_script(chosen, _command(comparison, given, seeds, only), only or []), nl=False)
            return
        keep_freed_memory()
        console = console_of()
        if cell is not None:
            _run_cell(chosen, cell, console, only or [], quiet=quiet)
            return
        names, log = only or [], partial(say, console)
        for variant in () if report_only or quiet else chosen.variants:
            for note in advice(variant.experiment) if not names or variant.name in names else ():
                log(f"note: {variant.name}: {note}")
        if report_only:
            compared = summarize(chosen, partial=True)
        elif quiet:
            compared = run_comparison(chosen, jobs=jobs, engine=chosen_engine, only=names)
        else:
            with comparison_progress(console, chosen, names) as on_progress:
                compared = run_comparison(
                    chosen, jobs=jobs, engine=chosen_engine, progress=on_progress, only=names, log=log
                )
        if compared.status == "interrupted":
            leave("run the same command to go on", INTERRUPTED)
        if not quiet:
            _print_comparison(console, compared)


def _check_together(given: Mapping[str, bool]) -> None:
    wanted = [option for option, is_given in given.items() if is_given]
    if len(wanted) > 1:
        raise UsageError(f"{' and '.join(wanted)} exclude each other; keep only one")


def _command(comparison: str, given: Sequence[str], seeds: str | None, only: Sequence[str] | None) -> list[str]:
    """Return the words that run the same comparison from the same folder."""
    words = ["jwins", "compare", comparison]
    words += [word for text in given for word in ("--set", text)]
    words += [] if seeds is None else ["--seeds", seeds]
    return words + [word for name in only or [] for word in ("--only", name)]


def _run_cell(chosen: Comparison, cell: str, console: Console, only: Sequence[str], *, quiet: bool) -> None:
    from jwins.compare.job_array import run_cell

    def on_progress(progress: CellProgress) -> None:
        if not quiet and (progress.status != "running" or progress.round % 10 == 0):
            of = f"{progress.name}: {progress.status}, round {progress.round} of {progress.rounds}"
            say(console, of)

    if run_cell(chosen, cell, on_progress, only) == "interrupted":
        leave("run the same command to go on", INTERRUPTED)


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            "--seeds", text, "expected whole numbers separated by commas, such as 1,2,3"
        ) from None


def _print_comparison(console: Console, compared: ComparisonResult) -> None:
    from jwins.report.comparison_table import head_and_rows, targets_of

    target = compared.target
    if target is not None:
        print_table(console, *head_and_rows(compared.table, target))
        for sentence in targets_of(compared.table, target):
            say(console, sentence)
    for note in compared.notes:
        say(console, note)
    for other in compared.further:
        console.print(f"\n[bold]{other.title}[/]")
        print_table(console, other.head, other.rows)
        for note in other.notes:
            say(console, note)
    say(console, f"table and figure: {compared.folder}{os.sep}table.md, comparison.png")


def print_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of columns on a terminal, of aligned lines elsewhere."""
    if console.is_terminal:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, heading in enumerate(head):
            table.add_column(heading, justify="left" if index in (0, len(head) - 1) else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        for text in _plain_table([head, *rows]):
            say(console, text)


def _plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
