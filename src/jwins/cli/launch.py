"""``jwins launch``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jwins.cli.app import (
    EPILOG,
    INTERRUPTED,
    Data,
    Overrides,
    Quiet,
    app,
    console_of,
    leave,
    reported_errors,
    say,
)
from jwins.cli.node import NeighbourTimeoutOption
from jwins.cli.progress import metrics_text, size_text
from jwins.cli.run import data_override, end_command
from jwins.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from jwins.experiment.experiment import Experiment
    from jwins.run.launch import Launched, NodeView
    from jwins.run.result import Result

_LINES_S = 2.0


@app.command(epilog=EPILOG, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    experiment: Annotated[
        str | None,
        typer.Argument(
            metavar="EXPERIMENT.toml|NAME",
            help="File, or name of a bundled experiment (see `jwins list`); arguments of a --script.",
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run, each node from its newest checkpoint.")
    ] = False,
    neighbour_timeout: NeighbourTimeoutOption = None,
    quiet: Quiet = False,
    data: Data = None,
    script: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.py",
            help="Run this training loop as several peers; `jwins.Peer(model)` finds roster and key.",
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="Number of peers, with --script.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --script: keys, checkpoints and logs. Default: temporary, removed at the end.",
        ),
    ] = None,
) -> None:
    """Run all nodes of an experiment as processes on this machine, over real connections."""
    with reported_errors():
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")  # the nodes have the processors
        further = [*([] if experiment is None else [experiment]), *context.args]
        console = console_of()
        if script is not None:
            _only_of_experiments(overrides, resume, neighbour_timeout, data)
            _launch_script(script, further, console, nodes=nodes, folder=folder, quiet=quiet)
            return
        if experiment is None or context.args:
            problem = "expected one experiment" if not context.args else "no such option or argument"
            raise ConfigError("EXPERIMENT.toml|NAME", " ".join(further) or None, problem)
        if nodes is not None or folder is not None:
            raise ConfigError(
                "--script", None, "--nodes and --folder are for a script; use --set nodes.count=N"
            )
        from jwins.experiment.load import load

        chosen = load(experiment, [*(overrides or []), *data_override(data)])
        result = _launch(chosen, console, resume=resume, timeout_s=neighbour_timeout, quiet=quiet)
        end_command(console, result, quiet=quiet)


def _only_of_experiments(
    overrides: list[str] | None, resume: bool, timeout_s: float | None, data: Path | None
) -> None:
    given = {"--set": overrides, "--resume": resume, "--neighbour-timeout": timeout_s, "--data": data}
    for option, value in given.items():
        if value:
            problem = "is for experiments; arguments of a script that look alike come after --"
            raise ConfigError(option, str(value), problem)


def _launch_script(
    script: Path, arguments: list[str], console: Console, *, nodes: int | None, folder: Path | None, quiet: bool
) -> None:
    from jwins.run.script import launch_script

    if nodes is None:
        raise ConfigError("--nodes", None, "expected the number of peers, such as --nodes 3")

    def line(name: str, text: str) -> None:
        say(console, f"{name} | {text}")

    def run(progress: Callable[[tuple[NodeView, ...]], None] | None) -> str:
        return launch_script(script, arguments, count=nodes or 0, folder=folder, line=line, progress=progress)

    if quiet or not console.is_terminal:
        status = run(None)
    else:
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            status = run(lambda views: live.update(_table(script.name, "round", views), refresh=True))
    if status == "interrupted":
        leave("", INTERRUPTED)


def _launch(
    experiment: Experiment, console: Console, *, resume: bool, timeout_s: float | None, quiet: bool
) -> Result:
    from jwins.run.launch import launch as run

    if quiet:
        return run(experiment, resume=resume, timeout_s=timeout_s)
    if console.is_terminal:
        with _live(console, experiment) as on_progress:
            return run(experiment, resume=resume, timeout_s=timeout_s, progress=on_progress)
    say(console, f"{experiment.name}: {experiment.nodes.count} processes, {experiment.run.rounds} rounds")
    return run(experiment, resume=resume, timeout_s=timeout_s, progress=_Lines(console))


class _Lines:
    """Progress as lines, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._printed = ""

    def __call__(self, now: Launched) -> None:
        gone = " ".join(f"{view.name} {view.state}" for view in now.nodes if view.state == "killed")
        if now.row is not None and (
            time.monotonic() - self._last >= _LINES_S or now.row.round in (0, now.rounds)
        ):
            self._last = time.monotonic()
            means = now.row.means
            say(
                self._console,
                f"round {now.row.round}/{now.rounds}  {metrics_text(means)}  "
                f"{size_text(now.row.traffic.total)} sent  {now.row.time_s:.1f} s",
            )
        if gone and gone != self._printed:
            say(self._console, gone)
        self._printed = gone


@contextmanager
def _live(console: Console, experiment: Experiment) -> Iterator[Callable[[Launched], None]]:
    """Show a table with a line for each node."""
    from rich.live import Live

    measured: dict[str, str] = {}

    def on_progress(now: Launched) -> None:
        if now.row is not None:
            means = now.row.means
            measured["caption"] = f"after {now.row.round} rounds: {metrics_text(means)}"
        table = _table(experiment.name, f"round of {now.rounds}", now.nodes, measured.get("caption"))
        live.update(table, refresh=True)

    with Live(console=console, auto_refresh=False) as live:
        yield on_progress


def _table(name: str, round_head: str, views: tuple[NodeView, ...], caption: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=name, caption=caption)
    for head in ("node", "state", round_head, "sent", "waits for", "without", "restarts"):
        table.add_column(head)
    for view in views:
        waits = f"{', '.join(view.waiting_for)} ({view.waiting_s:.0f} s)" if view.waiting_s >= 1.0 else ""
        cells = [view.name, view.state, str(view.round), size_text(view.bytes_total), waits]
        table.add_row(*cells, ", ".join(view.suspect), str(view.restarts) if view.restarts else "")
    return table
