"""A run's evaluations in Weights & Biases; needs the extra ``wandb``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from jwins.engines.callbacks import Callback
from jwins.errors import UsageError
from jwins.experiment.experiment import Experiment
from jwins.run_folder.rows import EvalRow
from jwins.run_folder.tensorboard import scalars

if TYPE_CHECKING:
    from jwins.run.result import Result


class WandbCallback(Callback):
    """Callback that logs the metrics of each evaluation; the step is the number of completed rounds.

    The experiment's settings are the run's ``config``, its status and the hash of its parameters the summary.

    Args:
        options: options of ``wandb.init``, such as ``project="graphs"``, ``mode="offline"`` or, to continue a
            run, ``id="7", resume="allow"``. ``name`` and ``config`` are the experiment's unless they are given.

    Attributes:
        run: result of ``wandb.init``; None before the start.

    Raises:
        UsageError: Weights & Biases is not installed.

    Example::

        jwins.simulate(experiment, callbacks=[WandbCallback(project="graphs", mode="offline")])
    """

    def __init__(self, **options: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError("WandbCallback needs an extra: pip install 'jwins[wandb]'") from None
        self._wandb: Any = wandb
        self._options = options
        self.run: Any = None

    def on_start(self, experiment: Experiment) -> None:
        """Begin a run of Weights & Biases."""
        named = {"name": experiment.name, "config": experiment.resolved()}
        self.run = self._wandb.init(**{**named, **self._options})

    def on_evaluation(self, row: EvalRow, models: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Log the scalars of an evaluation."""
        self.run.log(scalars(row), step=row.round)

    def on_end(self, result: Result) -> None:
        """Write the summary and end the run, unless it was complete before."""
        if self.run is None:
            return
        self.run.summary["status"] = result.status
        self.run.summary["sha256"] = result.sha256
        self.run.finish(exit_code=0 if result.status in ("finished", "stopped") else 1)
        self.run = None
