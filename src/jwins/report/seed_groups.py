"""Runs of one variant over its seeds, and comparisons of two variants."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jwins.errors import UsageError
from jwins.run_folder.record import Record, not_diverged
from jwins.run_folder.rows import EvalRow


@dataclass(frozen=True)
class Group:
    """One variant's runs.

    Attributes:
        algorithm: ``kind`` of its sharing, which determines the colour.
        records: one per seed.
        raw_bytes: for each record, bytes per node of full sharing of uncompressed float32 parameters
            in the same rounds: 4 bytes per parameter and recipient.
        steps: local steps of a round, mean over nodes; None if unknown.
    """

    name: str
    algorithm: str
    records: tuple[Record, ...]
    raw_bytes: tuple[float, ...]
    steps: float | None = None

    @property
    def counted(self) -> Group:
        """Return the runs that means are over: those that did not diverge, or all if all did."""
        records = not_diverged(self.records)
        if len(records) == len(self.records):
            return self
        raw = [raw for record, raw in zip(self.records, self.raw_bytes, strict=True) if not record.ended_early]
        return replace(self, records=tuple(records), raw_bytes=tuple(raw))

    @property
    def diverged(self) -> str:
        """Return ``diverged`` if all runs did, a text such as ``1 of 5 stalled`` if some did, else ""."""
        lost = [record.end.status for record in self.records if record.end is not None and record.ended_early]
        if not lost:
            return ""
        word = " or ".join(sorted(set(lost)))
        return word if len(lost) == len(self.records) else f"{len(lost)} of {len(self.records)} {word}"


@dataclass(frozen=True)
class Target:
    """Value of the metric that variants must reach.

    Attributes:
        meaning: description, e.g. "95 % of full sharing's final accuracy".
    """

    metric: str
    value: float
    lower_is_better: bool = False
    meaning: str = ""

    def first(self, record: Record) -> EvalRow | None:
        """Return the first evaluation that reaches the target, None without one."""
        for row, value in zip(record.evaluations, record.series(self.metric), strict=True):
            if value <= self.value if self.lower_is_better else value >= self.value:
                return row
        return None


def difference(group: Group, reference: Group, metric: str, final_over: int = 1) -> Difference | None:
    """Return the final ``metric`` of a variant minus that of another, paired by seed, with a 95 % interval.

    Returns:
        The difference, or None for the same variant or without common seeds. Seeds in which either diverged are
        left out.
    """
    if group.name == reference.name:
        return None
    others = {record.start.seed: record for record in reference.records if not record.ended_early}
    own = [record for record in group.records if not record.ended_early]
    pairs = [(record, others[record.start.seed]) for record in own if record.start.seed in others]
    if not pairs:
        return None
    return paired(
        [a.final(metric, final_over) for a, _ in pairs], [b.final(metric, final_over) for _, b in pairs]
    )


def overhead(group: Group) -> float | None:
    """Return real seconds of everything but training and evaluation, per second of training, of one process."""
    spent = [r.end.wall_s for r in group.records if r.end is not None and r.clock == "virtual"]
    training = math.fsum(wall.get("training", 0.0) for wall in spent)
    rest = math.fsum(w.get("total", 0.0) - w.get("training", 0.0) - w.get("evaluation", 0.0) for w in spent)
    return rest / training if training > 0 else None


@dataclass(frozen=True)
class TargetOutcome:
    """Cost for a variant to reach one of several targets: means over the seeds that reached it, bytes per node.

    Attributes:
        reached: number of runs that reached it.
        bytes_per_node: bytes sent until then, None if none reached it.
        baseline: variant that ratios refer to, None without one or if it is this one.
        pairs: seeds in which both reached it.
        bytes_ratio: bytes of this variant / bytes of the baseline, geometric mean over those seeds; None
            without any, or if a run sent none.
        seconds_ratio: the same ratio for seconds.
        bytes_interval: 95 % interval of ``bytes_ratio``; None for fewer than two pairs.
        seconds_interval: the same interval for seconds.
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
    bytes_interval: tuple[float, float] | None
    seconds_interval: tuple[float, float] | None


def target_outcomes(
    group: Group, targets: Sequence[Target], baseline: Group | None = None, label: str | None = None
) -> list[TargetOutcome]:
    """Return the cost for a variant to reach each target."""
    if baseline is not None and baseline.name == group.name:
        baseline = None
    found = []
    for target in targets:
        own, other = _hits(group, target), {} if baseline is None else _hits(baseline, target)
        both = [(own[seed], other[seed]) for seed in own if seed in other]
        sent = [a[0] for a in own.values()]
        sizes, sizes_interval = geometric_ratio([a[0] for a, _ in both], [b[0] for _, b in both])
        times, times_interval = geometric_ratio([a[2] for a, _ in both], [b[2] for _, b in both])
        found.append(
            TargetOutcome(
                variant=group.name,
                group=label,
                target=target.value,
                meaning=target.meaning,
                seeds=len(group.records),
                reached=len(own),
                bytes_per_node=mean_of(sent),
                rounds=mean_of([a[1] for a in own.values()]),
                seconds=mean_of([a[2] for a in own.values()]),
                baseline=None if baseline is None else baseline.name,
                pairs=len(both),
                bytes_ratio=sizes,
                seconds_ratio=times,
                bytes_interval=sizes_interval,
                seconds_interval=times_interval,
            )
        )
    return found


def _hits(group: Group, target: Target) -> dict[int, tuple[float, float, float]]:
    """Return bytes per node, rounds and seconds to the target, by seed, for the runs that reach it."""
    return {
        record.start.seed: (row.traffic.total / record.start.num_nodes, float(row.round), row.time_s)
        for record in group.records
        if (row := target.first(record)) is not None
    }


def geometric_ratio(
    values: Sequence[float], others: Sequence[float]
) -> tuple[float | None, tuple[float, float] | None]:
    """Return the geometric mean of the ratios of paired numbers, and Student's 95 % interval of it.

    The interval is that of the mean logarithm; None for fewer than two pairs. Both are None without pairs, or
    if a number is not positive.

    >>> ratio, (low, high) = geometric_ratio([2.0, 3.0, 2.5], [1.0, 1.2, 1.3])
    >>> f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
    '2.13 [1.50, 3.02]'
    """
    if not values or min(*values, *others) <= 0:
        return None, None
    found = paired([math.log(value) for value in values], [math.log(other) for other in others])
    mean, half = found.mean, found.half_width
    return math.exp(mean), None if half is None else (math.exp(mean - half), math.exp(mean + half))


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean; None without values."""
    return statistics.fmean(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Return the deviation of a sample; None for one value, or if a value is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def saving(sent: float, reference: float) -> float:
    """Return the fraction of the reference's bytes that was saved; NaN if the reference sent none."""
    return 1.0 - sent / reference if reference > 0 else math.nan


def same_rounds(reference: Group, group: Group) -> float:
    """Return the bytes per node of ``reference``, for each run of ``group`` in the same number of rounds."""
    by_seed = {record.start.seed: record for record in reference.records}
    total = 0.0
    for record in group.records:
        other = by_seed.get(record.start.seed, reference.records[0])
        rounds = [row.round for row in other.evaluations]
        total += float(np.interp(record.rounds, rounds, other.bytes_per_node())) if rounds else 0.0
        if rounds and record.rounds > rounds[-1] > 0:  # full sharing sends about the same in every round
            total += other.bytes_per_node()[-1] * (record.rounds / rounds[-1] - 1)
    return total


def count_texts(words: Sequence[str]) -> list[str]:
    """Return ``["finished"]``, or ``["2 finished", "1 diverged"]`` if they differ."""
    if len(set(words)) == 1:
        return [words[0]]
    return [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]


# --- Intervals of differences -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference over pairs.

    Attributes:
        half_width: half width of its confidence interval; None for one pair.
    """

    mean: float
    half_width: float | None
    pairs: int


def paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Return the mean of ``values - reference``, pair by pair, with Student's 95 % interval.

    Pairing removes effects of a seed on both, such as the partition and the initial model.

    >>> found = paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.5])
    >>> f"{found.mean:.3f} +- {found.half_width:.3f}"
    '0.133 +- 0.143'

    Raises:
        UsageError: no pairs, or different numbers of values.
    """
    if len(values) != len(reference) or not values:
        raise UsageError(
            f"paired: {len(values)} and {len(reference)} numbers; expected the same number of "
            f"both, at least one"
        )
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    count = len(differences)
    mean = statistics.fmean(differences)
    if count == 1:
        return Difference(mean, None, 1)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    return Difference(mean, student_t_quantile(0.975, count - 1) * error, count)


def student_t_quantile(p: float, freedom: int) -> float:
    """Return the quantile ``p`` of Student's t with ``freedom`` degrees of freedom.

    For whole degrees of freedom the distribution function is a finite sum in the angle
    ``arctan(t / sqrt(freedom))`` (Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and
    26.7.4); bisection over the angle inverts it.

    Args:
        p: in [0.5, 1).
        freedom: at least 1.

    Raises:
        UsageError: an argument is out of range.

    >>> round(student_t_quantile(0.975, 4), 4)
    2.7764
    """
    if not 0.5 <= p < 1.0 or freedom < 1:
        raise UsageError(
            f"student_t_quantile: p = {p}, freedom = {freedom}; expected p in [0.5, 1), freedom >= 1"
        )
    inside = 2.0 * p - 1.0  # P(|T| < t)
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _within_angle(middle, freedom) < inside:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _within_angle(angle: float, freedom: int) -> float:
    """Return P(|T| < sqrt(freedom) tan(angle))."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    term = 1.0 if freedom % 2 == 0 else math.cos(angle)
    total = term if freedom > 1 else 0.0
    for k in range(2 if freedom % 2 == 0 else 3, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return sine * total if freedom % 2 == 0 else 2.0 / math.pi * (angle + sine * total)
