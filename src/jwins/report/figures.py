"""Figures of a study, and reasons for missing ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from jwins.report.bar_charts import PartitionCounts, bytes_chart, nodes_chart, partition_chart
from jwins.report.chart import Chart
from jwins.report.colours import Style
from jwins.report.curve_charts import ROUNDS, SENT, XAxis, YAxis, curve_chart, seconds
from jwins.report.formatting import capital, spaced
from jwins.report.pareto_chart import pareto_chart
from jwins.report.settings import described
from jwins.report.studies import Study
from jwins.run_folder.archive import is_file, read_text
from jwins.run_folder.record import Record

_MAX_PARTITIONS = 6


@dataclass
class Figures:
    """Charts of a study, by section, and reasons for missing ones."""

    curves: list[Chart] = field(default_factory=list)
    costs: list[Chart] = field(default_factory=list)
    traffic: list[Chart] = field(default_factory=list)
    nodes: list[Chart] = field(default_factory=list)
    training: list[Chart] = field(default_factory=list)
    setting: list[Chart] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Chart]:
        """Return all charts in the order of the page."""
        return [*self.curves, *self.costs, *self.traffic, *self.nodes, *self.training, *self.setting]


def figures_of(study: Study, styles: Sequence[Style]) -> Figures:
    """Return the figures of a study, with these styles of variants."""
    groups, metric = study.groups, study.target.metric
    figures = Figures(
        curves=_metric_curves(study, styles),
        traffic=[bytes_chart(groups)],
        training=_training_curves(study, styles),
    )
    if any(metric in record.evaluations[-1].per_node for record in study.records):
        figures.nodes = [nodes_chart(groups, styles, metric, percent=study.percent)]
    costs = pareto_chart(groups, styles, study.target, full=study.full, over=study.final_over)
    figures.costs = [] if costs is None else [costs]
    _add_partitions(study, figures)
    return figures


_CLOCKS = {
    "virtual": "Seconds of the virtual clock: modelled training and link times, not a stopwatch.",
    "real": "Seconds of the wall clock, from the start of the first round.",
    "": "Some runs on the virtual clock, of modelled training and link times, others on the wall clock: see "
    "the table of runs.",
}


def _metric_curves(study: Study, styles: Sequence[Style]) -> list[Chart]:
    metric, y_axis = study.target.metric, YAxis.of_metric(study.target)
    name = capital(spaced(metric))
    lead = "Lower is better." if study.target.lower_is_better else ""
    if any(len(group.records) > 1 for group in study.groups):
        lead += " Lines are means over seeds, bands reach from the lowest to the highest seed."

    def chart(slug: str, against: str, caption: str, x_axis: XAxis) -> Chart:
        title = f"{name} against {against}"
        return curve_chart(f"{metric}-{slug}", title, caption.strip(), study.groups, styles, x_axis, y_axis)

    return [
        chart("rounds", "rounds", lead, ROUNDS),
        chart("bytes", "bytes", "Everything a node sent, headers and control included; log axis.", SENT),
        chart("seconds", "time", _CLOCKS[study.clock], seconds(study.clock)),
    ]


def _training_curves(study: Study, styles: Sequence[Style]) -> list[Chart]:
    def chart(slug: str, title: str, caption: str, field: str, label: str) -> Chart:
        def values(record: Record) -> list[float]:
            measured = [getattr(row, field) for row in record.evaluations]
            return [math.nan if value is None else value for value in measured]

        return curve_chart(slug, title, caption, study.groups, styles, ROUNDS, YAxis(label, values))

    distance = "Root mean square distance of the nodes’ parameters from their average."
    loss = "Of the last round’s batches before each evaluation, mean over nodes."
    return [
        chart(
            "consensus", "Consensus distance", distance, "consensus_distance", "distance from the average model"
        ),
        chart("training-loss", "Training loss", loss, "train_loss", "training loss"),
    ]


# --- Partitions -------------------------------------------------------------------------------------------


def _add_partitions(study: Study, figures: Figures) -> None:
    drawn: set[str] = set()
    for variant in study.variants:
        record = variant.group.records[0]
        key = record.start.fingerprints.get("partition", "")
        if key in drawn:
            continue
        drawn.add(key)
        if len(drawn) > _MAX_PARTITIONS:
            figures.absent.append("Further partitions are not drawn.")
            break
        where = "" if len(drawn) == 1 else f" of {variant.group.name}"
        found = _partition(record)
        if isinstance(found, str):
            figures.absent.append(f"The partition{where} is not drawn: {found}.")
            continue
        table = variant.tables.get("task", {}).get("partition")
        natural = isinstance(table, Mapping) and table.get("kind") == "by_key"
        slug = "partition" if len(drawn) == 1 else f"partition-{len(drawn)}"
        title = f"Who holds which samples{where}"
        caption = _partition_caption(found, table, record.start.seed)
        by_class = bool(found.counts) and not natural and len(found.labels) > 1
        figures.setting.append(partition_chart(slug, title, caption, found, by_class=by_class))


def _partition_caption(found: PartitionCounts, table: Any, seed: int) -> str:
    samples = np.array(found.samples)
    caption = f"{capital(described(table))}: {samples.sum():,} samples; "
    caption += f"{samples.min():,} to {samples.max():,} on a node"
    if found.counts:
        held = [sum(count > 0 for count in row) for row in found.counts]
        caption += f", of {min(held)} to {max(held)} classes" if len(found.labels) > 1 else ""
    return f"{caption}. Seed {seed}."


def _partition(record: Record) -> PartitionCounts | str:
    """Return the samples of each node, or the reason why they are not known."""
    path = record.folder / "partition.json"
    if not is_file(path):
        return "the run has no partition.json"
    try:
        return msgspec.json.decode(read_text(path), type=PartitionCounts)
    except ValueError:  # not UTF-8, not JSON, or of another form
        return f"{path.name} of the run is damaged"
