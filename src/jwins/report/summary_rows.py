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

__all__ = ["SummaryRow", "summary_row", "summary_rows"]


@dataclass(frozen=True)
class SummaryRow:
    """Row of one variant. Means are over seeds, bytes are per node.

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


def summary_rows(
    groups: Sequence[Group],
    target: Target,
    *,
    full: str | None,
    final_over: int = 1,
    reference: str | None = None,
) -> list[SummaryRow]:
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
    return [summary_row(group, target, full=whole, reference=other, final_over=final_over) for group in groups]


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
    )
