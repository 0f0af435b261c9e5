"""Better direction of a metric, which the task declares."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jwins.compare.settings import CompareConfig
from jwins.errors import ConfigError
from jwins.experiment.error_messages import nearest
from jwins.experiment.experiment import Experiment

if TYPE_CHECKING:
    from jwins.tasks import Task


def lower_is_better(settings: CompareConfig, experiments: Iterable[Experiment]) -> bool:
    """Return whether smaller values of the compared metric are better.

    Raises:
        ConfigError: no task declares a direction, or two declare different ones.
    """
    metric, setting = settings.metric, settings.lower_is_better
    tasks = {(id(e.task.own), e.task.file, e.task.name): e for e in experiments}
    known: dict[str, str] = {}
    found = set() if setting is None else {"lower" if setting else "higher"}
    for experiment in tasks.values():
        try:
            declared = _task_class(experiment).directions()
        except ConfigError:
            if setting is None:
                raise
            continue  # the file no longer exists; the comparison has the direction
        known |= declared
        if (direction := declared.get(metric, declared.get(metric.removeprefix("own_")))) is not None:
            found.add(direction)
    if not found:
        problem = f"the task declares only for {', '.join(known)} whether lower is better"
        problem += f"{nearest(metric, list(known))}; for this metric, write better = {{{metric!r}: 'lower'}} "
        problem += "(or 'higher') in its class, or set "
        raise ConfigError("compare.metric", metric, f"{problem}compare.lower_is_better")
    if len(found) == 1:
        return found == {"lower"}
    if setting is not None:
        problem = f"the task declares the opposite of {metric}; leave this out"
        raise ConfigError("compare.lower_is_better", setting, problem)
    problem = "is to be higher in one variant's task and lower in another's; compare these separately"
    raise ConfigError("compare.metric", metric, problem)


def _task_class(experiment: Experiment) -> type[Task]:
    from jwins.tasks import TASKS, Task  # imports torch
    from jwins.tasks.load import named_class, task_class

    config = experiment.task
    if config.own is not None:
        cls = config.own if inspect.isclass(config.own) else type(config.own)
        return cls if issubclass(cls, Task) else Task  # building it reports that it is not a task
    if config.file is not None:
        return task_class(config.file, Path())
    return named_class(str(config.name), TASKS)
