"""Record of one run, read from its folder: typed rows, and the numbers for tables and figures."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jwins.errors import DataError, UsageError
from jwins.run_folder.archive import is_file
from jwins.run_folder.rows import EndRow, EvalRow, Row, StartRow, read_rows


@dataclass(frozen=True)
class Record:
    """The metrics of one run folder, which may be in an archive.

    Attributes:
        start: first row.
        evaluations: in order of rounds, up to the last round of training.
        end: last row; None for a run that has not ended by itself.
        consensus: evaluations after rounds of consensus, which curves and final values leave out.
    """

    folder: Path
    start: StartRow
    evaluations: tuple[EvalRow, ...]
    end: EndRow | None
    consensus: tuple[EvalRow, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read ``folder/metrics.jsonl``.

        Raises:
            DataError: the folder has no run, or its metrics are damaged.
        """
        path = folder / "metrics.jsonl"
        if not is_file(path):
            raise DataError(f"{folder}: no run here (metrics.jsonl is missing)")
        return cls.of(folder, list(read_rows(path)))

    @classmethod
    def of(cls, folder: Path, rows: Sequence[Row]) -> Record:
        """Make a record of given rows.

        Raises:
            DataError: the first row is not a start row.
        """
        if not rows or not isinstance(rows[0], StartRow):
            raise DataError(f"{folder / 'metrics.jsonl'}: does not begin with the row that starts a run")
        end = rows[-1] if isinstance(rows[-1], EndRow) else None
        measured = [row for row in rows if isinstance(row, EvalRow)]
        return cls(
            folder,
            rows[0],
            tuple(row for row in measured if not row.consensus_rounds),
            end,
            tuple(row for row in measured if row.consensus_rounds),
        )

    @property
    def rounds(self) -> int:
        """Return the measured numbers of completed rounds."""
        return self.evaluations[-1].round if self.evaluations else 0

    @property
    def clock(self) -> str:
        """Return the kind of its seconds: ``virtual`` or ``real``."""
        return "virtual" if self.start.clock == "virtual" else "real"

    @property
    def status(self) -> str:
        """Return ``finished``, or another status and its round, as in ``diverged @ 12``."""
        if self.end is None:
            return f"unfinished @ {self.rounds}"
        return self.end.status if self.end.status == "finished" else f"{self.end.status} @ {self.end.round}"

    @property
    def ended_early(self) -> bool:
        """Return whether the run has no final models: one was not finite, or all nodes went down."""
        return self.end is not None and self.end.status in ("diverged", "stalled")

    def series(self, metric: str) -> list[float]:
        """Return the mean over nodes of ``metric`` at each evaluation, on the test samples of the early ones.

        It is NaN if it was not finite. Old runs without ``EvalRow.early`` have more samples in the last
        evaluations; see ``mixed``.

        Raises:
            UsageError: the task has no such metric.
        """
        return self._means(metric, lambda row: row.early.get(metric, row.metrics[metric].mean))

    def _means(self, metric: str, mean_of: Callable[[EvalRow], float | None]) -> list[float]:
        for row in self.evaluations:
            if metric not in row.metrics:
                raise UsageError(f"metric {metric!r}: {self.folder} has {', '.join(row.metrics)}")
        means = map(mean_of, self.evaluations)
        return [math.nan if mean is None else mean for mean in means]

    def after_consensus(self, metric: str) -> float | None:
        """Return the mean over nodes of ``metric`` after all rounds of consensus; None without such rounds."""
        return self.consensus[-1].metrics[metric].mean if self.consensus else None

    @property
    def early_samples(self) -> int | None:
        """Return the number of test samples of early evaluations if the last ones used more, else None."""
        used = [row.samples for row in self.evaluations]
        return used[0] if used and used[0] != used[-1] else None

    @property
    def mixed(self) -> bool:
        """Return whether the last evaluations used more samples, without results on the early ones."""
        return self.early_samples is not None and not self.evaluations[-1].early

    def bytes_per_node(self) -> list[float]:
        """Return the bytes sent until each evaluation, mean over nodes."""
        return [row.traffic.total / self.start.num_nodes for row in self.evaluations]

    def final(self, metric: str, over: int = 1) -> float:
        """Return the mean of ``metric`` over the last ``over`` evaluations.

        The evaluation before training counts only if there is no other. NaN if nothing was measured, or if the
        run ended early and has no final model.
        """
        return self._mean_of_last(self._means(metric, lambda row: row.metrics[metric].mean), over)

    def worst_nodes(self, metric: str, *, lower_is_better: bool, over: int = 1) -> float | None:
        """Return the mean of ``metric`` over the worst tenth of the nodes in the last ``over`` evaluations.

        The tenth is rounded up. None for a run that ended early, and without values.
        """
        found = []
        for row in self._last(over):
            # Five digits, as archives of runs keep them: a folder and its archive have the same tables.
            known = (float(f"{v:.5g}") for v in row.per_node.get(metric, []) if v is not None)
            values = sorted(known, reverse=lower_is_better)
            count = -(-len(values) // 10)
            found.append(statistics.fmean(values[:count]) if values else math.nan)
        return self._or_none(found)

    def sd_over_nodes(self, metric: str, over: int = 1) -> float | None:
        """Return the standard deviation over the nodes of ``metric``, mean over the last evaluations."""
        return self._or_none([row.metrics[metric].sd for row in self._last(over) if metric in row.metrics])

    def _last(self, over: int) -> tuple[EvalRow, ...]:
        trained = [row for row in self.evaluations if row.round > 0] or list(self.evaluations)
        return tuple(trained[-over:])

    def _or_none(self, values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None and math.isfinite(value)]
        return statistics.fmean(known) if len(known) == len(values) > 0 and not self.ended_early else None

    def end_of_series(self, metric: str, over: int = 1) -> float:
        """Return :meth:`final` on the test samples of :meth:`series`. Targets are fractions of it."""
        return self._mean_of_last(self.series(metric), over)

    def _mean_of_last(self, values: list[float], over: int) -> float:
        if len(values) > 1 and self.evaluations[0].round == 0:
            del values[0]
        values = values[-over:]
        return statistics.fmean(values) if values and not self.ended_early else math.nan


_WELL = re.compile(r"(\d+ )?(finished|stopped @ \d+)")


def ended_well(status: str) -> bool:
    """Return whether all runs of a status finished or were stopped by their rule; ``; `` joins several runs.

    >>> ended_well("2 finished; 1 stopped @ 40"), ended_well("diverged @ 3"), ended_well("unfinished @ 3")
    (True, False, False)
    """
    return all(_WELL.fullmatch(part) for part in status.split("; "))


def flat_rows(record: Record) -> list[dict[str, Any]]:
    """Return one flat dict per evaluation, for ``pandas.DataFrame``: ``accuracy_mean``, ``bytes_total``, …

    Rows after rounds of consensus are last and have ``consensus_rounds``. If the last evaluations used more
    samples, ``accuracy_early`` is on the same samples in every row.
    """
    rows = []
    measured = (*record.evaluations, *record.consensus)
    both = any(row.early for row in measured)
    for row in measured:
        flat: dict[str, Any] = {
            "name": record.start.name,
            "seed": record.start.seed,
            "round": row.round,
            "time_s": row.time_s,
            "nodes": len(row.nodes),
            "samples": row.samples,
            "train_loss": row.train_loss,
            "consensus_distance": row.consensus_distance,
        }
        if record.consensus:
            flat["consensus_rounds"] = row.consensus_rounds
        for metric, spread in row.metrics.items():
            for field in ("mean", "sd", "min", "max", "average_model"):
                flat[f"{metric}_{field}"] = getattr(spread, field)
            if both:
                flat[f"{metric}_early"] = row.early.get(metric, spread.mean)
        if row.epsilon is not None:
            flat["epsilon"] = row.epsilon
        flat["bytes_total"] = row.traffic.total
        flat |= {f"bytes_{kind}": size_bytes for kind, size_bytes in row.traffic.by_kind().items()}
        flat["bytes_per_node"] = row.traffic.total / record.start.num_nodes
        rows.append(flat)
    return rows


def not_diverged(records: Sequence[Record]) -> Sequence[Record]:
    """Return the runs that neither diverged nor stalled, or all runs if all did."""
    return [record for record in records if not record.ended_early] or records


def start_and_end(records: Sequence[Record], metric: str, final_over: int) -> tuple[float, float]:
    """Return a metric at the start and at the end of curves: means over the runs that did not diverge."""
    kept = not_diverged(records)
    start = statistics.fmean(record.series(metric)[0] for record in kept)
    return start, statistics.fmean(record.end_of_series(metric, final_over) for record in kept)


def samples_note(records: Sequence[Record]) -> str | None:
    """Return a note on the test samples of curves and targets, if final values have others."""
    found = sorted((r for r in records if r.early_samples is not None), key=lambda r: not r.mixed)
    if not found:
        return None
    few, many = found[0].early_samples, found[0].evaluations[-1].samples
    if found[0].mixed:
        return (
            f"The last evaluations are on {many:,} test samples, those before on {few:,} of them: curves "
            f"have a step there, and what reaches a target on {few:,} may not on {many:,}."
        )
    return f"Curves and targets are on the same {few:,} test samples throughout, final values on {many:,}."
