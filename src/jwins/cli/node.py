"""``jwins node``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jwins.cli.app import (
    DIVERGED,
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
from jwins.cli.progress import metrics_text, size_text
from jwins.cli.run import data_override

if TYPE_CHECKING:
    from rich.console import Console

    from jwins.net.driver import NodeProgress

_LINES_S = 5.0
_SAY_WAITING_AFTER_S = 2.0

NeighbourTimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--neighbour-timeout",
        metavar="SECONDS",
        help="Minimum time to wait for a neighbour; longer timeouts adapt to the observed times. "
        "Default: run.deadline_s, or 30.",
    ),
]


@app.command(epilog=EPILOG)
def node(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT.toml|NAME",
            help="File, the same on all machines, or name of a bundled experiment.",
        ),
    ],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="Name of this node in the roster.")],
    roster: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="List of the members, the same file on all machines. A running node follows its changes.",
        ),
    ] = Path("roster.toml"),
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Private key of this node. Default: NAME.key.")
    ] = None,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of this node. Default: nodes/<i> in the run folder."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address to listen at, if it differs from the roster."),
    ] = None,
    neighbour_timeout: NeighbourTimeoutOption = None,
    metrics: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="Port for a status page and /metrics, on loopback only."),
    ] = None,
    keep_models: Annotated[
        bool,
        typer.Option(
            "--keep-models", help="Keep the model of each evaluation, to compare those of all nodes later."
        ),
    ] = False,
    bootstrap_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Member that provides the model and round to begin with; repeatable: if one does not, "
            "the next is asked. Default: the common initial parameters.",
        ),
    ] = None,
    quiet: Quiet = False,
    data: Data = None,
) -> None:
    """Run one node of an experiment, connected with the others; continue from its newest checkpoint."""
    with reported_errors():
        from jwins.experiment.load import load
        from jwins.net.roster import read_roster
        from jwins.run.node import run_node
        from jwins.training.allocator import keep_freed_memory

        chosen = load(experiment, [*(overrides or []), *data_override(data)])
        members = read_roster(roster)
        console = console_of()
        keep_freed_memory()
        result = run_node(
            chosen,
            members,
            name,
            key if key is not None else Path(f"{name}.key"),
            folder=folder,
            timeout_s=neighbour_timeout,
            listen=listen,
            keep_models=keep_models,
            metrics_port=metrics,
            progress=None if quiet else _Lines(console),
            roster_file=roster,
            bootstrap_from=bootstrap_from or [],
        )
        if result.status == "interrupted":
            leave("run the same command to go on", INTERRUPTED)
        if not quiet:
            outcome = "this run is complete; nothing to do" if result.was_complete else result.status
            say(console, f"{outcome}, {result.round} rounds; written to {result.folder}")
        if result.status == "diverged":
            leave(f"diverged in round {result.round}; try a smaller train.optimizer.lr", DIVERGED)


class _Lines:
    """Progress as lines, every few seconds and at evaluations."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0

    def __call__(self, now: NodeProgress, names: Sequence[str]) -> None:
        """Print a line at an evaluation, or if the last line is some seconds old."""
        if now.row is None and time.monotonic() - self._last < _LINES_S:
            return
        self._last = time.monotonic()
        texts = [f"round {now.round}/{now.rounds}", f"{size_text(now.bytes_total)} sent", f"{now.time_s:.1f} s"]
        if now.row is not None:
            texts.append(metrics_text(now.row.means))
        if now.waiting_for and now.waiting_s >= _SAY_WAITING_AFTER_S:
            texts.append(f"waiting for {_listed(now.waiting_for, names)} for {now.waiting_s:.0f} s")
        if now.suspect:
            texts.append(f"without {_listed(now.suspect, names)}")
        say(self._console, "  ".join(texts))


def _listed(peers: tuple[int, ...], names: Sequence[str]) -> str:
    return ", ".join(names[peer] for peer in peers)
