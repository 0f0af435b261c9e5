"""The rule by which a run ends before its last round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jwins.errors import ConfigError
from jwins.run_folder.rows import EvalRow, Row


@dataclass(frozen=True, slots=True)
class StopRule:
    """Ends a run by its evaluations alone, so that a resumed run ends where an uninterrupted one does.

    Attributes:
        metric: name of the metric; its mean over the nodes counts.
        target: end when it is reached; None for no target.
        patience: end after this many evaluations in a row without a better value; None for never.
    """

    metric: str
    lower_is_better: bool
    target: float | None = None
    patience: int | None = None

    def reason(self, rows: Sequence[Row]) -> str:
        """Return why the newest evaluation ends the run; empty if it does not.

        Raises:
            ConfigError: the task has no such metric.
        """
        evaluations = [row for row in rows if isinstance(row, EvalRow)]
        if not evaluations:
            return ""
        newest = evaluations[-1]
        if self.metric not in newest.metrics:
            problem = f"expected a metric of the task: {', '.join(newest.metrics)}"
            raise ConfigError("run.stop.metric", self.metric, problem)
        values = [row.metrics[self.metric].mean for row in evaluations]
        sign = 1.0 if self.lower_is_better else -1.0
        if self.target is not None:
            value = values[-1]
            reached = value is not None and sign * value <= sign * self.target
            return f"{self.metric} reached {self.target:g}: {value:.4g}" if reached else ""
        assert self.patience is not None
        known = [(sign * value, place) for place, value in enumerate(values) if value is not None]
        best = min(known)[1] if known else 0
        if len(values) - 1 - best < self.patience:
            return ""
        return (
            f"{self.metric} has not been better for {self.patience} evaluations than after "
            f"{evaluations[best].round} rounds"
        )
