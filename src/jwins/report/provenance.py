"""Provenance of the runs of a study: settings, comparability, and the record of each."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jwins.experiment.toml import flat, write_toml
from jwins.report.comparison_table import Table, TableCell
from jwins.report.formatting import NEVER, and_list, shown, spaced
from jwins.report.settings import compared_settings, described, differing_keys, without_folders
from jwins.report.studies import Study, StudyVariant
from jwins.run_folder.record import ended_well


def common_settings(study: Study) -> list[tuple[str, str]]:
    """Return the settings that all variants share, for the head of a study: (name, value) each."""

    def common(path: str, describe: Callable[[Any], str] = described) -> str:
        found = []
        for variant in study.variants:
            value: Any = without_folders(variant.tables)
            for key in path.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            found.append(describe(value))
        return " / ".join(dict.fromkeys(found))

    seeds = list(dict.fromkeys(record.start.seed for record in study.records))
    dims = list(dict.fromkeys(f"{record.start.dim:,}" for record in study.records))
    samples = list(dict.fromkeys(f"{r.evaluations[-1].samples:,}" for r in study.records))
    up, latency = common("links.uplink_mbps", shown), common("links.latency_ms", shown)
    return [
        ("task", common("task", _task)),
        ("parameters", " / ".join(dims)),
        ("nodes", common("nodes.count", str)),
        ("topology", common("topology")),
        ("partition", common("task.partition")),
        ("training", common("train", _training)),
        ("rounds", common("run.rounds", str)),
        ("codec", common("wire.codec", str)),
        ("network", f"{up} Mbit/s up, {latency} ms"),
        ("test samples", " / ".join(samples)),
        ("seeds", ", ".join(map(str, seeds)) if len(seeds) <= 12 else f"{len(seeds)}"),
    ]


def _task(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    name = value.get("name") or value.get("own") or str(value.get("file", ""))
    options = value.get("options") or {}
    return ", ".join([str(name), *(f"{spaced(k)} {shown(v)}" for k, v in options.items())])


def _training(value: Any) -> str:
    optimizer = value.get("optimizer", {})
    steps, batch, epochs = value.get("local_steps"), value.get("batch_size"), value.get("local_epochs")
    if isinstance(steps, list):
        steps = f"{min(steps)} to {max(steps)}"
    length = f"{steps} local step{'s' if steps != 1 else ''}"
    if epochs is not None:
        length = f"{epochs:g} local epoch{'s' if epochs != 1 else ''}"
    if value.get("balanced"):
        length += " on a node of median speed"
    return f"{length} of batch {batch}; {described(optimizer)}"


_FINGERPRINTS = {
    "model": "initial model",
    "partition": "samples on each node",
    "batches": "first batches",
    "evaluation": "evaluation samples",
    "codec": "codec",
}


def alike(study: Study) -> tuple[bool, str]:
    """Return whether the variants are comparable, and a sentence about it."""
    if len(study.variants) < 2:
        return True, "There is one variant, so nothing had to be alike."
    shared: set[int] = set.intersection(*({r.start.seed for r in g.records} for g in study.groups))
    differing = _differing_fingerprints(study, shared)
    text = ""
    same = [
        _FINGERPRINTS.get(what, what) for what in study.records[0].start.fingerprints if what not in differing
    ]
    if shared and same:
        everyone = "both variants" if len(study.variants) == 2 else f"all {len(study.variants)} variants"
        text = f"For every seed, {everyone} have the same {and_list(same)}"
        text += " (compared by fingerprint)."
    if differing:
        what = and_list([_FINGERPRINTS.get(name, name) for name in differing])
        text += f" Not comparable: they differ in {what}."
    if not shared:
        text += " Not comparable: there is no seed that every variant has."
    elif any({r.start.seed for r in g.records} != shared for g in study.groups):
        text += " Not every variant has every seed."
    rounds = {record.rounds for record in study.records}
    if len(rounds) > 1:
        text += f" They were measured for {min(rounds)} to {max(rounds)} rounds."
    return bool(shared) and not differing, text.strip()


def _differing_fingerprints(study: Study, seeds: set[int]) -> list[str]:
    """Return the aspects in which variants differ with at least one seed."""
    found: dict[str, None] = {}
    for seed in sorted(seeds):
        prints = [
            next(r.start.fingerprints for r in group.records if r.start.seed == seed) for group in study.groups
        ]
        for what in prints[0]:
            if any(other.get(what) != prints[0][what] for other in prints):
                found[what] = None
    return list(found)


# --- Tables -----------------------------------------------------------------------------------------------


def wall_clock_table(study: Study) -> Table | None:
    """Return the table of real time by activity, means over ended seeds; None if none has ended."""
    walls = {
        group.name: [record.end.wall_s for record in group.records if record.end is not None]
        for group in study.groups
    }
    named = dict.fromkeys(activity for ended in walls.values() for wall in ended for activity in wall)
    means = {
        name: {activity: statistics.fmean(wall.get(activity, 0.0) for wall in ended) for activity in named}
        for name, ended in walls.items()
        if ended
    }
    activities = [a for a in named if a != "total" and any(mean[a] >= 0.05 for mean in means.values())]
    if not means:
        return None
    overheads = {line.variant: line.overhead for line in study.table()}
    rows = []
    for name, mean in means.items():
        share_of = overheads[name]
        overhead = NEVER if share_of is None else f"{share_of * 100:.0f} % of training"
        rows.append([name, *(f"{mean[a]:.1f}" for a in activities), f"{mean.get('total', 0.0):.1f}", overhead])
    head = ["variant", *activities, "total", "all but training and evaluation"]
    notes = ["Of the process that ended the run; a resumed run counts from where it was resumed."]
    if any(record.clock != "virtual" for group in study.groups for record in group.records):
        notes += ["Of launched nodes: sums over their processes, but for the total."]
    return Table("wall", "Wall-clock seconds by activity, mean over seeds", head, rows, notes=notes)


def differences_table(study: Study) -> Table | None:
    """Return the table of settings in which the variants differ; None if there is nothing to compare."""
    differing = differing_keys([compared_settings(v.tables) for v in study.variants])
    if not differing or len(study.variants) < 2:
        return None
    flats = [flat(without_folders(compared_settings(v.tables))) for v in study.variants]
    rows = [[key, *(shown(table.get(key)) for table in flats)] for key in differing]
    head = ["setting", *(group.name for group in study.groups)]
    return Table("settings", "Every setting in which the variants differ", head, rows)


def runs_table(study: Study) -> Table:
    """Return the end and the identity of every run."""
    parent = Path(os.path.commonpath([record.folder.resolve().parent for record in study.records]))
    rows: list[list[str]] = []
    for group in study.groups:
        for record in group.records:
            sha = NEVER if record.end is None else record.end.sha256
            reason = record.end.reason if record.end is not None else ""
            rows.append(
                [
                    f"{group.name}, seed {record.start.seed}",
                    TableCell(record.status, kind="" if ended_well(record.status) else "bad", tip=reason),
                    str(record.rounds),
                    f"{record.evaluations[-1].time_s:.1f}{'' if study.clock else f' ({record.clock})'}",
                    TableCell(record.start.digest, kind="code"),
                    TableCell(sha if len(sha) < 20 else sha[:16] + "…", kind="code", tip=sha),
                    record.start.batching,
                    TableCell(record.folder.resolve().relative_to(parent).as_posix(), kind="code"),
                ]
            )
    seconds = f"{study.clock} s".strip()
    head = ["run", "status", "rounds", seconds, "digest", "SHA-256 of all parameters", "batching", "folder"]
    return Table("runs", "Every run", head, rows)


def versions(study: Study) -> list[tuple[str, str]]:
    """Return versions and machines: (name, value) each."""
    found: dict[str, list[str]] = {}
    for record in study.records:
        machine = {f"machine: {key}": value for key, value in record.start.machine.items()}
        for key, value in (record.start.versions | machine).items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    return [(key, " / ".join(values)) for key, values in found.items()]


def configuration(variant: StudyVariant) -> str:
    """Return a variant's configuration as TOML, without settings of single runs and without folders."""
    tables = without_folders(variant.tables)
    for section, keys in (("run", ("folder", "seed")), ("task", ("data",))):
        if isinstance(tables.get(section), dict):
            tables[section] = {key: value for key, value in tables[section].items() if key not in keys}
    seeds = ", ".join(str(record.start.seed) for record in variant.group.records)
    return (
        f"# seeds: {seeds}; left out: run.seed, run.folder, task.data, folders of files\n{write_toml(tables)}"
    )
