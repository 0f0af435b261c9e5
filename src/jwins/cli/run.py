"""``jwins run``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jwins.cli.app import (
    DIVERGED,
    EPILOG,
    FAILED,
    INTERRUPTED,
    Address,
    Data,
    EngineName,
    ExperimentFile,
    Overrides,
    Quiet,
    app,
    console_of,
    engine_of,
    leave,
    reported_errors,
    say,
)
from jwins.cli.progress import metrics_text, run_progress, size_text
from jwins.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from jwins.experiment.experiment import Experiment
    from jwins.run.result import Result
    from jwins.run.run import Ray


@app.command(epilog=EPILOG)
def run(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the newest checkpoint; the result is the same bit for bit."
        ),
    ] = False,
    extend: Annotated[
        int | None,
        typer.Option(
            metavar="ROUNDS",
            min=1,
            help="Go on to this number of rounds where a shorter run has ended; the result is that of a run of "
            "as many rounds from the start.",
        ),
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Also write TensorBoard event files (extra: tensorboard)."),
    ] = False,
    engine: EngineName = None,
    address: Address = None,
    actors: Annotated[
        int | None,
        typer.Option(metavar="K", min=1, help="Number of processes of the cluster that share the nodes."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Estimate memory, time and bytes from a few rounds of a few nodes, and exit."
        ),
    ] = False,
    quiet: Quiet = False,
    data: Data = None,
) -> None:
    """Run one experiment."""
    with reported_errors():
        chosen_engine = engine_of(engine, address, actors)
        from jwins.experiment.load import load

        given = [*(overrides or []), *data_override(data)]
        if extend is not None:
            given.append(f"run.rounds={extend}")
        if tensorboard:
            given.append("run.tensorboard=true")
        chosen = load(experiment, given)
        console = console_of()
        if plan:
            _print_plan(console, chosen, chosen_engine)
            return
        longer = extend is not None
        result = _run(chosen, console, chosen_engine, resume=resume, extend=longer, quiet=quiet)
        end_command(console, result, quiet=quiet)


def data_override(data: Path | None) -> list[str]:
    """Return the override of ``--data``; raise DataError if the folder does not exist."""
    if data is None:
        return []
    if not data.exists():
        raise DataError(f"--data {data}: there is no such folder")
    import json

    return [f"task.data={json.dumps(str(data.resolve()))}"]


def _run(
    experiment: Experiment, console: Console, engine: Ray | None, *, resume: bool, extend: bool, quiet: bool
) -> Result:
    from jwins.run.builders import advice
    from jwins.run.run import simulate
    from jwins.training.allocator import keep_freed_memory

    keep_freed_memory()
    if quiet:
        return simulate(experiment, engine=engine, resume=resume, extend=extend)
    for note in advice(experiment):
        say(console, f"note: {note}")
    with run_progress(console, experiment) as on_progress:
        return simulate(experiment, engine=engine, resume=resume, extend=extend, progress=on_progress)


def _print_plan(console: Console, experiment: Experiment, engine: Ray | None) -> None:
    from jwins.run.forecast import forecast
    from jwins.run.memory import exchange_of

    found = forecast(experiment, engine)
    each = "of each actor" if found.actors > 1 else "of the process"
    by_activity = ", ".join(f"{name} {seconds:.3g}" for name, seconds in found.round_s.items())
    lines = [
        f"{experiment.name}: {found.num_nodes} nodes of {found.dim:,} parameters in {found.actors} "
        f"process{'es' if found.actors > 1 else ''}, {found.rounds} rounds",
        f"memory   {size_text(found.memory_bytes)} {each} at its peak",
        f"exchange {exchange_of(experiment, found.dim)}, for each node",
        f"seconds  {sum(found.round_s.values()):.3g} per round ({by_activity}), {found.evaluation_s:.3g} per "
        f"evaluation, {found.checkpoint_s:.3g} per checkpoint; {found.total_s:.3g} in all",
        f"bytes    {size_text(found.frame_bytes)} per frame, {size_text(found.round_bytes)} per round, "
        f"{size_text(found.total_bytes)} in all",
    ]
    if found.actors > 1:
        lines.append(f"         {size_text(found.stored_bytes)} per round go from one actor to another")
    for line in lines:
        say(console, line)


def end_command(console: Console, result: Result, *, quiet: bool) -> None:
    """Print a result, and leave with the exit code of a run that did not finish."""
    if result.status == "interrupted":
        leave("continue with --resume", INTERRUPTED)
    if not quiet:
        _print_result(console, result)
    end = result.record.end
    if end is not None and result.status == "diverged":
        reason = f": {end.reason}" if end.reason else ""
        leave(f"diverged in round {end.round}{reason}; try a smaller train.optimizer.lr", DIVERGED)
    if end is not None and result.status == "stalled":
        leave(f"stalled in round {end.round}: {end.reason}", FAILED)


def _print_result(console: Console, result: Result) -> None:
    last = result.record.evaluations[-1]
    nodes = result.record.start.num_nodes
    clock = "virtual seconds" if result.record.start.clock == "virtual" else "seconds"
    if result.was_complete:
        console.print("this run is complete; nothing to do")
        if result.record.end is not None and not any((result.folder / "final").glob("*.safetensors")):
            say(console, "its final models are gone; remove the folder and run again to have them")
    means = last.means
    traffic = last.traffic
    console.print(
        f"{result.status} after {last.round} rounds, {last.time_s:.1f} {clock}: {metrics_text(means)}"
    )
    if result.status == "stopped" and result.record.end is not None:
        say(console, f"run.stop: {result.record.end.reason}")
    split = ", ".join(
        f"{kind} {size_text(getattr(traffic, kind))}"
        for kind in ("values", "positions", "header", "keyframe", "control")
    )
    say(
        console, f"{size_text(traffic.total / nodes)} sent per node, {size_text(traffic.total)} in all: {split}"
    )
    if last.epsilon is not None and (privacy := result.experiment.train.privacy) is not None:
        console.print(f"privacy spent per sample: epsilon {last.epsilon:.2f} at delta {privacy.delta:g}")
    if result.record.end is not None and not result.was_complete:
        say(console, _seconds_text(result.record.end.wall_s))
    say(console, f"written to {result.folder}")


def _seconds_text(wall_s: Mapping[str, float]) -> str:
    """List the seconds by activity, the longest first, of this process or of all that it launched."""
    spent = {name: seconds for name, seconds in wall_s.items() if name != "total"}
    whole, of_all = wall_s["total"], "; in all nodes' processes together"
    if "start-up" in spent:
        whole, of_all = whole + spent["start-up"], ""
        spent["other"] = whole - sum(spent.values())
    longest_first = sorted(spent.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest_first)
    return f"{whole:.1f} seconds here{of_all}: {listed}"
