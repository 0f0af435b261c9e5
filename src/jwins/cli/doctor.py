"""``jwins doctor``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jwins.cli.app import EPILOG, USAGE, Overrides, app, console_of, leave, reported_errors, say
from jwins.errors import DataError

if TYPE_CHECKING:
    from jwins.engines.memory import ExchangeMemory
    from jwins.net.doctor import Judge


@app.command(epilog=EPILOG)
def doctor(
    roster: Annotated[Path, typer.Argument(metavar="ROSTER", help="File of the roster, such as roster.toml.")],
    name: Annotated[str, typer.Option("--as", metavar="NAME", help="Name of this machine in the roster.")],
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Private key of NAME. Default: NAME.key beside the roster."),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(
            metavar="EXPERIMENT.toml|NAME", help="Ask each neighbour whether it runs this experiment."
        ),
    ] = None,
    sets: Overrides = None,
) -> None:
    """Find out why nodes do not connect: check key, certificate, clock, port, memory and each neighbour."""
    with reported_errors():
        from jwins.net.doctor import examine
        from jwins.net.roster import read_roster

        console = console_of()
        problems = 0
        judge, exchange = (None, None) if experiment is None else _of_experiment(experiment, sets or [])
        key = key or roster.parent / f"{name}.key"
        for finding in examine(read_roster(roster), name, key, judge=judge, exchange=exchange):
            mark = {True: "ok  ", False: "FAIL", None: "-   "}[finding.good]
            say(console, f"{mark}  {finding.about}: {finding.detail}")
            if finding.remedy:
                say(console, f"      remedy: {finding.remedy}")
            problems += finding.good is False
        if problems:
            leave(f"{problems} problem{'' if problems == 1 else 's'}", USAGE)


def _of_experiment(experiment: str, sets: list[str]) -> tuple[Judge, ExchangeMemory | None]:
    """Return the comparison of greetings, and the memory of the exchange unless the task's data are missing.

    Nodes always train with ``batching = "loop"``.
    """
    from jwins.experiment import load
    from jwins.net.handshake import greeting_mismatch
    from jwins.run.builders import build_task
    from jwins.run.memory import exchange_of, trained_parameters
    from jwins.run.node import greeting_of

    chosen = load(experiment, sets).changed({"train": {"batching": "loop"}})
    ours, exchange = greeting_of(chosen), None
    with contextlib.suppress(DataError):
        exchange = exchange_of(chosen, trained_parameters(build_task(chosen))[0])
    return lambda greeting: greeting_mismatch(greeting, ours) or None, exchange
