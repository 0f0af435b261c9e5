"""Tasks of a ``[task]`` table: classes by name, and a user's class from a local file.

Importing a file runs it. Only a file that the user names on this machine is imported, never one that a peer or
a downloaded run refers to.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any, get_args, get_type_hints

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from torch import Tensor, nn

from jwins.errors import ConfigError, JwinsError, error_text
from jwins.tasks.base import Batch, Dataset, Task, with_own_buffers


def named_class(name: str, tasks: Mapping[str, type[Task]]) -> type[Task]:
    """Return the class of a task of the package.

    Raises:
        ConfigError: no task has that name.
    """
    if name not in tasks:
        own = ", or set task.file = 'my_task.py:MyTask' for your own"
        raise ConfigError("task.name", name, f"expected one of {', '.join(tasks)}{own}")
    return tasks[name]


def task_class(file: str, folder: Path) -> type[Task]:
    """Import the class of a name such as ``"my_task.py:MyTask"``.

    Args:
        file: a Python file and, after a colon, a class in it.
        folder: start of a relative file.

    Raises:
        ConfigError: no such file or class, the file does not run, or the class is not a task.
    """
    name, colon, cls_name = file.rpartition(":")
    if not colon or not name.endswith(".py") or not cls_name.isidentifier():
        raise ConfigError(
            "task.file", file, "expected a Python file and a class in it, as in 'my_task.py:MyTask'"
        )
    path = (folder / name).resolve()
    if not path.is_file():
        problem = f"there is no file {path}; a relative path starts at the folder of the experiment file"
        raise ConfigError("task.file", file, problem)
    # A separate name in sys.modules, so that files of the same name do not collide and pickle finds the class.
    module_name = f"jwins_task_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_FromSource(module_name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError("task.file", file, f"{path} does not run: {error_text(error)}") from error
    cls = getattr(module, cls_name, None)
    if cls is None:
        present = [
            other
            for other, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, Task) and value.__module__ == module_name
        ]
        has = f"it has {', '.join(present)}" if present else "no class in it subclasses jwins.tasks.Task"
        raise ConfigError("task.file", file, f"{path} has no class {cls_name}; {has}")
    if not inspect.isclass(cls) or not issubclass(cls, Task):
        raise ConfigError("task.file", file, f"{cls_name} in {path} does not subclass jwins.tasks.Task")
    if inspect.isabstract(cls):
        raise ConfigError("task.file", file, f"{cls_name} in {path} lacks {_absent(cls)}")
    return cls


class _FromSource(importlib.machinery.SourceFileLoader):
    """Loader that compiles the file: cached bytecode may be of an older text of the same second and length."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def own_task(own: object, options: Mapping[str, object], data: Path | None) -> Task:
    """Return a user's task, given as an object or a class, after trying it on two samples.

    Args:
        own: an object of a subclass of :class:`Task`, or the subclass.
        options: arguments of the class's constructor.
        data: passed as its argument ``data``.

    Raises:
        ConfigError: another type; an option that is unknown, missing or of the wrong type; data that the
            task does not take; or an incomplete task.
        DataError: raised by the constructor.
    """
    cls = own if inspect.isclass(own) else type(own)
    wrong = partial(ConfigError, "task.own", f"{cls.__module__}.{cls.__qualname__}")
    if not issubclass(cls, Task):
        raise wrong(f"{cls.__name__} does not subclass jwins.tasks.Task")
    if inspect.isabstract(cls):
        raise wrong(f"{cls.__name__} lacks {_absent(cls)}")
    if isinstance(own, Task):
        _try(own, wrong)
        return own
    return _built(cls, options, data, wrong)


def built(
    cls: type[Task], options: Mapping[str, object], data: Path | None, *, file: str | None = None
) -> Task:
    """Build a task of this class; try one from a user's file on two samples.

    Args:
        cls: the class.
        options: arguments of its constructor.
        data: passed as the argument ``data``, in place of an option of that name.
        file: file of a user's class.

    Raises:
        ConfigError: an option that is unknown, missing or of the wrong type, data that the task does not take,
            or an incomplete task.
        DataError: raised by the constructor.
    """
    if file is None:
        return cls(**_checked_arguments(cls, options, data))
    return _built(cls, options, data, partial(ConfigError, "task.file", file))


Wrong = Callable[[str], ConfigError]
"""Function that makes an error of a user's task, at the place where the experiment names it."""


def _built(cls: type[Task], options: Mapping[str, object], data: Path | None, wrong: Wrong) -> Task:
    arguments = _checked_arguments(cls, options, data)
    try:
        task = cls(**arguments)
    except JwinsError:
        raise
    except Exception as error:
        raise wrong(f"{cls.__name__} cannot be built: {error_text(error)}") from error
    _try(task, wrong)
    return task


def _absent(cls: type[Task]) -> str:
    return ", ".join(f"{method}()" for method in sorted(cls.__abstractmethods__))


def _checked_arguments(cls: type[Task], options: Mapping[str, object], data: Path | None) -> dict[str, Any]:
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    takes = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    anything = len(takes) < len(parameters)
    if data is not None and "data" not in takes and not anything:
        raise ConfigError(
            "task.data",
            str(data),
            f"{cls.__name__} does not take a data folder; remove this "
            f"key, or add an argument data to the constructor",
        )
    try:
        hints = get_type_hints(cls.__init__)
    except (NameError, TypeError):  # annotations of a user's class need not be types
        hints = {}
    arguments: dict[str, Any] = {}
    for key, value in options.items():
        if key not in takes and not anything:
            known = (
                f"takes only {', '.join(name for name in takes if name != 'data')}" if takes else "takes none"
            )
            raise ConfigError(f"task.options.{key}", value, f"unknown option; {cls.__name__} {known}")
        arguments[key] = _of_type(f"task.options.{key}", value, hints[key]) if key in hints else value
    if data is not None:
        arguments["data"] = data
    for p in parameters:
        if p.name in takes and p.default is p.empty and p.name not in arguments:
            place = "task.data" if p.name == "data" else f"task.options.{p.name}"
            raise ConfigError(
                place, None, f"{cls.__name__} requires it: it has no default; set it in task.options"
            )
    return arguments


def _of_type(path: str, value: object, hint: Any) -> object:
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except PydanticSchemaGenerationError:
        return value
    except ValidationError:
        wanted = getattr(hint, "__name__", None) if not get_args(hint) else None
        raise ConfigError(path, value, f"expected {wanted or hint}") from None


def _try(task: Task, wrong: Wrong) -> None:
    """Run every method of a user's task once, so that mistakes are reported before round 1."""

    def lacks(problem: str) -> ConfigError:
        return wrong(f"{type(task).__name__} {problem}")

    for split in ("train", "test"):
        found = getattr(task, split, None)
        if found is None:
            raise lacks(f"does not set self.{split}; set it to a jwins.tasks.Dataset in __init__")
        if not isinstance(found, Dataset):
            raise lacks(f"sets self.{split} to a {type(found).__name__}; expected a jwins.tasks.Dataset")
        if not len(found):
            raise lacks(f"sets self.{split} to an empty data set")
    name: object = task.name
    if not isinstance(name, str) or not name.isprintable():
        raise lacks(f"sets self.name to {name!r}; expected a text of one line")
    type(task).directions()
    if "better" in getattr(task, "__dict__", {}):
        raise lacks("sets self.better; declare it in the class, beside the methods")
    stage = "model()"
    # The trial must not advance the generators of the experiment.
    with torch.random.fork_rng(devices=[]):
        try:
            model = task.model()
            if not isinstance(model, nn.Module):
                raise lacks(f"returns a {type(model).__name__} from model(); expected a torch.nn.Module")
            if not any(p.requires_grad for p in model.parameters()):
                raise lacks("returns a model without parameters to train from model()")
            with_own_buffers(model)
            stage = "loss()"
            batch = Batch(task.train.inputs[:2].clone(), task.train.targets[:2].clone())
            loss: object = task.loss(model, batch, None)
            if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
                raise lacks("returns no scalar to differentiate from loss()")
            stage = "metrics()"
            test = Batch(task.test.inputs[:2], task.test.targets[:2])
            inputs, targets = (tensor.clone() for tensor in test)
            with torch.no_grad():
                outputs = model.eval()(task.prepare(inputs))
                metrics: dict[Any, object] = dict(task.metrics(outputs, targets))
            for name, before, after in zip(("inputs", "targets"), test, (inputs, targets), strict=True):
                if not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):
                    problem = "work on a copy, since every evaluation would change them further"
                    raise lacks(f"changes {name} of test samples in place in prepare() or metrics(); {problem}")
            for name, values in metrics.items():
                if not isinstance(name, str) or not name or not name.isprintable():
                    raise lacks(f"returns a metric called {name!r}; expected a name of printable characters")
                if not isinstance(values, Tensor) or values.shape != (len(targets),):
                    shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                    raise lacks(
                        f"returns {shape} as metrics()[{name!r}]; expected one value per sample, shape (n,)"
                    )
            if "loss" not in metrics:
                raise lacks("returns no 'loss' from metrics(); expected (n,) values of it")
        except JwinsError:
            raise
        except Exception as error:
            raise lacks(f"fails in {stage} on the first two samples: {error_text(error)}") from error
