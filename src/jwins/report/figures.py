"""Figures of a study, and reasons for missing ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jwins.errors import JwinsError
from jwins.experiment.load import load
from jwins.report.bar_charts import bytes_chart, nodes_chart
from jwins.report.chart import Chart
from jwins.report.colours import Style
from jwins.report.curve_charts import ROUNDS, SENT, XAxis, YAxis, curve_chart, seconds
from jwins.report.formatting import capital, spaced, without_paths
from jwins.report.pareto_chart import pareto_chart
from jwins.report.partition_chart import PartitionCounts, partition_chart
from jwins.report.settings import described
from jwins.report.studies import Study, StudyVariant, network
from jwins.report.topology_chart import topology_chart
from jwins.run.builders import build_partition, build_task, build_topology, partition_counts
from jwins.run_folder.archive import is_file, read_text
from jwins.run_folder.record import Record

if TYPE_CHECKING:
    from jwins.topology.graph import Graph

_MAX_SETTINGS = 6
"""Maximum number of different graphs or partitions that are drawn of a study."""


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
    _add_topologies(study, figures)
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
    def losses(record: Record) -> list[float]:
        return [math.nan if row.train_loss is None else row.train_loss for row in record.evaluations]

    def distances(record: Record) -> list[float]:
        measured = [row.consensus_distance for row in record.evaluations]
        return [math.nan if distance is None else distance for distance in measured]

    return [
        curve_chart(
            "consensus",
            "Consensus distance",
            "Root mean square distance of the nodes’ parameters from their average.",
            study.groups,
            styles,
            ROUNDS,
            YAxis("distance from the average model", distances),
        ),
        curve_chart(
            "training-loss",
            "Training loss",
            "Of the last round’s batches before each evaluation, mean over nodes.",
            study.groups,
            styles,
            ROUNDS,
            YAxis("training loss", losses),
        ),
    ]


# --- Graphs -----------------------------------------------------------------------------------------------


def _each_setting(
    study: Study, figures: Figures, what: str, key_of: Callable[[StudyVariant], object]
) -> Iterator[tuple[StudyVariant, str, str]]:
    """Return variants with new keys, with suffixes for titles and for names of files."""
    seen: list[object] = []
    for variant in study.variants:
        key = key_of(variant)
        if key in seen:
            continue
        seen.append(key)
        if len(seen) <= _MAX_SETTINGS:
            first = len(seen) == 1
            yield variant, "" if first else f" of {variant.group.name}", "" if first else f"-{len(seen)}"
    if len(seen) > _MAX_SETTINGS:
        figures.absent.append(f"{len(seen) - _MAX_SETTINGS} more {what} are not drawn.")


def _add_topologies(study: Study, figures: Figures) -> None:
    def key_of(variant: StudyVariant) -> object:
        start = variant.group.records[0].start
        return [variant.tables.get("topology"), start.num_nodes, start.seed]

    for variant, where, end in _each_setting(study, figures, "topologies", key_of):
        record, table = variant.group.records[0], variant.tables.get("topology")
        try:
            experiment = network(record, variant.tables)
            graph = build_topology(experiment, of_all=True).at(0)
        except (JwinsError, OSError, KeyError, TypeError) as error:
            why = without_paths(str(error), record.folder)
            figures.absent.append(f"The topology{where} is not drawn: it cannot be rebuilt ({why}).")
            continue
        caption = _topology_caption(graph, table, record.start.seed, changes=experiment.topology_changes)
        figures.setting.append(topology_chart(f"topology{end}", f"Who sends to whom{where}", caption, graph))


def _topology_caption(graph: Graph, table: Any, seed: int, *, changes: bool) -> str:
    degrees = [len(row) for row in graph.recipients]
    span = f"{degrees[0]}" if len(set(degrees)) == 1 else f"{min(degrees)} to {max(degrees)}"
    others = "other" if span == "1" else "others"
    caption = f"{capital(described(table))}: {graph.num_nodes} nodes, each sends to {span} {others}."
    W = graph.matrix()
    if np.allclose(W, W.T) and graph.num_nodes > 1:
        gap = 1 - float(np.sort(np.abs(np.linalg.eigvalsh(W)))[-2])
        caption += f" Spectral gap of the mixing matrix: {gap:.3g}."
    given: Mapping[str, Any] = table if isinstance(table, Mapping) else {}
    if changes:
        caption += " This is round 0; every round has another graph."
    drawn = given.get("kind") in ("regular", "small_world", "erdos_renyi")
    return caption + (f" Seed {seed}." if changes or drawn else "")


# --- Partitions -------------------------------------------------------------------------------------------


def _add_partitions(study: Study, figures: Figures) -> None:
    def key_of(variant: StudyVariant) -> object:
        return variant.group.records[0].start.fingerprints.get("partition", "")

    for variant, where, end in _each_setting(study, figures, "partitions", key_of):
        record = variant.group.records[0]
        found = _partition(record, variant.tables)
        if isinstance(found, str):
            figures.absent.append(f"The partition{where} is not drawn: {found}.")
            continue
        table = variant.tables.get("task", {}).get("partition")
        natural = isinstance(table, Mapping) and table.get("kind") == "by_key"
        title = f"Who holds which samples{where}"
        caption = _partition_caption(found, table, record.start.seed)
        by_class = not natural and len(found.labels) > 1
        figures.setting.append(partition_chart(f"partition{end}", title, caption, found, by_class=by_class))


def _partition_caption(found: PartitionCounts, table: Any, seed: int) -> str:
    samples = np.array(found.samples)
    caption = f"{capital(described(table))}: {samples.sum():,} samples; "
    caption += f"{samples.min():,} to {samples.max():,} on a node"
    if found.counts:
        held = [sum(count > 0 for count in row) for row in found.counts]
        caption += f", of {min(held)} to {max(held)} classes" if len(found.labels) > 1 else ""
    return f"{caption}. Seed {seed}."


def _partition(record: Record, tables: Mapping[str, Any]) -> PartitionCounts | str:
    """Return the drawing of the partition, or the reason why there is none."""
    path = record.folder / "partition.json"
    if is_file(path):
        try:
            counts = json.loads(read_text(path))
            return PartitionCounts(
                tuple(map(int, counts["samples"])),
                tuple(map(int, counts.get("labels", ()))),
                tuple(tuple(map(int, row)) for row in counts.get("counts", ())),
            )
        except (ValueError, KeyError, TypeError):
            return f"{path.name} of the run is damaged"
    task = tables.get("task", {})
    data = task.get("data")
    at_hand = task.get("name") == "digits" or (data is not None and (record.folder / data).exists())
    if not isinstance(task, Mapping) or not task.get("name") or not at_hand:
        return "the run has no partition.json, and its data are not at hand"
    try:
        experiment = load(record.folder / "config.toml")
        built = build_task(experiment)
        counts = partition_counts(built, build_partition(experiment, built))
    except (JwinsError, OSError) as error:
        why = without_paths(str(error), record.folder)
        return f"the run has no partition.json, and it cannot be drawn again ({why})"
    rows = tuple(tuple(row) for row in counts.get("counts", ()))
    return PartitionCounts(tuple(counts["samples"]), tuple(counts.get("labels", ())), rows)
