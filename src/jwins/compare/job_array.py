"""Single cells, for a job array of a cluster's scheduler."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from jwins.compare.comparison import Cell, Comparison
from jwins.compare.plan import plan, set_aside
from jwins.compare.workers import CellProgress, Job, last_progress, run_job, with_one_thread
from jwins.errors import ConfigError, UsageError
from jwins.run.folder import FolderState, check_folder, folder_state
from jwins.run.memory import memory_needed
from jwins.run_folder.record import Record
from jwins.training.training_context import resolve_device

_SCRIPT = """\
#!/bin/bash
# {count} runs of the comparison {name}, one per task of the array. Submit this file with sbatch.
#SBATCH --job-name={job}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem={megabytes}M
{gpu}#SBATCH --output={log}
#SBATCH --signal=INT@120
#SBATCH --requeue
# Two minutes before a time limit a run leaves a checkpoint; submitted again, it goes on from there.
cells=(
{cells}
)
cd {here}
export OMP_NUM_THREADS=1
exec srun {command} --cell "${{cells[$SLURM_ARRAY_TASK_ID]}}"
"""


def array_script(comparison: Comparison, command: Sequence[str], only: Collection[str] = ()) -> str:
    """Return a SLURM script with a task for each run that is possible now and has not ended.

    A comparison with tuning has several such stages. The next stage's script is available when this stage's
    runs have ended. Each task names its run by its folder, so that the script remains right when other runs
    end.

    Raises:
        DataError: data are missing.
        UsageError: no run is left.
    """
    cells = plan(comparison, only).cells
    for cell in cells:
        set_aside(cell)
    left = [cell for cell in cells if _state(cell) is not FolderState.COMPLETE]
    if not left:
        raise UsageError(f"{comparison.folder}: all runs have ended; make the tables with `--report-only`")
    experiments = [cell.experiment for cell in left]
    on_gpu = any(resolve_device(experiment.run.device).type == "cuda" for experiment in experiments)
    return _SCRIPT.format(
        count=len(left),
        name=comparison.name,
        job=shlex.quote(comparison.name),
        last=len(left) - 1,
        megabytes=int(memory_needed(experiments) / 1e6) + 1,
        gpu="#SBATCH --gpus-per-task=1\n" if on_gpu else "",
        log=comparison.folder.resolve() / "array-%A-%a.log",
        cells="\n".join(f"  {shlex.quote(_label(comparison, cell))}" for cell in left),
        here=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
    )


def run_cell(
    comparison: Comparison, which: str, on_progress: Callable[[CellProgress], None], only: Collection[str] = ()
) -> str:
    """Carry out one run of a comparison in this process, with one thread.

    Args:
        comparison: the comparison.
        which: number of the run among those that are known now, or its folder in the comparison's.
        on_progress: called with the progress.
        only: names of selected variants, to which the numbers then refer.

    Returns:
        ``finished``, ``diverged`` or ``interrupted``.

    Raises:
        ConfigError: no such run exists, or it is not known yet.
        DataError: data are missing.
        ResumeError: its folder has another experiment, or another process runs it.
    """
    cells = plan(comparison, only).cells
    by_label = {_label(comparison, cell): cell for cell in cells}
    cell = by_label.get(which.rstrip("/"))
    number = int(which) if which.isdecimal() else -1
    if cell is None and not 0 <= number < len(cells):
        raise ConfigError(
            "--cell",
            which,
            f"expected a number from 0 to {len(cells) - 1}, or a folder such as {next(iter(by_label))}; runs "
            "whose settings are still being tuned follow when the tuning runs have ended",
        )
    cell = cell or cells[number]
    check_folder("compare.folder", comparison.folder)
    set_aside(cell)
    job = with_one_thread(Job(cells.index(cell), cell.name, cell.experiment))
    if _state(cell) is FolderState.COMPLETE:
        ended = last_progress(job, Record.read(cell.folder))
        on_progress(ended)
        return ended.status
    return run_job(job, on_progress)


def _state(cell: Cell) -> FolderState:
    return folder_state(cell.experiment, cell.folder)[0]


def _label(comparison: Comparison, cell: Cell) -> str:
    return cell.folder.relative_to(comparison.folder).as_posix()
