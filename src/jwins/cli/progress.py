"""Progress on the terminal: bars, or lines for a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jwins.cli.app import say

if TYPE_CHECKING:
    from rich.console import Console

    from jwins.compare.comparison import Comparison
    from jwins.compare.workers import CellProgress
    from jwins.engines.simulator.driver import Progress
    from jwins.experiment.experiment import Experiment

_PLAIN_LINES_S = 2.0
"""Minimum seconds between two lines of progress without a terminal."""


class PlainRun:
    """Progress as lines, for logs."""

    def __init__(self, console: Console) -> None:
        self.console_of = console
        self._clock = _Clock()
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        """Print a line at an evaluation, if the last line is some seconds old."""
        if progress.row is None:
            return
        now = time.monotonic()
        if now - self._last < _PLAIN_LINES_S and progress.row.round != progress.rounds:
            return
        self._last = now
        means = progress.row.means
        left = self._clock.left(progress.round, progress.rounds)
        say(
            self.console_of,
            f"round {progress.row.round}/{progress.rounds}  {metrics_text(means)}  "
            f"{size_text(progress.row.traffic.total)} sent  {progress.row.time_s:.1f} virtual s  {left} left",
        )


class _Clock:
    """Time left, from the rounds done since the first report (a resumed run does not start at 0)."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def left(self, round: int, rounds: int) -> str:
        """Return a text such as ``1:05``, or ``-:--`` as long as nothing is known."""
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
def run_progress(console: Console, experiment: Experiment) -> Iterator[Callable[[Progress], None]]:
    """Show a bar for one run, or lines without a terminal; yield the function to call with its progress."""
    if not console.is_terminal:
        console.print(f"{experiment.name}: {experiment.nodes.count} nodes, {experiment.run.rounds} rounds")
        yield PlainRun(console)
        return
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
        task = bar.add_task(
            experiment.name,
            total=experiment.run.rounds + experiment.run.consensus_rounds,
            metrics="",
            sent="",
            left="-:--",
        )

        def on_progress(progress: Progress) -> None:
            nonlocal shown
            now = time.monotonic()
            if progress.row is not None:
                means = progress.row.means
                bar.update(task, metrics=metrics_text(means))
            elif now - shown < 0.1 and progress.round < progress.rounds:
                return
            shown = now
            bar.update(
                task,
                completed=progress.round,
                sent=size_text(progress.bytes_total),
                left=clock.left(progress.round, progress.rounds),
            )

        yield on_progress


def metrics_text(means: dict[str, float | None]) -> str:
    """Return a text such as ``accuracy 91.2 %  loss 0.310``."""
    shown = []
    for name, mean in means.items():
        if mean is None:
            shown.append(f"{name} —")
        elif name.endswith("accuracy"):
            shown.append(f"{name} {mean * 100:.1f} %")
        else:
            shown.append(f"{name} {mean:.3f}")
    return "  ".join(shown)


def size_text(number: float) -> str:
    """Return a number of bytes with a fitting unit."""
    from jwins.report.formatting import size

    return size(number)


class PlainComparison:
    """One line per finished cell."""

    def __init__(self, console: Console, comparison: Comparison, only: Sequence[str]) -> None:
        self.console_of = console
        self._runs, _ = comparison.expected(only)
        self._done = 0
        say(console, f"{comparison.name}: {self._runs} runs")

    def __call__(self, progress: CellProgress) -> None:
        """Print a line if the cell is done."""
        if progress.status == "running":
            return
        self._done += 1
        say(
            self.console_of,
            f"[{self._done}/{max(self._runs, self._done)}] {progress.name}: {progress.status}, "
            f"{metrics_text(dict(progress.metrics or {}))}, {size_text(progress.bytes_total)} sent",
        )


@contextmanager
def comparison_progress(
    console: Console, comparison: Comparison, only: Sequence[str]
) -> Iterator[Callable[[CellProgress], None]]:
    """Print a line for each run that ends, and show bars on a terminal; yield the function to call."""
    ended = PlainComparison(console, comparison, only)
    if not console.is_terminal:
        yield ended
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    _, total = comparison.expected(only)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    clock = _Clock()
    rounds: dict[int, int] = {}
    running: dict[int, Any] = {}
    with Bar(*columns, console=console, refresh_per_second=8) as bar:
        whole = bar.add_task(comparison.name, total=total, note="")

        def on_progress(progress: CellProgress) -> None:
            """Show a bar for each running cell, and a line above the bars for each that has ended."""
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
            note = f"{metrics_text(dict(progress.metrics or {}))}  {size_text(progress.bytes_total)}"
            bar.update(running[number], completed=progress.round, note=note)

        yield on_progress
