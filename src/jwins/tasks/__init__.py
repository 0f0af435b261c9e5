"""Tasks: data, models, losses and metrics.

:func:`make_task` builds a task of :data:`TASKS` by name, or a user's task from a Python file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jwins.errors import UsageError
from jwins.tasks.base import Batch, Dataset, Task
from jwins.tasks.celeba import Celeba
from jwins.tasks.cifar10 import Cifar10
from jwins.tasks.digits import Digits
from jwins.tasks.femnist import Femnist
from jwins.tasks.gpt import Gpt
from jwins.tasks.load import built, named_class, own_task, task_class
from jwins.tasks.movielens import MovieLens
from jwins.tasks.shakespeare import Shakespeare

__all__ = ["TASKS", "Batch", "Dataset", "Task", "make_task", "own_task"]

TASKS: Mapping[str, type[Task]] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "femnist": Femnist,
    "celeba": Celeba,
    "shakespeare": Shakespeare,
    "movielens": MovieLens,
    "gpt": Gpt,
}
"""Tasks by their name in ``task.name``."""


def make_task(
    name: str | None = None,
    *,
    file: str | None = None,
    options: Mapping[str, object] | None = None,
    data: Path | None = None,
    folder: Path | None = None,
) -> Task:
    """Build the task of a ``[task]`` table.

    Args:
        name: a key of :data:`TASKS`.
        file: in place of a name, a class in a Python file, as in ``"my_task.py:MyTask"``.
        options: ``task.options``, arguments of the constructor.
        data: folder or file of the data, passed to the constructor as ``data``.
        folder: start of a relative ``file``, the experiment file's folder; None is the current one.

    Raises:
        UsageError: neither or both of name and file.
        ConfigError: no such task, file or class; an unknown option; or an incomplete class of the user.
        DataError: the data are missing or not as expected.

    >>> len(make_task("digits", options={"model": "cnn"}).train)
    1437
    """
    if name is not None and file is None:
        return built(named_class(name, TASKS), options or {}, data)
    if file is not None and name is None:
        return built(task_class(file, folder or Path()), options or {}, data, file=file)
    raise UsageError("make_task: give either the name of a task or the file of your own")
