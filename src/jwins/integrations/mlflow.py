"""A run's evaluations in MLflow; needs the extra ``mlflow``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from jwins.engines.callbacks import Callback
from jwins.errors import UsageError
from jwins.experiment.experiment import Experiment
from jwins.experiment.toml import flat
from jwins.run_folder.rows import EvalRow
from jwins.run_folder.tensorboard import scalars

if TYPE_CHECKING:
    from jwins.run.result import Result

_MAX_CHARS = 500
"""Longest value of a parameter that every server of MLflow takes."""
_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED"}


class MlflowCallback(Callback):
    """Callback that logs the metrics of each evaluation; the step is the number of completed rounds.

    The experiment's settings are the run's parameters, by TOML path; its status and the hash of its parameters
    are tags.

    Args:
        options: options of ``mlflow.start_run``; ``run_name`` is the experiment's name unless it is given. Set
            the destination as usual, with ``mlflow.set_tracking_uri`` and ``mlflow.set_experiment``.

    Raises:
        UsageError: MLflow is not installed.

    Example::

        jwins.simulate(experiment, callbacks=[MlflowCallback()])
    """

    def __init__(self, **options: Any) -> None:
        try:
            import mlflow
        except ImportError:
            raise UsageError("MlflowCallback needs an extra: pip install 'jwins[mlflow]'") from None
        self._mlflow: Any = mlflow
        self._options = options
        self._running = False

    def on_start(self, experiment: Experiment) -> None:
        """Begin a run of MLflow."""
        self._mlflow.start_run(**{"run_name": experiment.name, **self._options})
        self._running = True
        values = flat(experiment.resolved())
        self._mlflow.log_params({key: str(value)[:_MAX_CHARS] for key, value in values.items()})

    def on_evaluation(self, row: EvalRow, models: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Log the scalars of an evaluation."""
        self._mlflow.log_metrics(scalars(row), step=row.round)

    def on_end(self, result: Result) -> None:
        """Set the tags and end the run, unless it was complete before."""
        if not self._running:
            return
        self._mlflow.set_tags({"status": result.status, "sha256": result.sha256 or ""})
        self._mlflow.end_run(status=_STATUS.get(result.status, "FAILED"))
        self._running = False
