"""Studies, made from run folders and comparison folders.

Everything is read from the folders; nothing is run, and no data are loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jwins.errors import ConfigError, DataError, JwinsError, UsageError
from jwins.experiment.catalogue import OTHER_DIRECTIONS, USUAL_DIRECTIONS
from jwins.experiment.experiment import Experiment
from jwins.experiment.toml import flat, read_toml
from jwins.report.formatting import and_list, is_percent, shown
from jwins.report.seed_groups import Group, Target
from jwins.report.settings import compared_settings, differing_keys
from jwins.report.summary_rows import SummaryRow, summary_row
from jwins.run.builders import mean_local_steps, raw_bytes_per_node
from jwins.run.folder import variant_folder
from jwins.run_folder.archive import NAME as ARCHIVE
from jwins.run_folder.archive import find, is_dir, is_file, open_file, read_text
from jwins.run_folder.archive import folders as subfolders
from jwins.run_folder.record import Record, samples_note, start_and_end


@dataclass(frozen=True)
class StudyVariant:
    """The runs of one experiment over its seeds."""

    group: Group
    tables: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """Variants that are shown together: a comparison, or single runs with the same task and number of nodes.

    Attributes:
        target: target for bytes, rounds and seconds; its value is NaN without one.
        full: name of the variant with full sharing that savings refer to, None without one.
        final_over: number of last evaluations whose mean is the final value.
        targets: all targets of the comparison, if it has several.
        references: variants that final values are compared to; others are compared to ``full``.
        baselines: variants that ratios to the targets refer to.
        recorded: tables of the comparison's summary about the choice of settings, by title.
    """

    name: str
    variants: tuple[StudyVariant, ...]
    target: Target
    full: str | None
    final_over: int = 1
    notes: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()
    references: Mapping[str, str] = field(default_factory=dict)
    baselines: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    tuned: Mapping[str, str] = field(default_factory=dict)
    recorded: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        """Return the variants' runs."""
        return [variant.group for variant in self.variants]

    @property
    def records(self) -> list[Record]:
        """Return all runs."""
        return [record for group in self.groups for record in group.records]

    @property
    def clock(self) -> str:
        """Return the kind of seconds of its runs: ``virtual`` or ``real``; "" for both."""
        found = {record.clock for record in self.records}
        return found.pop() if len(found) == 1 else ""

    @property
    def percent(self) -> bool:
        """Return whether the metric is shown in percent."""
        return is_percent(self.target.metric)

    @property
    def has_target(self) -> bool:
        """Return whether the study has a target."""
        return math.isfinite(self.target.value)

    def group(self, name: str | None) -> Group | None:
        """Return the runs of a variant, None without one."""
        return next((group for group in self.groups if group.name == name), None)

    def reference(self, group: Group) -> Group | None:
        """Return the baseline of a variant's final value."""
        return self.group(self.references.get(group.name, self.full))

    def table(self) -> list[SummaryRow]:
        """Return one line per variant."""
        full = self.group(self.full)
        return [
            summary_row(
                group,
                self.target,
                full=full,
                reference=self.reference(group),
                final_over=self.final_over,
                tuned=self.tuned.get(group.name, ""),
            )
            for group in self.groups
        ]


_RUNS = "*/seed-*/metrics.jsonl"
"""Pattern of the runs in a comparison's folder."""


class _NothingMeasuredError(DataError):
    """A run without measurements yet."""


@dataclass
class _Found:
    """A run folder for the report."""

    record: Record
    tables: dict[str, Any]
    name: str


def gather(folders: Sequence[Path], *, metric: str | None = None) -> list[Study]:
    """Find the runs in folders, and group them into studies.

    Args:
        folders: run folders, comparison folders, and folders of either, in any mixture. A comparison is one
            study; single runs of the same task and number of nodes are one.
        metric: metric to show in place of the comparison's or the task's first; a suffix ``:lower`` or
            ``:higher`` gives the better direction where the task does not.

    Raises:
        DataError: no measured run in a folder, or a damaged one.
        UsageError: no folder, or a metric that no run has.
        ConfigError: no task declares the better direction of the metric.
    """
    if not folders:
        raise UsageError("no folder given: expected run folders or comparison folders")
    studies: list[Study] = []
    single: list[_Found] = []
    seen: set[Path] = set()
    for folder in folders:
        for place in _places(folder):
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            if is_file(place / "metrics.jsonl"):
                single.append(_read(place))
            else:
                studies += _comparison(place, metric)
    reported = {record.folder.resolve() for study in studies for record in study.records}
    single = [found for found in single if found.record.folder.resolve() not in reported]
    together: dict[str, list[_Found]] = {}
    for found in single:
        task = {key: value for key, value in found.tables.get("task", {}).items() if key != "data"}
        key = json.dumps([task, found.tables.get("nodes")], sort_keys=True, default=str)
        together.setdefault(key, []).append(found)
    studies += [_single_runs(runs, metric) for runs in together.values()]
    return studies


def _places(folder: Path) -> list[Path]:
    """Return the runs and comparisons that a folder is or contains."""
    if not is_dir(folder):
        raise DataError(f"{folder}: there is no such folder")

    def is_one(place: Path) -> bool:
        return is_file(place / "metrics.jsonl") or bool(find(place, _RUNS))

    if is_one(folder):
        return [folder]
    if (folder / ARCHIVE).is_file():  # a record
        return _places(folder / ARCHIVE)
    found = [entry for entry in subfolders(folder) if is_one(entry)]
    if not found:
        raise DataError(
            f"{folder}: neither a run (metrics.jsonl) nor a comparison (<variant>/seed-<n>/metrics.jsonl), nor "
            "a folder of these"
        )
    return found


def _read(folder: Path) -> _Found:
    with open_file(folder / "metrics.jsonl") as log:
        begun = bool(log.read(1))
    record = Record.read(folder) if begun else None
    if record is None or not record.evaluations:
        raise _NothingMeasuredError(f"{folder}: nothing has been measured yet; wait for the first evaluation")
    config = folder / "config.toml"
    if not is_file(config):
        raise DataError(f"{folder}: the run's config.toml is missing")
    tables = read_toml(read_text(config), str(config))
    return _Found(record, tables, str(tables.get("name", record.start.name)))


def _comparison(folder: Path, metric: str | None) -> list[Study]:
    """Return a comparison's studies: several if its groups have their own full sharing and targets."""
    summary = _summary(folder)
    rows: dict[str, dict[str, Any]] = {row["variant"]: row for row in summary.get("table", [])}
    by_slug = {variant_folder(name): name for name in rows}
    found: list[_Found] = []
    not_begun = 0
    left_out: list[str] = []
    for path in sorted(find(folder, _RUNS), key=_by_seed):
        slug = path.parent.parent.name
        try:
            run = _read(path.parent)
        except _NothingMeasuredError:
            not_begun += 1
            continue
        if not rows:
            run.name = run.name.partition(": ")[2] or slug
        elif slug in by_slug and run.record.start.seed in summary["seeds"]:
            run.name = by_slug[slug]
        else:
            left_out.append(f"{slug}/{path.parent.name}")
            continue
        found.append(run)
    if not found:
        raise DataError(f"{folder}: nothing has been measured yet; wait for the first evaluation")
    notes = list(summary.get("notes", []))
    if left_out:
        notes.append(f"Left out, as the comparison's tables were made without them: {', '.join(left_out)}.")
    if not_begun:
        notes.append(f"{not_begun} run{'s have' if not_begun > 1 else ' has'} measured nothing yet.")
    variants = _variants(found)
    if not rows:
        notes.append("This comparison has not finished: it has no summary yet, and this page chose the target.")
        name = found[0].record.start.name.partition(": ")[0] or folder.name
        return [_study(name, variants, metric, notes=notes)]
    order = list(rows)
    variants.sort(key=lambda v: order.index(v.group.name) if v.group.name in rows else len(order))
    label_of = {v.group.name: rows.get(v.group.name, {}).get("group") for v in variants}
    labels = list(dict.fromkeys(label_of.values()))
    if len({label_of[v.group.name] for v in variants if v.group.algorithm == "full"}) < 2:
        labels, label_of = [None], dict.fromkeys(label_of)  # one full sharing for all
    studies = []
    for label in labels:
        own = [v for v in variants if label_of[v.group.name] == label]
        name = summary["name"] if len(labels) == 1 else f"{summary['name']}: {label or 'others'}"
        first = label == labels[0]
        studies.append(_compared_study(name, own, variants, rows, summary, metric, notes if first else []))
    return studies


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not is_file(path) and folder.name == "runs":  # as in a record, where tables are beside the runs
        path = folder.parent / "summary.json"
    if not is_file(path):
        return {}
    try:
        summary = json.loads(read_text(path))
        for row in summary["table"]:
            row["variant"] + ""
        for key in ("name", "seeds", "full_sharing", "final_over"):
            summary[key]
        _target(summary["target"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the summary of a comparison ({error!r})") from None
    return dict(summary)


def _target(table: Mapping[str, Any]) -> Target:
    value = math.nan if table["value"] is None else float(table["value"])
    return Target(table["metric"], value, bool(table["lower_is_better"]), str(table["meaning"]))


def _compared_study(
    name: str,
    own: list[StudyVariant],
    everyone: Sequence[StudyVariant],
    rows: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    metric: str | None,
    notes: Sequence[str],
) -> Study:
    """Return the study of one group of a comparison's variants."""
    target = _target(summary["target"])
    named = {variant.group.name: variant for variant in everyone}
    here = [variant.group.name for variant in own]
    references = {n: str(rows[n]["reference"]) for n in here if rows.get(n, {}).get("reference")}
    full = next((v.group.name for v in own if v.group.algorithm == "full"), summary["full_sharing"])
    if summary["full_sharing"] in here:
        full = summary["full_sharing"]
    for needed in dict.fromkeys([full, *references.values()]):  # of another group
        if needed in named and needed not in here:
            own = [named[needed], *own]
            here = [needed, *here]
    asked = [row for row in summary.get("targets", []) if row.get("variant") in here]

    def with_value(row: Mapping[str, Any]) -> Target:
        return replace(target, value=float(row["target"]), meaning=str(row["meaning"]))

    targets = list(dict.fromkeys(with_value(row) for row in asked if row.get("target") is not None))
    over = int(summary["final_over"])
    tuned = {n: str(rows[n]["tuned"]) for n in here if rows.get(n, {}).get("tuned")}
    if metric is not None and _stated(metric)[0] != target.metric:
        other = _study(name, own, metric, notes=notes, full=full, over=over)
        return replace(other, references=references, tuned=tuned)
    if not targets and here:  # each group has its own
        row = next((rows[n] for n in here if rows.get(n, {}).get("target") is not None), None)
        if row is not None:
            target = with_value(row)
    recorded = {
        title: [row for row in summary.get(key, []) if row.get("variant") in here]
        for key, title in (("tuning", "Tuning: tried values"), ("sensitivity", "Sensitivity"))
    }
    return Study(
        name,
        tuple(own),
        targets[0] if targets else target,
        full if full in here else None,
        over,
        tuple(notes),
        targets=tuple(targets),
        references=references,
        baselines={row["variant"]: row["baseline"] for row in asked if row.get("baseline") in here},
        also=tuple(dict.fromkeys(row["metric"] for row in summary.get("metrics", []))),
        tuned=tuned,
        recorded={title: table for title, table in recorded.items() if table},
    )


def _by_seed(path: Path) -> tuple[str, int, str]:
    number_ = path.parent.name.removeprefix("seed-")
    return path.parent.parent.name, int(number_) if re.fullmatch(r"-?\d+", number_) else 0, number_


def _single_runs(found: Sequence[_Found], metric: str | None) -> Study:
    names = list(dict.fromkeys(run.name for run in found))
    title = (
        names[0]
        if len(names) == 1
        else f"{found[0].tables.get('task', {}).get('name', 'runs')}: "
        + and_list(names[:4] + ([f"{len(names) - 4} more"] if len(names) > 4 else []))
    )
    notes = []
    unique: dict[tuple[Any, ...], _Found] = {}
    for run in found:
        how = (run.tables.get("train", {}).get("batching"), run.tables.get("run", {}).get("device"))
        start = run.record.start
        unique.setdefault((start.digest, start.seed, start.clock, *how), run)
    if len(unique) < len(found):
        notes.append(
            f"{len(found) - len(unique)} runs are left out: they repeat the experiment and seed of another."
        )
    return _study(title, _variants(list(unique.values())), metric, notes=notes)


def _variants(found: Sequence[_Found]) -> list[StudyVariant]:
    """Group runs that differ only in their seed into variants, and give variants different names."""
    by_config: dict[str, list[_Found]] = {}
    for run in found:
        what = [run.name, run.record.start.clock, compared_settings(run.tables)]
        by_config.setdefault(json.dumps(what, sort_keys=True), []).append(run)
    names = [runs[0].name for runs in by_config.values()]
    variants: list[StudyVariant] = []
    for index, runs in enumerate(by_config.values()):
        name = runs[0].name
        if names.count(name) > 1:
            namesakes = [others[0] for others in by_config.values() if others[0].name == name]
            name = f"{name} ({_distinction(namesakes, runs[0])})"
        if name in names[:index] or any(name == variant.group.name for variant in variants):
            name = f"{name} [{runs[0].record.folder.name}]"
        records = tuple(sorted((run.record for run in runs), key=lambda record: record.start.seed))
        raw = tuple(_raw_bytes(record, runs[0].tables) for record in records)
        steps = mean_local_steps(runs[0].tables)
        sharing = runs[0].tables.get("sharing")
        algorithm = str(sharing.get("kind", "own")) if isinstance(sharing, Mapping) else "own"
        variants.append(StudyVariant(Group(name, algorithm, records, raw, steps), runs[0].tables))
    return variants


def _distinction(namesakes: Sequence[_Found], run: _Found) -> str:
    """Return the settings by which experiments of the same name differ, and the clock if it differs."""
    differing = differing_keys([compared_settings(other.tables) for other in namesakes])
    mine = flat(compared_settings(run.tables))
    texts = [f"{key.rpartition('.')[2]} {shown(mine.get(key))}" for key in differing][:3]
    if len({other.record.start.clock for other in namesakes}) > 1:
        texts.append(f"{run.record.start.clock} clock")
    return ", ".join(texts) or run.record.folder.name


def _study(
    name: str,
    variants: Sequence[StudyVariant],
    metric: str | None,
    *,
    notes: Sequence[str],
    full: str | None = None,
    over: int = 1,
) -> Study:
    """Return a study of single runs, with a target and a baseline that this function chooses."""
    available = variants[0].group.records[0].evaluations[0].metrics
    wanted, direction = _stated(metric)
    if wanted is not None and wanted not in available:
        raise UsageError(f"--metric {wanted}: these runs have {', '.join(available)}")
    usual = [name for name in ("squared_error", "accuracy") if name in available]
    declared = [name for name in [*usual, *available] if all(_direction(name, v) for v in variants)]
    chosen = wanted or next(iter([*declared, *available]))
    lower = _lower_is_better(chosen, direction, variants)
    groups = [v.group for v in variants if v.group.algorithm == "full"]
    whole = next((group for group in groups if group.name == full), groups[0] if groups else None)
    target = Target(chosen, math.nan, lower)
    if whole is not None and len(variants) > 1 and all(len(r.evaluations) > 1 for r in whole.records):
        begin, end = start_and_end(whole.records, chosen, over)
        if math.isfinite(begin + end) and (end < begin if lower else end > begin):
            meaning = f"95 % of the way of {whole.name} from start to end"
            target = Target(chosen, begin + 0.95 * (end - begin), lower, meaning)
    note = samples_note([record for v in variants for record in v.group.records])
    texts = notes if note is None or note in notes else [*notes, note]
    return Study(name, tuple(variants), target, None if whole is None else whole.name, over, tuple(texts))


def _stated(metric: str | None) -> tuple[str | None, str | None]:
    """Return a metric's name, and the direction that a user may append.

    >>> _stated("f1:higher"), _stated("loss"), _stated(None)
    (('f1', 'higher'), ('loss', None), (None, None))
    """
    name, _, direction = (metric or "").rpartition(":")
    return (name, direction) if name and direction in ("lower", "higher") else (metric, None)


def _lower_is_better(metric: str, stated: str | None, variants: Sequence[StudyVariant]) -> bool:
    """Return whether smaller values are better, by the task's declaration, or else by the user's."""
    found = {direction for variant in variants if (direction := _direction(metric, variant)) is not None}
    if stated is not None:
        found.add(stated)
    if not found:
        problem = f"the task declares no direction; write --metric {metric}:lower (or :higher)"
        raise ConfigError("--metric", metric, problem)
    if len(found) > 1:
        problem = "is to be higher by one declaration and lower by another"
        remedy = f"leave out :{stated}" if stated is not None else "report these runs separately"
        raise ConfigError("--metric", metric, f"{problem}; {remedy}")
    return found == {"lower"}


def _direction(metric: str, variant: StudyVariant) -> str | None:
    """Return the better direction, by the task of that name or by the run's record of a user's task."""
    task = variant.tables.get("task")
    others = OTHER_DIRECTIONS.get(str(task.get("name")), {}) if isinstance(task, Mapping) else {}
    declared = {**USUAL_DIRECTIONS, **others, **variant.group.records[0].start.better}
    return declared.get(metric, declared.get(metric.removeprefix("own_")))


def _raw_bytes(record: Record, tables: Mapping[str, Any]) -> float:
    try:
        return raw_bytes_per_node(_network(record, tables), record.start.dim, record.rounds)
    except (JwinsError, OSError, KeyError, TypeError):  # a topology object, or a missing file
        return 4.0 * record.start.dim * record.start.neighbours_mean * record.rounds


def _network(record: Record, tables: Mapping[str, Any]) -> Experiment:
    """Return an experiment with the run's nodes and topology, for any task."""
    topology = dict(tables["topology"])
    if "path" in topology:
        topology["path"] = str(record.folder / topology["path"])
    settings: dict[str, Any] = {
        "nodes": tables["nodes"],
        "topology": topology,
        "run": {"seed": record.start.seed},
    }
    return Experiment(**settings)
