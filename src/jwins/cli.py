"""The command line: ``jwins run``, ``compare``, ``report``, ``inspect`` and ``list``.

Torch is loaded only by the commands that need it, so help and errors in a configuration come at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from jwins.errors import CodecError, ConfigError, DataError, JwinsError

if TYPE_CHECKING:
    from rich.console import Console

    from jwins.compare import CellProgress, Compared
    from jwins.comparison import Comparison
    from jwins.engines.simulator import Progress
    from jwins.experiment import Experiment
    from jwins.run import Result

__all__ = ["app", "main"]

OK, FAILED, USAGE, DIVERGED, NO_DATA, INTERRUPTED = 0, 1, 2, 3, 4, 130

_PLAIN_LINES_S = 2.0
"""Without a terminal, progress is one line at most so often, and one per evaluation."""

_EPILOG = (
    "Exit codes: 0 done; 1 unexpected failure; 2 wrong usage or configuration; 3 the run diverged; "
    "4 data are missing; 130 interrupted (go on with --resume)."
)

app = typer.Typer(
    name="jwins",
    help="Decentralized learning that sends a fraction of the bytes.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a setting, e.g. --set run.rounds=50; may be repeated."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder with the data of tasks that need some.")
]


def main() -> None:
    """Entry point: runs the command line and leaves with one of the documented exit codes."""
    try:
        app()
    except KeyboardInterrupt:
        _leave("", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as in `jwins list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILED) from None


@contextmanager
def _errors() -> Iterator[None]:
    """Errors raised on purpose become one message and an exit code, without a traceback."""
    try:
        yield
    except DataError as error:
        _leave(_message(error), NO_DATA)
    except ConfigError as error:
        _leave(_message(error), USAGE)
    except JwinsError as error:
        from jwins.errors import ResumeError, UsageError

        _leave(_message(error), USAGE if isinstance(error, ResumeError | UsageError) else FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _leave(f"{where}{error.strerror or error}; what was saved before is intact", FAILED)


def _message(error: Exception) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _leave(message: str, code: int) -> NoReturn:
    console = _console(stderr=True)
    console.print(f"[bold red]{'interrupted' if code == INTERRUPTED else 'error'}[/]", end="")
    console.print(f": {message}" if message else "", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(code)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jwins {metadata.version('jwins')}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


# --- run --------------------------------------------------------------------------------------------------


@app.command(epilog=_EPILOG)
def run(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT.toml|NAME", help="A file, or a bundled experiment (see `jwins list`)."
        ),
    ],
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint; the result is the same bit for bit."),
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Write TensorBoard event files, too (extra: tensorboard)."),
    ] = False,
    quiet: Quiet = False,
    data: Data = None,
) -> None:
    """Run one experiment."""
    with _errors():
        from jwins.experiment import load

        given = [*(overrides or []), *_data_override(data)]
        if tensorboard:
            given.append("run.tensorboard=true")
        chosen = load(experiment, given)
        console = _console()
        result = _run(chosen, console, resume=resume, quiet=quiet)
        if result.status == "interrupted":
            _leave("go on with --resume", INTERRUPTED)
        if not quiet:
            _print_result(console, result)
        if result.status == "diverged":
            _leave(_divergence(result), DIVERGED)


def _data_override(data: Path | None) -> list[str]:
    if data is None:
        return []
    if not data.exists():
        raise DataError(f"--data {data}: there is no such folder")
    import json

    return [f"task.data={json.dumps(str(data.resolve()))}"]


def _run(experiment: Experiment, console: Console, *, resume: bool, quiet: bool) -> Result:
    from jwins.allocator import keep_freed_memory
    from jwins.run import simulate

    keep_freed_memory()
    if quiet:
        return simulate(experiment, resume=resume)
    if console.is_terminal:
        with _live_run(console, experiment) as tell:
            return simulate(experiment, resume=resume, progress=tell)
    console.print(f"{experiment.name}: {experiment.nodes.count} nodes, {experiment.run.rounds} rounds")
    return simulate(experiment, resume=resume, progress=_PlainRun(console))


class _PlainRun:
    """Progress as lines, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = _Clock()
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.row is None:
            return
        now = time.monotonic()
        if now - self._last < _PLAIN_LINES_S and progress.row.round != progress.rounds:
            return
        self._last = now
        means = {name: spread.mean for name, spread in progress.row.metrics.items()}
        left = self._clock.left(progress.round, progress.rounds)
        self._console.print(
            f"round {progress.row.round}/{progress.rounds}  {_metrics(means)}  "
            f"{_size(progress.row.traffic.total)} sent  {progress.row.time_s:.1f} virtual s  {left} left",
            soft_wrap=True,
        )


class _Clock:
    """Time left, from the rounds done since the first report (a resumed run does not start at 0)."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def left(self, round: int, rounds: int) -> str:
        """Like ``1:05``, or ``-:--`` while nothing is known."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, round)
        begun, first = self._start
        if round <= first:
            return "-:--"
        seconds = int((now - begun) / (round - first) * (rounds - round) + 0.5)
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


@contextmanager
def _live_run(console: Console, experiment: Experiment) -> Iterator[Callable[[Progress], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
        TextColumn("{task.fields[sent]}", markup=False),
        TextColumn("{task.fields[left]} left", markup=False),
    )
    clock, shown = _Clock(), 0.0
    with Bar(*columns, console=console, refresh_per_second=8) as bar:
        task = bar.add_task(experiment.name, total=experiment.run.rounds, metrics="", sent="", left="-:--")

        def tell(progress: Progress) -> None:
            nonlocal shown
            now = time.monotonic()
            if progress.row is not None:
                means = {name: spread.mean for name, spread in progress.row.metrics.items()}
                bar.update(task, metrics=_metrics(means))
            elif now - shown < 0.1 and progress.round < progress.rounds:
                return
            shown = now
            bar.update(
                task,
                completed=progress.round,
                sent=_size(progress.bytes_total),
                left=clock.left(progress.round, progress.rounds),
            )

        yield tell


def _metrics(means: dict[str, float | None]) -> str:
    shown = []
    for name, mean in means.items():
        if mean is None:
            shown.append(f"{name} —")
        elif name.endswith("accuracy"):
            shown.append(f"{name} {mean * 100:.1f} %")
        else:
            shown.append(f"{name} {mean:.3f}")
    return "  ".join(shown)


def _size(number: float) -> str:
    from jwins.report import size

    return size(number)


def _print_result(console: Console, result: Result) -> None:
    last = result.record.evaluations[-1]
    nodes = result.record.start.num_nodes
    if result.was_complete:
        console.print("this run is complete; nothing to do")
    means = {name: spread.mean for name, spread in last.metrics.items()}
    traffic = last.traffic
    console.print(
        f"{result.status} after {last.round} rounds, {last.time_s:.1f} virtual seconds: {_metrics(means)}"
    )
    split = ", ".join(
        f"{part} {_size(getattr(traffic, part))}"
        for part in ("values", "positions", "header", "key", "control")
    )
    console.print(
        f"{_size(traffic.total / nodes)} sent per node, {_size(traffic.total)} in all: {split}", soft_wrap=True
    )
    console.print(f"written to {result.folder}", soft_wrap=True)


def _divergence(result: Result) -> str:
    end = result.record.end
    assert end is not None
    reason = f": {end.reason}" if end.reason else ""
    return f"diverged in round {end.round}{reason}; a smaller train.optimizer.lr may help"


# --- compare ----------------------------------------------------------------------------------------------


@app.command(epilog=_EPILOG)
def compare(
    comparison: Annotated[
        str,
        typer.Argument(
            metavar="COMPARISON.toml|NAME", help="A file, or a bundled comparison (see `jwins list`)."
        ),
    ],
    overrides: Overrides = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="1,2,3", help="Seeds instead of the file's.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Runs side by side, each with one thread; by default one per core.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Keep finished runs and go on with interrupted ones, or refuse to."
        ),
    ] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="VARIANT",
            help="Run this variant only, and what its tuning needs; may be repeated.",
        ),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; make tables and figure of what is there.")
    ] = False,
    quiet: Quiet = False,
    data: Data = None,
) -> None:
    """Run several variants of an experiment over several seeds, and compare them like for like."""
    with _errors():
        from jwins.allocator import keep_freed_memory
        from jwins.compare import compare as run_comparison
        from jwins.compare import summarize
        from jwins.comparison import load_comparison

        given = [*(overrides or []), *_data_override(data)]
        chosen = load_comparison(comparison, given, seeds=_seeds(seeds))
        if report_only and only:
            raise ConfigError(
                "--only", ", ".join(only), "says what to run, and --report-only runs nothing; leave out one"
            )
        if not resume and chosen.folder.exists() and not report_only:
            raise ConfigError(
                "compare.folder", str(chosen.folder), "exists already; leave out --no-resume to go on"
            )
        keep_freed_memory()
        console = _console()
        names, say = only or [], partial(console.print, soft_wrap=True, markup=False)
        if report_only:
            compared = summarize(chosen, partial=True)
        elif quiet:
            compared = run_comparison(chosen, jobs=jobs, only=names)
        elif console.is_terminal:
            with _live_comparison(console, chosen, names) as tell:
                compared = run_comparison(chosen, jobs=jobs, progress=tell, only=names, say=say)
        else:
            tell = _PlainComparison(console, chosen, names)
            compared = run_comparison(chosen, jobs=jobs, progress=tell, only=names, say=say)
        if compared.status == "interrupted":
            _leave("the same command goes on", INTERRUPTED)
        if not quiet:
            _print_comparison(console, compared)


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            "--seeds", text, "expected whole numbers with commas between them, such as 1,2,3"
        ) from None


class _PlainComparison:
    """One line per finished cell."""

    def __init__(self, console: Console, comparison: Comparison, only: Sequence[str] = ()) -> None:
        self._console = console
        self._runs, _ = comparison.expected(only)
        self._done = 0
        console.print(f"{comparison.name}: {self._runs} runs", soft_wrap=True, markup=False)

    def __call__(self, progress: CellProgress) -> None:
        if progress.status == "running":
            return
        self._done += 1
        self._console.print(
            f"[{self._done}/{max(self._runs, self._done)}] {progress.name}: {progress.status}, "
            f"{_metrics(dict(progress.metrics or {}))}, {_size(progress.bytes_total)} sent",
            soft_wrap=True,
            markup=False,
        )


@contextmanager
def _live_comparison(
    console: Console, comparison: Comparison, only: Sequence[str] = ()
) -> Iterator[Callable[[CellProgress], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    _, total = comparison.expected(only)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    clock, ended = _Clock(), _PlainComparison(console, comparison, only)
    rounds: dict[int, int] = {}
    running: dict[int, Any] = {}
    with Bar(*columns, console=console, refresh_per_second=8) as bar:
        whole = bar.add_task(comparison.name, total=total, note="")

        def tell(progress: CellProgress) -> None:
            """A bar for each cell under way, and a line above the bars for each that has ended."""
            number = progress.cell
            over = progress.status != "running"
            rounds[number] = progress.rounds if over else progress.round
            done = sum(rounds.values())
            bar.update(whole, completed=done, note=f"rounds  {clock.left(done, total)} left")
            if over:
                if number in running:
                    bar.remove_task(running.pop(number))
                ended(progress)
                return
            if number not in running:
                running[number] = bar.add_task(f"  {progress.name}", total=progress.rounds, note="")
            note = f"{_metrics(dict(progress.metrics or {}))}  {_size(progress.bytes_total)}"
            bar.update(running[number], completed=progress.round, note=note)

        yield tell


def _print_comparison(console: Console, compared: Compared) -> None:
    from jwins.report import head_and_rows, targets_of

    target = compared.target
    if target is not None:
        _print_table(console, *head_and_rows(compared.table, target))
        for sentence in targets_of(compared.table, target):
            console.print(sentence, soft_wrap=True, markup=False)
    for note in compared.notes:
        console.print(note, soft_wrap=True, markup=False)
    for other in compared.further:
        console.print(f"\n[bold]{other.title}[/]")
        _print_table(console, other.head, other.rows)
        for note in other.notes:
            console.print(note, soft_wrap=True, markup=False)
    console.print(f"table and figure: {compared.folder}{os.sep}table.md, comparison.png", soft_wrap=True)


def _print_table(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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
            console.print(text, soft_wrap=True, markup=False)


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


# --- report -----------------------------------------------------------------------------------------------


@app.command(epilog=_EPILOG)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUNS...", help="Run folders, comparison folders, or folders of them, in any mixture."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.html",
            help="The page. [default: report.html in the folder, if one is given]",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures",
            metavar="DIR",
            help="Folder for the figures as PDF and PNG. [default: <page>-figures beside the page]",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Show this metric instead of the first.")
    ] = None,
    open_: Annotated[str, typer.Option("--open", metavar="yes|no", help="Open the page in a browser.")] = "no",
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML page about runs, and its figures as PDF and PNG."""
    with _errors():
        if open_ not in ("yes", "no"):
            raise ConfigError("--open", open_, "expected yes or no")
        if out is None:
            out = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
        if out.is_dir() or out.suffix not in (".html", ".htm"):
            raise ConfigError("--out", str(out), "expected a file that ends in .html")
        from jwins.page import write_page

        page, files = write_page(runs, out, figures=figures, metric=metric)
        if not quiet:
            console = _console()
            console.print(f"page: {page}", soft_wrap=True, markup=False)
            if files:
                console.print(
                    f"{len(files)} figures (PDF, PNG): {files[0].parent}", soft_wrap=True, markup=False
                )
        if open_ == "yes":
            import webbrowser

            webbrowser.open(page.resolve().as_uri())


# --- inspect and list -------------------------------------------------------------------------------------


@app.command(epilog=_EPILOG)
def inspect(
    frame: Annotated[Path, typer.Argument(metavar="FRAME", help="A file with the bytes of one frame.")],
) -> None:
    """Show what a frame contains."""
    with _errors():
        if frame.is_dir():
            raise ConfigError("FRAME", str(frame), "is a folder; expected a file with the bytes of one frame")
        if not frame.is_file():
            raise ConfigError("FRAME", str(frame), "there is no such file")
        from jwins.wire.frame import describe

        try:
            about = describe(frame.read_bytes())
        except CodecError as error:
            raise ConfigError("FRAME", str(frame), f"not a sound frame: {error}") from None
        console = _console()
        width = max(map(len, about))
        for key, value in about.items():
            shown = f"{value:.6g}" if isinstance(value, float) else value
            console.print(f"{key:<{width}}  {shown}", soft_wrap=True, markup=False)


@app.command("list", epilog=_EPILOG)
def list_(
    keys: Annotated[bool, typer.Option("--keys", help="Show every key of an experiment instead.")] = False,
) -> None:
    """Show bundled experiments, tasks, algorithms, topologies, partitioners and codecs."""
    with _errors():
        console = _console()
        if keys:
            from jwins.experiment import Experiment
            from jwins.settings import keys_of

            for key in keys_of(Experiment):
                when = f" ({key.when})" if key.when else ""
                default = f" = {key.default}" if key.default else ""
                kind = key.type.replace("\\|", "|")
                console.print(f"{key.path}{when}{default}", soft_wrap=True, markup=False)
                console.print(f"    {kind}; {key.meaning}", soft_wrap=True, markup=False)
            return
        for heading, entries in _catalogue():
            console.print(f"[bold]{heading}[/]")
            width = max(map(len, entries))
            for name, meaning in entries.items():
                console.print(f"  {name:<{width}}  {meaning}", soft_wrap=True, markup=False)


def _catalogue() -> list[tuple[str, dict[str, str]]]:
    from typing import get_args

    from jwins import experiment
    from jwins.tasks import TASKS
    from jwins.wire.codec import CODECS

    def of(*classes: Any) -> dict[str, str]:
        return {get_args(cls.model_fields["kind"].annotation)[0]: _first_sentence(cls) for cls in classes}

    e = experiment
    return [
        ("experiments and comparisons (jwins run NAME, jwins compare NAME)", e.bundled()),
        ("tasks (task.name)", {name: _first_sentence(cls) for name, cls in TASKS.items()}),
        (
            "sharing algorithms (sharing.kind)",
            of(e.FullConfig, e.RandomKConfig, e.TopKConfig, e.ChocoConfig, e.JwinsConfig),
        ),
        (
            "topologies (topology.kind)",
            of(
                e.RingConfig,
                e.FullyConnectedConfig,
                e.StarConfig,
                e.TorusConfig,
                e.RegularConfig,
                e.SmallWorldConfig,
                e.ErdosRenyiConfig,
                e.OnePeerExponentialConfig,
                e.EdgeListConfig,
            ),
        ),
        (
            "partitioners (task.partition.kind)",
            of(e.IidConfig, e.ShardsConfig, e.DirichletConfig, e.ByKeyConfig),
        ),
        ("codecs (wire.codec)", {name: _first_sentence(cls) for name, cls in CODECS.items()}),
    ]


def _first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").strip().partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")
