"""What runs measured, as tables and figures.

A :class:`Record` is one run folder's metrics, a :class:`Group` the runs of one variant over several seeds, and
a :class:`Line` what the table says of it. Figures keep one colour per algorithm, wherever it appears.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jwins.checkpoint import write_atomically
from jwins.errors import DataError, UsageError
from jwins.intervals import Difference, paired
from jwins.metrics import EndRow, EvalRow, StartRow, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "colours_of",
    "Group",
    "Line",
    "Reach",
    "Record",
    "Table",
    "Target",
    "columns",
    "difference",
    "figure",
    "flat_rows",
    "head_and_rows",
    "line_of",
    "lines",
    "metrics_table",
    "mark_level",
    "not_diverged",
    "reach",
    "reach_table",
    "save_figure",
    "save_tables",
    "start_and_end",
    "table_cells",
]

COLOURS = {
    "full": "#4d4d4d",
    "random_k": "#e69f00",
    "top_k": "#009e73",
    "choco": "#0072b2",
    "jwins": "#d55e00",
}
"""One colour per algorithm, told apart with any colour vision (after Okabe and Ito)."""

_OWN_COLOUR = "#cc79a7"
_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = {"full": "o", "random_k": "^", "top_k": "v", "choco": "s", "jwins": "D"}
_NEVER = "—"


@dataclass(frozen=True)
class Record:
    """The metrics of one run folder.

    Attributes:
        folder: the run folder.
        start: first row.
        evaluations: in order of rounds.
        end: None for a run that has not ended by itself.
    """

    folder: Path
    start: StartRow
    evaluations: tuple[EvalRow, ...]
    end: EndRow | None

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read ``folder/metrics.jsonl``.

        Raises:
            DataError: there is no run in the folder, or its metrics are damaged.
        """
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise DataError(f"{folder}: no run here (metrics.jsonl is missing)")
        rows = list(read_rows(path))
        if not rows or not isinstance(rows[0], StartRow):
            raise DataError(f"{path}: does not begin with the row that starts a run")
        end = rows[-1] if isinstance(rows[-1], EndRow) else None
        return cls(folder, rows[0], tuple(row for row in rows if isinstance(row, EvalRow)), end)

    @property
    def rounds(self) -> int:
        """Completed rounds that were measured."""
        return self.evaluations[-1].round if self.evaluations else 0

    @property
    def status(self) -> str:
        """``finished``, ``diverged @ 12`` or ``unfinished @ 12``, the number being completed rounds."""
        if self.end is None:
            return f"unfinished @ {self.rounds}"
        return self.end.status if self.end.status == "finished" else f"{self.end.status} @ {self.end.round}"

    @property
    def diverged(self) -> bool:
        """Whether the run ended early because a model was not finite any more."""
        return self.end is not None and self.end.status == "diverged"

    def series(self, metric: str) -> list[float]:
        """Mean over nodes of ``metric`` at each evaluation, all on the test samples of the early ones.

        Not a number where it was not finite. Runs from before there was ``EvalRow.early`` change to more
        samples in the last evaluations; ``mixed`` tells.

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

    @property
    def early_samples(self) -> int | None:
        """Test samples of the early evaluations if the last ones used more, else None."""
        used = [row.samples for row in self.evaluations]
        return used[0] if used and used[0] != used[-1] else None

    @property
    def mixed(self) -> bool:
        """Whether the last evaluations used more samples and do not say what they found on the early ones."""
        return self.early_samples is not None and not self.evaluations[-1].early

    def bytes_per_node(self) -> list[float]:
        """Bytes sent until each evaluation, mean over nodes."""
        return [row.traffic.total / self.start.num_nodes for row in self.evaluations]

    def final(self, metric: str, over: int = 1) -> float:
        """Mean of ``metric`` over the last ``over`` evaluations; the one before training counts only if alone.

        Not a number if nothing was measured, or if the run diverged: it has no final model.
        """
        return self._mean_of_last(self._means(metric, lambda row: row.metrics[metric].mean), over)

    def end_of_series(self, metric: str, over: int = 1) -> float:
        """As :meth:`final`, on the test samples of :meth:`series`: what a target is a fraction of."""
        return self._mean_of_last(self.series(metric), over)

    def _mean_of_last(self, values: list[float], over: int) -> float:
        if len(values) > 1 and self.evaluations[0].round == 0:
            del values[0]
        values = values[-over:]
        return statistics.fmean(values) if values and not self.diverged else math.nan


def flat_rows(record: Record) -> list[dict[str, Any]]:
    """One flat dict per evaluation, as ``pandas.DataFrame`` takes it: ``accuracy_mean``, ``bytes_total``, …

    Where the last evaluations used more samples, ``accuracy_early`` is on the same samples in every row.
    """
    rows = []
    both = any(row.early for row in record.evaluations)
    for row in record.evaluations:
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
        for metric, spread in row.metrics.items():
            for part in ("mean", "sd", "min", "max", "average_model"):
                flat[f"{metric}_{part}"] = getattr(spread, part)
            if both:
                flat[f"{metric}_early"] = row.early.get(metric, spread.mean)
        flat["bytes_total"] = row.traffic.total
        for part in ("positions", "values", "header", "key", "control"):
            flat[f"bytes_{part}"] = getattr(row.traffic, part)
        flat["bytes_per_node"] = row.traffic.total / record.start.num_nodes
        rows.append(flat)
    return rows


def not_diverged(records: Sequence[Record]) -> Sequence[Record]:
    """The runs that did not diverge; all if all did."""
    return [record for record in records if not record.diverged] or records


def start_and_end(records: Sequence[Record], metric: str, final_over: int) -> tuple[float, float]:
    """A metric at the start and at the end of curves, means over the runs that did not diverge.

    Args:
        records: runs with evaluations, at least one.
        metric: its name.
        final_over: how many of the last evaluations the end is the mean of.
    """
    kept = not_diverged(records)
    start = statistics.fmean(record.series(metric)[0] for record in kept)
    return start, statistics.fmean(record.end_of_series(metric, final_over) for record in kept)


def samples_note(records: Sequence[Record]) -> str | None:
    """On which test samples curves and targets are, if not on those of the final values."""
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


@dataclass(frozen=True)
class Group:
    """One variant's runs.

    Attributes:
        name: what the table calls it.
        algorithm: ``kind`` of its sharing, which decides the colour.
        records: one per seed.
        raw_bytes: for each record, bytes per node that full sharing of uncompressed float32 parameters
            would have sent in the same rounds: 4 bytes per parameter and recipient.
    """

    name: str
    algorithm: str
    records: tuple[Record, ...]
    raw_bytes: tuple[float, ...]

    @property
    def counted(self) -> Group:
        """The runs that did not diverge, of which final values and bytes are means; all if all diverged."""
        records = not_diverged(self.records)
        if len(records) == len(self.records):
            return self
        raw = [raw for record, raw in zip(self.records, self.raw_bytes, strict=True) if not record.diverged]
        return Group(self.name, self.algorithm, tuple(records), tuple(raw))

    @property
    def diverged(self) -> str:
        """``diverged`` if all runs did, ``1 of 5 diverged`` if some did, nothing if none did."""
        lost, runs = sum(record.diverged for record in self.records), len(self.records)
        if lost in (0, runs):
            return "diverged" if lost else ""
        return f"{lost} of {runs} diverged"


@dataclass(frozen=True)
class Target:
    """A value of the metric that variants are timed to.

    Attributes:
        metric: name of the metric.
        value: to reach.
        lower_is_better: whether to fall to it instead of rising to it.
        meaning: in words, e.g. "95 % of full sharing's final accuracy".
    """

    metric: str
    value: float
    lower_is_better: bool = False
    meaning: str = ""

    def first(self, record: Record) -> EvalRow | None:
        """The first evaluation that reaches the target, None if there is none."""
        for row, value in zip(record.evaluations, record.series(self.metric), strict=True):
            if value <= self.value if self.lower_is_better else value >= self.value:
                return row
        return None


@dataclass(frozen=True)
class Line:
    """What the table says of one variant. Means are over seeds, bytes are per node.

    Attributes:
        variant: its name.
        seeds: how many runs.
        counted: how many of them did not diverge; final values, bytes and savings are means over these.
        final: final metric, mean over seeds; not a number if all diverged.
        final_sd: standard deviation over seeds (of a sample), None for one seed.
        bytes_per_node: sent in the whole run.
        saving_raw: 1 - bytes / bytes of full sharing of raw float32.
        saving_codec: 1 - bytes / bytes of full sharing through the same codec in as many rounds, or None
            without full sharing in the comparison.
        reached: how many of the seeds reached the target.
        bytes_to_target: mean over the seeds that reached it, None if none did.
        rounds_to_target: likewise.
        seconds_to_target: likewise, virtual seconds.
        status: ``finished``, or what happened instead.
        difference: final metric minus the reference variant's, mean over the seeds of both; None for the
            reference itself.
        difference_half: half the width of its 95 % interval (Student's t, paired by seed); None for one seed.
        difference_seeds: in how many seeds both ran.
        reference: name of that variant.
        overhead: real seconds of everything but training and evaluation, per second of training.
        group: which variants it is compared with, if the comparison has groups.
        tuned: what was chosen for it, such as ``gamma = 0.4``.
        target: value of the metric that bytes, rounds and seconds are counted to.
        meaning: of that value, in words.
    """

    variant: str
    seeds: int
    counted: int
    final: float
    final_sd: float | None
    bytes_per_node: float
    saving_raw: float
    saving_codec: float | None
    reached: int
    bytes_to_target: float | None
    rounds_to_target: float | None
    seconds_to_target: float | None
    status: str
    difference: float | None = None
    difference_half: float | None = None
    difference_seeds: int = 0
    reference: str | None = None
    overhead: float | None = field(default=None, compare=False)  # real time differs from run to run
    group: str | None = None
    tuned: str = ""
    target: float = math.nan
    meaning: str = ""


def lines(
    groups: Sequence[Group],
    target: Target,
    *,
    full: str | None,
    final_over: int = 1,
    reference: str | None = None,
) -> list[Line]:
    """The table.

    Args:
        groups: the variants that have been run.
        target: what bytes, rounds and seconds are counted to.
        full: name of the variant with full sharing, against which savings are stated; None if there is none.
        final_over: how many last evaluations make up the final value.
        reference: name of the variant to which differences are stated; None for ``full``.
    """
    by_name = {group.name: group for group in groups}
    whole = by_name.get(full or "")
    other = by_name.get(reference or full or "")
    return [line_of(group, target, full=whole, reference=other, final_over=final_over) for group in groups]


def line_of(
    group: Group,
    target: Target,
    *,
    full: Group | None,
    reference: Group | None = None,
    final_over: int = 1,
    label: str | None = None,
    tuned: str = "",
) -> Line:
    """One line of the table; see :func:`lines`.

    Args:
        group: the variant's runs.
        target: what bytes, rounds and seconds are counted to.
        full: the runs with full sharing, against which savings are stated.
        reference: the runs to which the difference is stated.
        final_over: how many last evaluations make up the final value.
        label: the variant's group in the comparison.
        tuned: what was chosen for it.
    """
    counted = group.counted
    finals = [record.final(target.metric, final_over) for record in counted.records]
    sent = [record.bytes_per_node()[-1] for record in counted.records]
    hits = [(record, row) for record in group.records if (row := target.first(record)) is not None]
    apart = None if reference is None else difference(group, reference, target.metric, final_over)
    return Line(
        variant=group.name,
        seeds=len(group.records),
        counted=sum(not record.diverged for record in group.records),
        final=statistics.fmean(finals),
        final_sd=_deviation(finals),
        bytes_per_node=statistics.fmean(sent),
        saving_raw=_saving(sum(sent), sum(counted.raw_bytes)),
        saving_codec=None if full is None else _saving(sum(sent), _same_rounds(full, counted)),
        reached=len(hits),
        bytes_to_target=_mean([row.traffic.total / record.start.num_nodes for record, row in hits]),
        rounds_to_target=_mean([float(row.round) for _, row in hits]),
        seconds_to_target=_mean([row.time_s for _, row in hits]),
        status="; ".join(_counted([record.status for record in group.records])),
        difference=None if apart is None else apart.mean,
        difference_half=None if apart is None else apart.half_width,
        difference_seeds=0 if apart is None else apart.pairs,
        reference=None if reference is None else reference.name,
        overhead=_overhead(group),
        group=label,
        tuned=tuned,
        target=target.value,
        meaning=target.meaning,
    )


def difference(group: Group, reference: Group, metric: str, final_over: int = 1) -> Difference | None:
    """Final ``metric`` of a variant minus that of another, paired by seed, with a 95 % interval.

    Returns:
        None for the same variant, or if no seed ran for both. Seeds in which either diverged are left out.
    """
    if group.name == reference.name:
        return None
    others = {record.start.seed: record for record in reference.records if not record.diverged}
    own = [record for record in group.records if not record.diverged]
    pairs = [(record, others[record.start.seed]) for record in own if record.start.seed in others]
    if not pairs:
        return None
    return paired(
        [a.final(metric, final_over) for a, _ in pairs], [b.final(metric, final_over) for _, b in pairs]
    )


def _overhead(group: Group) -> float | None:
    """Real seconds of everything but training and evaluation, per second of training."""
    spent = [record.end.wall_s for record in group.records if record.end is not None]
    training = math.fsum(wall.get("training", 0.0) for wall in spent)
    rest = math.fsum(w.get("total", 0.0) - w.get("training", 0.0) - w.get("evaluation", 0.0) for w in spent)
    return rest / training if training > 0 else None


@dataclass(frozen=True)
class Reach:
    """What it took a variant to reach one of several targets; means over the seeds that did, bytes per node.

    Attributes:
        variant: its name.
        group: of the comparison, if it has any.
        target: value of the metric.
        meaning: of that value, in words.
        seeds: how many runs.
        reached: how many of them reached it.
        bytes_per_node: sent until then, None if none reached it.
        rounds: likewise.
        seconds: likewise, virtual.
        baseline: the variant that ratios refer to, None if there is none or it is this one.
        pairs: seeds in which both reached it.
        bytes_ratio: bytes of this variant / bytes of the baseline, over those seeds; None if there are none.
        seconds_ratio: likewise.
    """

    variant: str
    group: str | None
    target: float
    meaning: str
    seeds: int
    reached: int
    bytes_per_node: float | None
    rounds: float | None
    seconds: float | None
    baseline: str | None
    pairs: int
    bytes_ratio: float | None
    seconds_ratio: float | None


def reach(
    group: Group, targets: Sequence[Target], baseline: Group | None = None, label: str | None = None
) -> list[Reach]:
    """What it took a variant to reach each target.

    Args:
        group: the variant's runs.
        targets: what to reach.
        baseline: the runs of the variant that ratios refer to.
        label: the variant's group in the comparison.
    """
    if baseline is not None and baseline.name == group.name:
        baseline = None
    found = []
    for target in targets:
        own, other = _hits(group, target), {} if baseline is None else _hits(baseline, target)
        both = [(own[seed], other[seed]) for seed in own if seed in other]
        sent = [a[0] for a in own.values()]
        found.append(
            Reach(
                variant=group.name,
                group=label,
                target=target.value,
                meaning=target.meaning,
                seeds=len(group.records),
                reached=len(own),
                bytes_per_node=_mean(sent),
                rounds=_mean([a[1] for a in own.values()]),
                seconds=_mean([a[2] for a in own.values()]),
                baseline=None if baseline is None else baseline.name,
                pairs=len(both),
                bytes_ratio=_ratio([a[0] for a, _ in both], [b[0] for _, b in both]),
                seconds_ratio=_ratio([a[2] for a, _ in both], [b[2] for _, b in both]),
            )
        )
    return found


def _hits(group: Group, target: Target) -> dict[int, tuple[float, float, float]]:
    """By seed, bytes per node, rounds and seconds to the target, for the runs that reach it."""
    return {
        record.start.seed: (row.traffic.total / record.start.num_nodes, float(row.round), row.time_s)
        for record in group.records
        if (row := target.first(record)) is not None
    }


def _ratio(values: Sequence[float], others: Sequence[float]) -> float | None:
    return math.fsum(values) / math.fsum(others) if math.fsum(others) > 0 else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    """Of a sample; None for one value, and where a value is not finite, as of a run that diverged."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def _saving(sent: float, reference: float) -> float:
    return 1.0 - sent / reference if reference > 0 else math.nan


def _same_rounds(reference: Group, group: Group) -> float:
    """Bytes per node that ``reference`` sent, for each of ``group``'s runs in as many rounds."""
    by_seed = {record.start.seed: record for record in reference.records}
    total = 0.0
    for record in group.records:
        other = by_seed.get(record.start.seed, reference.records[0])
        rounds = [row.round for row in other.evaluations]
        total += float(np.interp(record.rounds, rounds, other.bytes_per_node())) if rounds else 0.0
        if rounds and record.rounds > rounds[-1] > 0:  # every round costs full sharing about the same
            total += other.bytes_per_node()[-1] * (record.rounds / rounds[-1] - 1)
    return total


def _counted(words: Sequence[str]) -> list[str]:
    if len(set(words)) == 1:
        return [words[0]]
    return [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]


# --- Tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table beside the main one.

    Attributes:
        name: of its CSV file, and of its entry in ``summary.json``.
        title: in words.
        head: headings.
        rows: as text.
        data: the same in full precision, one flat dict per row.
        notes: sentences below it.
    """

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    data: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def reach_table(reached: Sequence[Reach], target: Target) -> Table:
    """Bytes, rounds and seconds to several targets, and their ratios to a baseline's."""
    percent = is_percent(target)
    head = ["variant", f"{target.metric} to reach", "reached", "bytes/node", "rounds", "seconds"]
    head += ["bytes / baseline's", "seconds / baseline's", "baseline"]
    rows = []
    for row in reached:
        value = f"{row.target * 100:.1f} %" if percent else f"{row.target:.4g}"
        some = f" ({row.pairs})" if 0 < row.pairs < row.seeds else ""
        rows.append(
            [
                row.variant,
                f"{value} ({row.meaning})" if row.meaning else value,
                f"{row.reached}/{row.seeds}" if row.reached else "never",
                _NEVER if row.bytes_per_node is None else size(row.bytes_per_node),
                _NEVER if row.rounds is None else f"{row.rounds:.0f}",
                _NEVER if row.seconds is None else f"{row.seconds:.1f}",
                _NEVER if row.bytes_ratio is None else f"{row.bytes_ratio:.2f}{some}",
                _NEVER if row.seconds_ratio is None else f"{row.seconds_ratio:.2f}{some}",
                row.baseline or _NEVER,
            ]
        )
    return Table("targets", "To each target", head, rows, [asdict(row) for row in reached])


def metrics_table(
    groups: Sequence[tuple[Group, Group | None]], metrics: Sequence[str], final_over: int = 1
) -> Table:
    """Final values of several metrics, and their differences to a reference.

    Args:
        groups: each variant's runs, and those of its reference.
        metrics: names.
        final_over: how many last evaluations make up the final value.
    """
    rows, data = [], []
    for metric in metrics:
        for group, reference in groups:
            counted = group.counted.records
            finals = [record.final(metric, final_over) for record in counted]
            sd = _deviation(finals)
            apart = None if reference is None else difference(group, reference, metric, final_over)
            row = {
                "metric": metric,
                "variant": group.name,
                "seeds": len(group.records),
                "counted": sum(not record.diverged for record in group.records),
                "final": statistics.fmean(finals),
                "final_sd": sd,
                "reference": None if reference is None else reference.name,
                "difference": None if apart is None else apart.mean,
                "difference_half": None if apart is None else apart.half_width,
            }
            percent = is_percent(Target(metric, 0.0))
            data.append(row)
            rows.append(
                [
                    metric,
                    group.name,
                    spread_text(statistics.fmean(finals), sd, percent=percent)
                    + of_seeds(len(counted), len(group.records)),
                    _NEVER if apart is None else difference_text(apart.mean, apart.half_width, percent=percent),
                ]
            )
    return Table("metrics", "Further metrics", ["metric", "variant", "final", "difference [95 %]"], rows, data)


def spread_text(mean: float, sd: float | None, *, percent: bool) -> str:
    """Mean and standard deviation.

    >>> spread_text(0.5, 0.012, percent=True)
    '50.0 ± 1.2 %'
    """
    if math.isnan(mean):
        return _NEVER
    scale, unit, digits = (100.0, " %", 1) if percent else (1.0, "", 4)
    return f"{mean * scale:.{digits}f}" + ("" if sd is None else f" ± {sd * scale:.{digits}f}") + unit


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """A number with so many decimals; what rounds to zero has no sign.

    >>> fixed(-0.04, 1), fixed(0.26, 1, sign=True)
    ('0.0', '+0.3')
    """
    value = round(value, digits)
    return f"{0.0:.{digits}f}" if value == 0.0 else f"{value:{'+' if sign else ''}.{digits}f}"


def of_seeds(some: int, seeds: int) -> str:
    """How many of the seeds a mean is over, unless all or none.

    >>> of_seeds(2, 3), of_seeds(3, 3)
    (' (2/3)', '')
    """
    return f" ({some}/{seeds})" if 0 < some < seeds else ""


def difference_text(mean: float, half: float | None, *, percent: bool) -> str:
    """A difference and its interval; of percentages, in points.

    >>> difference_text(-0.012, 0.02, percent=True)
    '-1.2 [-3.2, +0.8]'
    """
    scale, digits = (100.0, 1) if percent else (1.0, 4)
    if math.isnan(mean):
        return _NEVER
    text, low, high = (
        fixed(value * scale, digits, sign=True) for value in (mean, mean - (half or 0.0), mean + (half or 0.0))
    )
    return text if half is None else f"{text} [{low}, {high}]"


def columns(target: Target, reference: str | None = None) -> list[str]:
    """Headings of the table.

    Args:
        target: names the metric.
        reference: what differences are stated to, if it is the same for all lines.
    """
    return [
        "variant",
        f"final {target.metric}",
        "bytes/node",
        "saving vs raw",
        "saving vs codec",
        "bytes to target",
        "rounds",
        "seconds",
        f"difference{f' to {reference}' if reference else ''} [95 %]",
        "other / training",
        "status",
    ]


def table_cells(line: Line, *, percent: bool) -> list[str]:
    """One line of the table as text.

    Args:
        line: what to show.
        percent: whether the metric is a fraction shown in percent.
    """
    some = of_seeds(line.reached, line.seeds)
    return [
        line.variant + (f" ({line.tuned})" if line.tuned else ""),
        spread_text(line.final, line.final_sd, percent=percent) + of_seeds(line.counted, line.seeds),
        size(line.bytes_per_node),
        share(line.saving_raw),
        _NEVER if line.saving_codec is None else share(line.saving_codec),
        _NEVER if line.bytes_to_target is None else size(line.bytes_to_target) + some,
        _NEVER if line.rounds_to_target is None else f"{line.rounds_to_target:.0f}{some}",
        _NEVER if line.seconds_to_target is None else f"{line.seconds_to_target:.1f}{some}",
        _NEVER
        if line.difference is None
        else difference_text(line.difference, line.difference_half, percent=percent),
        _NEVER if line.overhead is None else share(line.overhead),
        line.status,
    ]


def head_and_rows(table: Sequence[Line], target: Target) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the main table as text, as the terminal, Markdown and LaTeX show them.

    Args:
        table: the lines.
        target: what was timed to.
    """
    percent = is_percent(target)
    return columns(target, common_reference(table)), [table_cells(line, percent=percent) for line in table]


def size(number: float) -> str:
    """Bytes in decimal units.

    >>> size(999), size(1_234_567)
    ('999 B', '1.23 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return (
                f"{number / factor:.3g} {unit}" if number < 1000 * factor else f"{number / factor:.0f} {unit}"
            )
    return f"{number:.0f} B"


def share(fraction: float) -> str:
    """A fraction in percent.

    >>> share(0.6413)
    '64.1 %'
    """
    return _NEVER if math.isnan(fraction) else f"{fixed(fraction * 100, 1)} %"


def is_percent(target: Target) -> bool:
    """Whether the metric is shown in percent."""
    return target.metric in ("accuracy",) or target.metric.endswith("_accuracy")


def markdown(table: Sequence[Line], target: Target) -> str:
    """The table in Markdown, with a sentence on the target, or on each group's."""
    return "\n".join([*_markdown_rows(*head_and_rows(table, target)), "", *targets_of(table, target), ""])


def targets_of(table: Sequence[Line], target: Target) -> list[str]:
    """The target in a sentence; one for each if variants have different ones."""
    said: dict[str, list[str]] = {}
    for line in table:
        own = describe_target(Target(target.metric, line.target, target.lower_is_better, line.meaning))
        said.setdefault(own, []).append(line.variant)
    if len(said) < 2:
        return [describe_target(target)]
    return [f"{own[:-1]}: for {', '.join(names)}." for own, names in said.items()]


def common_reference(table: Sequence[Line]) -> str | None:
    """What all lines state their difference to, None if that is not the same."""
    names = {line.reference for line in table}
    return names.pop() if len(names) == 1 else None


def _markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    text = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] + ['---:'] * (len(head) - 2) + ['---'])}|"]
    return text + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a paper: a ``tabular`` with the rules of the package booktabs.

    Args:
        head: headings of the columns; the first column is text, the others numbers.
        rows: as many cells each.
    """
    lines = [" & ".join(map(_latex_text, row)) + r" \\" for row in (head, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", ""])


_LATEX = {
    "\\": r"\textbackslash{}",
    **{symbol: f"\\{symbol}" for symbol in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "—": "---",
}


def _latex_text(text: str) -> str:
    """A cell with what LaTeX takes for commands escaped, and hyphens before numbers as minus signs.

    >>> _latex_text("-1.2 [-3.2, +0.8], 20 %, lr_a")
    '$-$1.2 [$-$3.2, +0.8], 20 \\\\%, lr\\\\_a'
    """
    escaped = "".join(_LATEX.get(symbol, symbol) for symbol in text)
    escaped = re.sub(r"(?<![\w.\]])-(?=\d)", "$-$", escaped)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped  # a line break takes it for its argument


def describe_target(target: Target) -> str:
    """The target in a sentence."""
    if math.isnan(target.value):
        return f"Target: unknown ({target.meaning})."
    value = f"{target.value * 100:.1f} %" if is_percent(target) else f"{target.value:.4g}"
    return f"Target: {target.metric} {value}{f' ({target.meaning})' if target.meaning else ''}."


def save_tables(
    folder: Path,
    table: Sequence[Line],
    target: Target,
    about: Mapping[str, Any],
    further: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write ``summary.json``, all tables as ``table.md`` and ``table.tex``, each as a CSV file.

    Args:
        folder: an existing folder.
        table: the lines.
        target: what was timed to.
        about: further entries of ``summary.json``.
        further: tables below the main one.
        notes: sentences below the main table.
    """
    text = markdown(table, target) if table else ""
    tabulars = [latex(*head_and_rows(table, target))] if table else []
    text += "".join(f"{note}\n" for note in notes)
    for other in further:
        text += "\n".join(["", f"## {other.title}", "", *_markdown_rows(other.head, other.rows), ""])
        text += "".join(f"\n{note}\n" for note in other.notes)
        tabulars.append(f"% {other.title}\n{latex(other.head, other.rows)}")
        _write_csv(folder / f"{other.name}.csv", other.data)
    write_atomically(folder / "table.md", text.encode())
    write_atomically(folder / "table.tex", "\n".join(tabulars).encode())
    rows = [asdict(line) for line in table]
    _write_csv(folder / "table.csv", rows)
    summary = {
        **about,
        "notes": list(notes),
        "target": _finite_row(asdict(target)),
        "table": [_finite_row(row) for row in rows],
        **{other.name: [_finite_row(row) for row in other.data] for other in further},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "summary.json", (text + "\n").encode())


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
    writer.writerows([["" if value is None else value for value in row.values()] for row in rows])
    write_atomically(path, buffer.getvalue().encode())


def _finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) for name, value in row.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- Figures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    label: str
    values: Callable[[Record], list[float]]
    log: bool = False


def figure(groups: Sequence[Group], target: Target | None, *, metric: str, title: str = "") -> Figure:
    """The metric against rounds, against bytes per node (log axis) and against virtual seconds.

    Lines are means over seeds; bands reach from the lowest to the highest seed.

    Args:
        groups: the variants.
        target: drawn as a dotted line, if there is one.
        metric: what to draw.
        title: above everything.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    axes_of = [
        _Axis("rounds", lambda record: [float(row.round) for row in record.evaluations]),
        _Axis("MB sent per node (log)", lambda r: [b / 1e6 for b in r.bytes_per_node()], log=True),
        _Axis("virtual seconds", lambda record: [row.time_s for row in record.evaluations]),
    ]
    with rc_context(_STYLE):
        drawing = Figure(figsize=(12.0, 4.6), dpi=150)
        FigureCanvasAgg(drawing)
        panels = drawing.subplots(1, 3, sharey=True)
        percent = is_percent(Target(metric, math.nan))
        styles = _styles(groups)
        ends: list[float] = []
        for panel, axis in zip(panels, axes_of, strict=True):
            for group, style in zip(groups, styles, strict=True):
                ends += _draw(panel, group, metric, axis, style, 100.0 if percent else 1.0)
            panel.set_xlabel(axis.label)
            if axis.log:
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
                panel.xaxis.set_minor_formatter(NullFormatter())
            else:
                panel.set_xlim(left=0)
        panels[0].set_ylabel(f"{metric} in %, mean over nodes" if percent else f"{metric}, mean over nodes")
        _limit(panels[0], groups, metric, 100.0 if percent else 1.0)
        if target is not None:
            level = target.value * (100.0 if percent else 1.0)
            name = f"target {level:.1f} %" if percent else f"target {level:.4g}"
            for panel in panels:
                named = name if panel is panels[0] else ""
                mark_level(panel, level, named, size=9.0, line="#777777", letters="#555555")
        handles, names = panels[0].get_legend_handles_labels()
        rows = math.ceil(len(names) / 5)
        drawing.legend(
            handles,
            names,
            loc="upper left",
            bbox_to_anchor=(0.045, 0.93 if title else 1.0),
            ncols=math.ceil(len(names) / rows) if rows else 1,
            handlelength=3.0,
            columnspacing=1.8,
        )
        if title:
            drawing.text(0.052, 0.975, title, ha="left", va="top", fontsize=12.5, fontweight="bold")
        top = (0.90 if title else 0.97) - 0.055 * rows
        drawing.subplots_adjust(left=0.06, right=0.985, bottom=0.13, top=top, wspace=0.07)
    return drawing


def save_figure(drawing: Figure, path: Path) -> list[Path]:
    """Write ``path`` as PNG and as PDF, without dates in them, and return both."""
    from matplotlib import rc_context

    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None, "Producer": None})):
        buffer = io.BytesIO()
        with rc_context(_STYLE):
            drawing.savefig(buffer, format=suffix[1:], metadata=metadata)
        write_atomically(path.with_suffix(suffix), buffer.getvalue())
        written.append(path.with_suffix(suffix))
    return written


_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": "#222222",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,
    "savefig.facecolor": "white",
}


def colours_of(algorithms: Sequence[str]) -> list[tuple[str, int]]:
    """Whose colour each variant has, and how many before it have the same.

    A variant has its algorithm's colour. Where an algorithm has more than three variants, as in an ablation,
    all but the first also take those of algorithms that are not there.

    Args:
        algorithms: of the variants, in order; one that is not in ``COLOURS`` counts as ``own``.
    """
    keys = [algorithm if algorithm in COLOURS else "own" for algorithm in algorithms]
    spare = [key for key in ("choco", "top_k", "own", "random_k") if key not in keys]
    colours: list[str] = []
    for number, key in enumerate(keys):
        palette = [key, *spare] if keys.count(key) > 3 else [key]
        colours.append(palette[keys[:number].count(key) % len(palette)])
    return [(colour, colours[:number].count(colour)) for number, colour in enumerate(colours)]


def _styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Colours as in ``colours_of``; those of one differ in dashes, from the fifth on in shade, too."""
    return [
        {
            "color": _shade(COLOURS.get(key, _OWN_COLOUR), number // len(_STYLES)),
            "marker": _MARKERS.get(group.algorithm, "P"),
            "linestyle": _STYLES[number % len(_STYLES)],
        }
        for group, (key, number) in zip(groups, colours_of([g.algorithm for g in groups]), strict=True)
    ]


def _shade(colour: str, number: int) -> str:
    """``colour`` for number 0, lighter for odd and darker for further even ones."""
    towards, amount = (255 if number % 2 else 0), (0.45 if number else 0.0)
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (towards - c) * amount):02x}" for c in channels)


def _draw(
    panel: Axes, group: Group, metric: str, axis: _Axis, style: dict[str, Any], scale: float
) -> list[float]:
    """One variant in one panel; returns where its line ends."""
    # A seed that stopped earlier would bend the mean; so the mean goes as far as every seed does that counts.
    records, diverged = group.counted.records, group.diverged
    shared = min((len(record.evaluations) for record in records), default=0)
    skip = 1 if axis.log else 0  # nothing was sent before the first round
    if shared <= skip:
        return []
    x = np.mean([axis.values(record)[skip:shared] for record in records], axis=0)
    y = np.array([record.series(metric)[skip:shared] for record in records]) * scale
    if len(y) > 1:
        panel.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.16, linewidth=0)
    mean = y.mean(axis=0)
    panel.plot(
        x,
        mean,
        label=f"{group.name} ({diverged})" if diverged else group.name,
        markevery=[len(x) - 1],
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=1.0,
        clip_on=False,
        zorder=3,
        **style,
    )
    if diverged == "diverged":
        panel.plot(x[-1:], mean[-1:], marker="x", color=style["color"], markersize=11, mew=2.5, zorder=4)
    return [float(mean[-1])]


def mark_level(axes: Axes, y: float, name: str, *, size: float, line: str, letters: str) -> None:
    """A dotted horizontal line, named at one end, above or below it: where the fewest curves run.

    Args:
        axes: with their curves, scales and limits as they will be.
        y: where, in data units.
        name: what to write; "" for nothing.
        size: of the letters, points.
        line: colour of the line.
        letters: colour of the letters.
    """
    if name:
        at_end, above = _clear_place(axes, y, width=0.62 * size * len(name), height=1.5 * size)
        axes.annotate(
            name,
            (float(at_end), y),
            xycoords=("axes fraction", "data"),
            xytext=(-4 if at_end else 4, 3 if above else -3),
            textcoords="offset points",
            ha="right" if at_end else "left",
            va="bottom" if above else "top",
            fontsize=size,
            color=letters,
            zorder=5,
        )
    axes.axhline(y, color=line, linewidth=1.1, linestyle=(0, (2, 2)), zorder=1)


def _clear_place(axes: Axes, y: float, *, width: float, height: float) -> tuple[bool, bool]:
    """(at the end, above): the corner at a level where a box, in points, covers the least of the curves."""
    drawing = axes.get_figure()
    assert drawing is not None
    width, height = width * drawing.dpi / 72.0, height * drawing.dpi / 72.0
    points = [np.empty((0, 2))]
    between = np.linspace(0.0, 1.0, 24, endpoint=False)[:, None]
    for curve in axes.get_lines():
        corners = curve.get_transform().transform(np.asarray(curve.get_xydata(), dtype=np.float64))
        points += [a + between * (b - a) for a, b in itertools.pairwise(corners)]
        points.append(corners[-1:])
    x_all, y_all = np.concatenate(points).T
    (left, bottom), (right, top) = axes.transAxes.transform([(0.0, 0.0), (1.0, 1.0)])
    level = float(axes.transData.transform((axes.get_xlim()[1], y))[1])

    def covered(place: tuple[bool, bool]) -> tuple[bool, int]:
        at_end, above = place
        x0, y0 = (right - width if at_end else left), (level if above else level - height)
        inside = (x0 <= x_all) & (x_all <= x0 + width) & (y0 <= y_all) & (y_all <= y0 + height)
        return not bottom <= y0 <= top - height, int(inside.sum())

    return min(itertools.product((True, False), (False, True)), key=covered)


def _limit(panel: Axes, groups: Sequence[Group], metric: str, scale: float) -> None:
    """Leave out values so far off that they would flatten everything else, such as a diverging loss."""
    values = np.array([v for g in groups for r in g.records for v in r.series(metric)]) * scale
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return
    low, high = float(values.min()), float(values.max())
    typical = float(np.quantile(values, 0.9))
    if high - low > 10 * (typical - low) > 0:
        high = typical
    margin = 0.04 * (high - low) or 1.0
    panel.set_ylim(low - margin, high + margin)
