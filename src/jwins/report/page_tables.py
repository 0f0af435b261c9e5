"""The page's tables on savings, bytes and the spread over nodes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from jwins.report.bar_charts import bytes_by_kind, kinds_sent
from jwins.report.colours import KIND_COLOURS
from jwins.report.comparison_table import Table, metrics_table, of_all_seeds, target_table
from jwins.report.curve_charts import YAxis, means
from jwins.report.formatting import (
    NEVER,
    capital,
    describe_target,
    final_text,
    is_percent,
    number,
    shown,
    size,
    spaced,
)
from jwins.report.seed_groups import target_outcomes
from jwins.report.studies import Study

_MAX_EVALUATIONS = 60
"""Maximum number of evaluations in the table of curves; of more, evenly spaced ones are shown."""


def evaluations_table(study: Study) -> Table:
    """Return the table of the curves' numbers: the metric at each evaluation, mean over seeds."""
    series = means(study.groups, YAxis.of_metric(study.target))
    rounds = sorted({number for points in series for number in points})
    step = -(-len(rounds) // _MAX_EVALUATIONS) or 1
    chosen = sorted({*rounds[::step], *rounds[-1:]})
    rows = [
        [str(at), *(final_text(points.get(at, math.nan), percent=study.percent) for points in series)]
        for at in chosen
    ]
    some = f"; {len(chosen)} of {len(rounds)} evaluations" if len(chosen) < len(rounds) else ""
    title = f"{capital(spaced(study.target.metric))} at each evaluation, mean over seeds{some}"
    return Table("evaluations", title, ["round", *(group.name for group in study.groups)], rows)


def savings_notes(study: Study) -> str:
    """Return the notes for readers of the main table."""
    table, over = study.table(), study.final_over
    last = "a run’s last evaluation" if over == 1 else f"the mean of a run’s last {over} evaluations"
    sentences = [
        f"Final: {last}; mean ± standard deviation over seeds.",
        "Raw: full sharing at 4 bytes per parameter and recipient, in as many rounds.",
    ]
    if any(line.counted < line.seeds for line in table):
        sentences.append("Runs that diverged or stalled have no final value, and their bytes are not counted.")
    by_name = {line.variant: line for line in table}
    paired = [line for line in table if line.difference is not None]
    if paired:
        alike = all(of_all_seeds(line, by_name[line.reference or ""]) for line in paired)
        sentences.append(
            "Difference: of the final values as shown, paired by seed, with a 95 % interval (Student’s t)."
            if alike
            else "Difference: paired by seed, with a 95 % interval (Student’s t); in brackets the number of "
            "seeds, where a final value is over others."
        )
    if study.has_target:
        sentences.append(describe_target(study.target))
    elif all(line.variant != study.full for line in table):
        sentences.append("There is no run with full sharing, so nothing is stated against it.")
    elif len(table) < 2:
        sentences.append("There is nothing to compare full sharing with.")
    return " ".join(sentences)


def further_tables(study: Study) -> list[tuple[Table, bool]]:
    """Return the comparison's other tables, computed from the runs if possible.

    Returns:
        Each table, and whether it is open initially.
    """
    tables = []
    if len(study.targets) > 1 or study.baselines:
        targets = study.targets or (study.target,)
        found = []
        for group in study.groups:
            found += target_outcomes(group, targets, study.group(study.baselines.get(group.name)))
        tables.append((target_table(found, study.target), True))
    known = [m for m in study.also if all(m in r.evaluations[-1].metrics for r in study.records)]
    if known:
        pairs = [(group, study.reference(group)) for group in study.groups]
        tables.append((metrics_table(pairs, known, study.final_over), False))
    for title, recorded in study.recorded.items():
        keys = list(dict.fromkeys(key for row in recorded for key in row))
        rows = [[shown(row.get(key)) for key in keys] for row in recorded]
        head = [spaced(key) for key in keys]
        tables.append((Table("recorded", f"{title}, as the comparison recorded it", head, rows), False))
    return tables


def bytes_table(study: Study) -> Table:
    """Return the table of bytes per node, by kind."""
    sent = kinds_sent(study.groups)
    rows: list[list[str]] = []
    for group in study.groups:
        by_kind = bytes_by_kind(group)
        total = sum(by_kind.values())
        shares = [f" ({by_kind[kind] / total * 100:.1f} %)" if total else "" for kind in sent]
        cells = [size(by_kind[kind]) + share for kind, share in zip(sent, shares, strict=True)]
        rows.append([group.name, *cells, size(total)])
    meaning = {
        "header": "header: frame headers, lengths and checksums",
        "keyframe": "keyframes: whole frames that bring a neighbour’s replica up to date",
        "control": "control: messages without parameters",
    }
    explained = ["Values and positions as encoded", *(text for kind, text in meaning.items() if kind in sent)]
    notes = [f"{'; '.join(explained)}."]
    none = [kind for kind in KIND_COLOURS if kind not in sent]
    notes += [f"No variant sent bytes of {' or '.join(none)}."] if none else []
    head = ["variant", *sent, "total"]
    return Table("bytes", "Bytes per node by content, mean over seeds", head, rows, notes=notes)


def spread_table(study: Study, metric: str) -> Table:
    """Return the table of a metric over the nodes at the end, mean over seeds."""
    percent = is_percent(metric)
    worst = metric.removeprefix("own_") == study.target.metric.removeprefix("own_")  # whose direction is known

    def mean_text(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return number(statistics.fmean(known), percent=percent) if known else NEVER

    rows = []
    for group in study.groups:
        last = [record.evaluations[-1].metrics for record in group.records]
        spreads = [metrics[metric] for metrics in last if metric in metrics]
        fields = ("mean", "sd", "min", "max", "average_model")
        cells = [mean_text(getattr(spread, field) for spread in spreads) for field in fields]
        if worst:
            lower = study.target.lower_is_better
            cells.insert(
                2, mean_text(record.worst_nodes(metric, lower_is_better=lower) for record in group.records)
            )
        rows.append([group.name, *cells])
    head = ["variant", "mean", "sd over nodes", "lowest node", "highest node", "average model"]
    if worst:
        head.insert(3, "worst 10 %")
    return Table("spread", f"{capital(spaced(metric))} over the nodes, at the end", head, rows)
