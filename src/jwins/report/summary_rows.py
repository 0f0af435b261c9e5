"""Rows of the main table: one for each variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from jwins.report.seed_groups import (
    Group,
    Target,
    count_texts,
    deviation,
    difference,
    mean_of,
    overhead,
    same_rounds,
    saving,
)
from jwins.run.builders import bits_per_step


@dataclass(frozen=True)
class SummaryRow:
    """Row of one variant. Means are over seeds, bytes are per node.

    Attributes:
        counted: number of runs that did not diverge; final values, bytes and savings are means over these.
        final: final metric, mean over seeds; NaN if all diverged.
        final_sd: standard deviation over seeds (of a sample), None for one seed.
        saving_raw: 1 - bytes / bytes of full sharing of raw float32.
        saving_codec: 1 - bytes / bytes of full sharing through the same codec in the same number of rounds;
            None without full sharing in the comparison.
        bytes_to_target: mean over the seeds that reached it, None without any.
        difference: final metric minus the reference variant's, mean over the seeds of both; None for the
            reference itself.
        difference_half: half the width of its 95 % interval (Student's t, paired by seed); None for one seed.
        difference_seeds: number of seeds that both ran.
        overhead: real seconds of everything but training and evaluation, per second of training.
        worst: final metric over the worst tenth of the nodes, mean over the counted seeds; None where a run
            lacks it.
        node_sd: standard deviation of the final metric over the nodes, likewise.
        bits_per_link: bits per parameter and local step that a node sends to one neighbour; None if the local
            steps are unknown.
        bits_per_node: bits per parameter and local step that a node sends and receives in all.
        epsilon: largest epsilon of all nodes and seeds; None without
            ``train.privacy``.
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
    worst: float | None = None
    node_sd: float | None = None
    bits_per_link: float | None = None
    bits_per_node: float | None = None
    epsilon: float | None = None


def summary_row(
    group: Group,
    target: Target,
    *,
    full: Group | None,
    reference: Group | None = None,
    final_over: int = 1,
    label: str | None = None,
    tuned: str = "",
) -> SummaryRow:
    """Return one line of the main table."""
    counted = group.counted
    finals = [record.final(target.metric, final_over) for record in counted.records]
    sent = [record.bytes_per_node()[-1] for record in counted.records]
    hits = [(record, row) for record in group.records if (row := target.first(record)) is not None]
    lower, over = target.lower_is_better, final_over
    worst = [r.worst_nodes(target.metric, lower_is_better=lower, over=over) for r in counted.records]
    node_sd = [record.sd_over_nodes(target.metric, final_over) for record in counted.records]
    counts = [
        bits_per_step(own, raw, record.start.dim, record.rounds, group.steps)
        for own, raw, record in zip(sent, counted.raw_bytes, counted.records, strict=True)
    ]
    apart = None if reference is None else difference(group, reference, target.metric, final_over)
    return SummaryRow(
        variant=group.name,
        seeds=len(group.records),
        counted=sum(not record.ended_early for record in group.records),
        final=statistics.fmean(finals),
        final_sd=deviation(finals),
        bytes_per_node=statistics.fmean(sent),
        saving_raw=saving(sum(sent), sum(counted.raw_bytes)),
        saving_codec=None if full is None else saving(sum(sent), same_rounds(full, counted)),
        reached=len(hits),
        bytes_to_target=mean_of([row.traffic.total / record.start.num_nodes for record, row in hits]),
        rounds_to_target=mean_of([float(row.round) for _, row in hits]),
        seconds_to_target=mean_of([row.time_s for _, row in hits]),
        status="; ".join(count_texts([record.status for record in group.records])),
        difference=None if apart is None else apart.mean,
        difference_half=None if apart is None else apart.half_width,
        difference_seeds=0 if apart is None else apart.pairs,
        reference=None if reference is None else reference.name,
        overhead=overhead(group),
        group=label,
        tuned=tuned,
        target=target.value,
        meaning=target.meaning,
        worst=_mean_of_all(worst),
        node_sd=_mean_of_all(node_sd),
        bits_per_link=_mean_of_all([None if found is None else found[0] for found in counts]),
        bits_per_node=_mean_of_all([None if found is None else found[1] for found in counts]),
        epsilon=max((e for r in group.records if (e := r.evaluations[-1].epsilon) is not None), default=None),
    )


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) > 0 else None
