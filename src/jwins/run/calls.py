"""Calls of a run's callbacks, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jwins.errors import UsageError
from jwins.run.result import Result
from jwins.run_folder.rows import EvalRow

if TYPE_CHECKING:
    from jwins.engines.callbacks import Callback, MeasuredModels
    from jwins.engines.simulator.driver import Progress

_METHODS = ("on_start", "on_round", "on_evaluation", "on_end")


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse objects that are no callbacks before anything runs.

    Raises:
        UsageError: has no one of the methods, or a class.
    """
    for index, callback in enumerate(callbacks):
        missing = [name for name in _METHODS if not callable(getattr(callback, name, None))]
        if isinstance(callback, type) or missing:
            problem = (
                "is a class; pass an instance"
                if isinstance(callback, type)
                else (f"has no {', '.join(missing)}; derive its class from jwins.Callback")
            )
            raise UsageError(f"callbacks[{index}] = {callback!r}: {problem}")


def rounds_to(callbacks: Sequence[Callback]) -> Callable[[Progress], None]:
    """Return a function of the driver's progress that calls ``on_round`` after further completed rounds."""
    done: int | None = None

    def on_progress(now: Progress) -> None:
        nonlocal done
        if done is not None and now.round > done:
            for callback in callbacks:
                callback.on_round(now)
        done = now.round

    return on_progress


def evaluations_to(callbacks: Sequence[Callback]) -> Callable[[EvalRow, MeasuredModels], None]:
    """Return a function that calls ``on_evaluation``."""

    def on_evaluation(row: EvalRow, models: MeasuredModels) -> None:
        for callback in callbacks:
            callback.on_evaluation(row, models)

    return on_evaluation


def ended(callbacks: Sequence[Callback], result: Result) -> Result:
    """Call ``on_end``; return the result."""
    for callback in callbacks:
        callback.on_end(result)
    return result
