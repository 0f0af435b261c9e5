"""Results of a comparison: tables and figures of the existing runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jwins.compare.comparability import TaskChangeCheck, check_comparable, version_note
from jwins.compare.comparison import Cell, Comparison, Variant
from jwins.compare.plan import Plan, Trial, ended, plan, target_of
from jwins.compare.setting_paths import setting_text, setting_texts
from jwins.errors import DataError, ResumeError
from jwins.experiment.toml import write_toml
from jwins.report.chart import save, save_figure
from jwins.report.colours import styles_of
from jwins.report.comparison_table import Table, metrics_table, save_tables, target_table
from jwins.report.curve_charts import figure
from jwins.report.formatting import is_percent, size, spread_text
from jwins.report.pareto_chart import pareto_chart
from jwins.report.seed_groups import Group, Target, deviation, target_outcomes
from jwins.report.summary_rows import SummaryRow, summary_row
from jwins.run.builders import mean_local_steps, raw_bytes_per_node
from jwins.run.folder import folder_state
from jwins.run_folder.archive import beside
from jwins.run_folder.record import Record, flat_rows, samples_note


@dataclass(frozen=True)
class ComparisonResult:
    """A comparison's outcome.

    Attributes:
        comparison: the comparison.
        folder: folder with ``table.md``, ``.tex`` and ``.csv``, ``summary.json``, ``comparison.png`` and
            ``.pdf``: the comparison's, or that of its archive.
        table: one line per variant.
        target: target for bytes, rounds and seconds.
        groups: the runs of each variant, as :class:`~jwins.report.seed_groups.Group`.
        status: ``finished``, ``partial`` if runs are missing, or ``interrupted`` with an empty table.
        further: tables beside the main one: several targets, further metrics, tuning, sensitivity.
        notes: notes for readers of the table.
    """

    comparison: Comparison
    folder: Path
    table: list[SummaryRow]
    target: Target | None
    groups: list[Group]
    status: str
    further: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict per evaluation of each run, with its ``variant``, for ``pandas.DataFrame``."""
        runs = [(group.name, record) for group in self.groups for record in group.records]
        return [{"variant": name} | row for name, record in runs for row in flat_rows(record)]


def summarize(comparison: Comparison, *, partial: bool = False, only: Collection[str] = ()) -> ComparisonResult:
    """Make tables and figures of a comparison from the disk, without running anything.

    Args:
        comparison: the comparison.
        partial: whether runs may be missing; the tables then have only ended runs.
        only: names of variants whose runs must be there; others may be missing.

    Raises:
        DataError: a cell has not been run.
        ConfigError: variants are not comparable.
        ResumeError: no run has ended, and a folder holds another experiment.
    """
    found = plan(comparison, unconfirmed=partial)
    cells = [cell for cell in comparison.cells(found.chosen) if cell.variant.name in found.chosen]
    records: dict[tuple[str, int], Record] = {}
    others: dict[str, tuple[Cell, ResumeError]] = {}
    for cell in cells:
        record = ended(cell)
        if record is None and not partial and not only:
            Record.read(cell.folder)  # reports the missing file
            raise DataError(f"{cell.folder}: this run has not ended; continue with `jwins compare`")
        if record is not None:
            records[cell.variant.name, cell.seed] = record
            continue
        try:
            folder_state(cell.experiment, cell.folder)
        except ResumeError as error:
            others.setdefault(cell.variant.name, (cell, error))
    if others and not records:  # tables without a run would replace those of the other experiment
        raise next(other for _, other in others.values())
    undecided = [v.name for v in comparison.variants if v.name not in found.chosen]
    if undecided and not partial and not only:
        raise DataError(f"{comparison.folder}: tuning of {undecided[0]!r} has not ended; run `jwins compare`")
    check_comparable(comparison, records)
    unchanged = TaskChangeCheck()  # between a variant's runs, including tuning
    for cell in found.cells:
        record = ended(cell)
        if record is not None:
            unchanged.check(cell, record.start)
    groups = _groups(comparison, cells, records)
    missing = {
        variant.name: [seed for seed in comparison.compare.seeds if (variant.name, seed) not in records]
        for variant in comparison.variants
    }
    notes = [_missing_note(missing, len(comparison.compare.seeds))] if any(missing.values()) else []
    for name, (cell, other) in others.items():
        why = str(other).removeprefix(f"{cell.folder}: ").partition("; ")[0]  # without folder and remedies
        notes.append(f"{name}: {cell.folder.name} {why}.")
    return _written(comparison, found, groups, sum(map(len, missing.values())), notes)


def _groups(
    comparison: Comparison, cells: Sequence[Cell], records: Mapping[tuple[str, int], Record]
) -> list[Group]:
    groups = []
    for variant in comparison.variants:
        own = [cell for cell in cells if cell.variant is variant and (variant.name, cell.seed) in records]
        of = tuple(records[variant.name, cell.seed] for cell in own)
        raw = tuple(
            raw_bytes_per_node(cell.experiment, record.start.dim, record.rounds)
            for cell, record in zip(own, of, strict=True)
        )
        if of:
            steps = mean_local_steps(variant.experiment.model_dump(include={"train", "nodes", "run"}))
            groups.append(
                Group(variant.name, getattr(variant.experiment.sharing, "kind", "own"), of, raw, steps)
            )
    return groups


def _missing_note(missing: Mapping[str, Sequence[int]], seeds: int) -> str:
    count = sum(map(len, missing.values()))
    without = []
    for name, own in missing.items():
        some = f", seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}" if len(own) < seeds else ""
        without += [f"{name}{some}"] if own else []
    have = "runs have" if count != 1 else "run has"
    return f"{count} {have} not ended, or not begun; the tables are without: {'; '.join(without)}."


def _written(
    comparison: Comparison, found: Plan, groups: list[Group], missing: int, notes: list[str]
) -> ComparisonResult:
    settings, folder = comparison.settings, beside(comparison.folder)
    by_name = {group.name: group for group in groups}

    def of(variant: Variant | None) -> Group | None:
        return None if variant is None else by_name.get(variant.name)

    table, reached, with_reference, targets = [], [], [], []
    for group in groups:
        variant = comparison.variant(group.name)
        full, reference = of(comparison.full_of(variant)), of(comparison.reference_of(variant))
        own_targets = _targets(comparison, full)
        targets.append(own_targets[0])
        table.append(
            summary_row(
                group,
                own_targets[0],
                full=full,
                reference=reference,
                final_over=settings.final_over,
                label=variant.group,
                tuned=", ".join(setting_texts(_own_settings(comparison, found, variant))),
            )
        )
        reached += target_outcomes(group, own_targets, of(comparison.baseline_of(variant)), variant.group)
        with_reference.append((group, reference))
    target = targets[0] if targets else _targets(comparison, None)[0]
    further = []
    if groups and (settings.targets or settings.baselines):
        further.append(target_table(reached, target))
    if groups and settings.also:
        further.append(metrics_table(with_reference, settings.also, settings.final_over))
    further += _tuning_tables(comparison, found)
    notes += _notes(comparison, found, by_name)
    first = groups[0].records[0].start if groups else None
    about = {
        "name": comparison.name,
        "seeds": list(settings.seeds),
        "full_sharing": comparison.full.name if comparison.full is not None else None,
        "final_over": settings.final_over,
        "missing_runs": missing,
        "chosen": found.chosen,
        "versions": first.versions if first is not None else {},
        "machine": first.machine if first is not None else {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tables(folder, table, target, about, further, notes)
    if groups:
        alike = all(other.value == target.value for other in targets)
        shown = target if alike else replace(target, value=math.nan)
        notes += _draw_figures(comparison, groups, shown, folder)
    _save_configs(comparison, found)
    status = "partial" if missing else "finished"
    return ComparisonResult(
        comparison, folder, table, target if groups else None, groups, status, further, notes
    )


def _draw_figures(comparison: Comparison, groups: list[Group], target: Target, folder: Path) -> list[str]:
    """Draw the figures; return a note if one could not be drawn, because tables do not depend on it."""
    metric, title = comparison.settings.metric, _title(comparison, groups)
    try:
        save_figure(figure(groups, target, metric=metric, title=title), folder / "comparison.png")
        _save_pareto(comparison, groups, folder)
    except Exception as error:
        return [f"A figure could not be drawn: {type(error).__name__}: {error}"]
    return []


def _save_pareto(comparison: Comparison, groups: Sequence[Group], folder: Path) -> None:
    """Write ``pareto.png`` and ``.pdf``, with a figure for each group of variants with its own task."""
    settings = comparison.settings
    labels = {group.name: comparison.variant(group.name).group for group in groups}
    for index, label in enumerate(dict.fromkeys(labels.values()), start=1):
        own = [group for group in groups if labels[group.name] == label]
        full = comparison.full_of(comparison.variant(own[0].name))
        chart = pareto_chart(
            own,
            styles_of([group.algorithm for group in own]),
            Target(settings.metric, math.nan, bool(settings.lower_is_better)),
            full=None if full is None else full.name,
            over=settings.final_over,
            slug="pareto" if len(set(labels.values())) == 1 else f"pareto-{index}",
        )
        if chart is not None:
            save(chart, folder / chart.slug)


def _own_settings(comparison: Comparison, found: Plan, variant: Variant) -> dict[str, Any]:
    """Return the settings that were chosen for this variant and not for all."""
    chosen = found.chosen.get(variant.name, {})
    shared = comparison.rule.shared
    return {key: value for key, value in chosen.items() if shared is None or key not in shared.keys}


def _notes(comparison: Comparison, found: Plan, groups: Mapping[str, Group]) -> Iterator[str]:
    rule, on = comparison.rule, comparison.tuned_on
    if rule.shared is not None and on is not None and on.name in found.chosen:
        chosen = [f"{key} = {setting_text(found.chosen[on.name][key])}" for key in rule.shared.keys]
        tried = len(comparison.points(rule.shared))
        how = f", the best of {tried} on {on.name}" if tried > 1 else ""
        yield f"All variants: {', '.join(chosen)}{how}."
    for trial in found.trials:
        if trial.edge:
            yield (
                f"{trial.variant}: the best {trial.key}, {setting_text(trial.value)}, is at the edge of what "
                f"was tried; a wider grid may have a better one."
            )
    for variant in comparison.variants:
        mine, other = groups.get(variant.name), groups.get(variant.bytes_as or "")
        if mine is not None and other is not None:
            ratio = _bytes(mine) / _bytes(other) if _bytes(other) else math.nan
            yield f"{variant.name} sends {ratio:.3f} times the bytes of {variant.bytes_as}."
    yield from _after_consensus(comparison, groups)
    records = [record for group in groups.values() for record in group.records]
    for note in (version_note(record.start for record in records), samples_note(records)):
        if note is not None:
            yield note


def _after_consensus(comparison: Comparison, groups: Mapping[str, Group]) -> Iterator[str]:
    metric = comparison.compare.metric
    percent = is_percent(metric)
    for name, group in groups.items():
        ended = [record for record in group.counted.records if record.consensus]
        after = [value for record in ended if (value := record.after_consensus(metric)) is not None]
        if after:
            count = ended[0].consensus[-1].consensus_rounds
            text = spread_text(statistics.fmean(after), deviation(after), percent=percent)
            rounds = "round" if count == 1 else "rounds"
            yield f"{name}: {metric} {text} after {count} further {rounds} of sharing without training."


def _bytes(group: Group) -> float:
    return statistics.fmean(record.bytes_per_node()[-1] for record in group.records)


def _tuning_tables(comparison: Comparison, found: Plan) -> list[Table]:
    settings, rule = comparison.compare, comparison.rule
    percent = is_percent(settings.metric)
    tables = []
    if found.trials:
        rows = [
            [
                row.variant,
                f"{row.key} = {setting_text(row.value)}" if len(row.point) < 2 else str(row.value),
                spread_text(row.final, None, percent=percent),
                "—" if row.bytes_to_target is None else size(row.bytes_to_target),
                "—" if row.seconds_to_target is None else f"{row.seconds_to_target:.1f}",
                row.status,
                _verdict(row, percent),
            ]
            for row in found.trials
        ]
        head = ["variant", "tried", f"final {settings.metric}", "bytes to target", "seconds", "status", ""]
        if rule.by == "final" and not any(row.reached for row in found.trials):  # no target
            head, rows = head[:3] + head[5:], [row[:3] + row[5:] for row in rows]
        by = {"final": f"final {settings.metric}", "bytes": "bytes to the first target"}
        how = by.get(rule.by, "seconds to the first target")
        seeds = ", ".join(map(str, rule.seeds))
        length = f", {rule.rounds} rounds" if rule.rounds is not None else ""
        note = f"Chosen by {how}; seed{'s' if len(rule.seeds) > 1 else ''} {seeds}{length}."
        if rule.shared is not None and rule.by != "final":
            note += f" {' and '.join(rule.shared.keys)} is chosen by final {settings.metric}."
        data = [asdict(row) | {"value": _plain(row.value)} for row in found.trials]
        for entry in data:
            del entry["point"]
        tables.append(Table("tuning", "Tuning", head, rows, data, [note]))
    lines, data = [], []
    for cell in found.sensitivity:
        record = ended(cell)
        if record is None or rule.key is None:
            continue
        value = cell.settings[rule.key]
        final = record.final(settings.metric, settings.final_over)
        lines.append(
            [cell.variant.name, setting_text(value), spread_text(final, None, percent=percent), record.status]
        )
        data.append(
            {
                "variant": cell.variant.name,
                "key": rule.key,
                "value": _plain(value),
                "seed": cell.seed,
                "final": final,
                "bytes_per_node": record.bytes_per_node()[-1],
                "status": record.status,
            }
        )
    if lines:
        head = ["variant", str(rule.key), f"final {settings.metric}", "status"]
        note = f"Seed {rule.seeds[0]}; other settings as chosen."
        tables.append(Table("sensitivity", f"Sensitivity to {rule.key}", head, lines, data, [note]))
    return tables


def _verdict(row: Trial, percent: bool) -> str:
    """Return whether a value was chosen, with the result of its full-length runs if there are any."""
    words = ["chosen"] if row.chosen else []
    if row.edge:
        words.append("at the edge")
    if row.to_end is not None:
        words.append(f"to the end: {spread_text(row.to_end, None, percent=percent)}, {row.to_end_status}")
    return ", ".join(words)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else setting_text(value)


def _title(comparison: Comparison, groups: Sequence[Group]) -> str:
    seeds = len(comparison.compare.seeds)
    counts = sorted({group.records[0].start.num_nodes for group in groups})
    nodes = ", ".join(map(str, counts))
    return f"{comparison.name} · {nodes} nodes · {seeds} seed{'s' if seeds != 1 else ''}"


def _save_configs(comparison: Comparison, found: Plan) -> None:
    """Write ``<variant>/experiment.toml``: each variant's experiment, without the seed."""
    for variant in comparison.variants:
        folder = comparison.folder / variant.slug
        if variant.name not in found.chosen or not folder.is_dir():
            continue
        chosen = variant.experiment.changed(found.chosen[variant.name])
        experiment = chosen.changed({"name": comparison.run_name(variant)})  # whose default folder is not ours
        tables = experiment.resolved(folder)
        del tables["run"]["seed"], tables["run"]["folder"]
        (folder / "experiment.toml").write_text(write_toml(tables), encoding="utf-8")


def _targets(comparison: Comparison, full: Group | None) -> list[Target]:
    settings = comparison.settings
    return [
        target_of(settings, wanted, full.name if full else "full sharing", full.records if full else ())
        for wanted in settings.all_targets
    ]
