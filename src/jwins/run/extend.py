"""A run that has ended, made longer: its folder becomes that of the same experiment with more rounds."""

from __future__ import annotations

import shutil
from pathlib import Path

from jwins.errors import ConfigError, ResumeError
from jwins.experiment.experiment import Experiment
from jwins.experiment.toml import read_toml
from jwins.run.builders import build_sharing
from jwins.run.folder import FolderState, folder_state
from jwins.run_folder import traffic
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.lock import locked
from jwins.run_folder.record import Record


def extend(experiment: Experiment, folder: Path) -> None:
    """Change the folder of an experiment that differs only in its end into one of this experiment, unfinished.

    The run then continues from its newest checkpoint in which no node had finished, or else from the start. Its
    result is that of a run of this experiment from the start. The process may be killed at any time: the
    configuration is written last, and until then the folder is that of the shorter run.

    Args:
        experiment: the experiment with more rounds, or another ``run.stop``, than the run in the folder.
        folder: folder of the run; nothing is done if there is none.

    Raises:
        ConfigError: fewer rounds, or settings by which the finished rounds depend on the number of rounds.
        ResumeError: the folder holds another experiment, or a run that diverged, stalled or was launched.
    """
    config = folder / "config.toml"
    if not config.is_file():
        return
    stored = read_toml(config.read_text(encoding="utf-8"), str(config)).get("run", {})
    end = {"rounds": stored.get("rounds", experiment.run.rounds), "stop": stored.get("stop")}
    shorter = experiment.changed({"run": end})
    if shorter == experiment:
        return
    _, resolved = folder_state(shorter, folder)
    _check(experiment, shorter, folder)
    with locked(folder, "this experiment"):
        if folder_state(shorter, folder)[0] is not FolderState.UNFINISHED:
            _drop_end(folder)
        log = folder / "metrics.jsonl"
        if log.is_file():
            old, new = (one.digest().hex().encode() for one in (shorter, experiment))
            first, *rows = log.read_bytes().splitlines(keepends=True)
            write_atomically(log, b"".join([first.replace(old, new, 1), *rows]))  # as long as it was
        if not _can_go_on(experiment, folder):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        stop = experiment.run.stop
        end = {"rounds": experiment.run.rounds, "stop": stop and stop.model_dump(exclude_none=True)}
        write_atomically(config, resolved.changed({"run": end}).to_toml(folder).encode())


def _check(experiment: Experiment, shorter: Experiment, folder: Path) -> None:
    run = experiment.run
    if run.rounds < shorter.run.rounds:
        problem = f"the run in {folder} has {shorter.run.rounds} rounds; give more, or choose another folder"
        raise ConfigError("run.rounds", run.rounds, problem)
    if (schedule := experiment.train.schedule).kind != "constant":
        problem = "depends on the number of rounds, so the finished rounds would differ; choose another folder"
        raise ConfigError("train.schedule.kind", schedule.kind, problem)
    if (privacy := experiment.train.privacy) is not None and privacy.epsilon is not None:
        problem = "was shared out over the rounds that there were; write noise_multiplier, which is kept"
        raise ConfigError("train.privacy.epsilon", privacy.epsilon, problem)
    for key, problem in (
        ("consensus_rounds", "the consensus rounds followed the last round of training"),
        ("eval_samples_early", "the last evaluations used more samples"),
    ):
        if getattr(run, key):
            raise ConfigError(
                f"run.{key}",
                getattr(run, key),
                f"{problem}, and a longer run ends later; choose another folder",
            )
    if not (folder / "metrics.jsonl").is_file():
        return
    record = Record.read(folder)
    if record.ended_early:
        raise ResumeError(f"{folder}: the run ended early ({record.status}), so it cannot be extended")
    if record.clock != "virtual":
        raise ResumeError(f"{folder}: a run of `jwins launch` cannot be made longer; choose another run.folder")


def _drop_end(folder: Path) -> None:
    """Remove the last row and the files that mark the end of a run."""
    log = folder / "metrics.jsonl"
    write_atomically(log, b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    (folder / traffic.FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / "final", ignore_errors=True)


def _can_go_on(experiment: Experiment, folder: Path) -> bool:
    """Return whether there is a checkpoint in which no node had ended."""
    from jwins.engines.recorder import Recorder
    from jwins.engines.simulator.driver import STATE_TYPES

    types = (*STATE_TYPES, *build_sharing(experiment).state_types)
    try:
        Recorder(folder).newest_checkpoint(types, experiment.run.rounds)
    except ResumeError:
        return False
    return True
