"""Decisions of a comparison, and the runs that come next.

Some settings are chosen by runs: the learning rate on one variant for all of them, and the settings in a
variant's ``tune``, by the same rule on the same seeds, which are not the comparison's. :func:`plan` derives
the decisions from the disk, so a comparison can stop and continue anywhere.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jwins.compare.comparison import Cell, Comparison, Variant
from jwins.compare.setting_paths import is_object, look_up, setting_texts, settings_slug
from jwins.compare.settings import CompareConfig, TargetConfig
from jwins.compare.tuning import TuningGrid
from jwins.errors import ResumeError
from jwins.experiment.plugins import RandomKConfig
from jwins.experiment.toml import read_toml
from jwins.report.seed_groups import Target
from jwins.run.folder import FolderState, folder_state
from jwins.run_folder.archive import is_file, read_text
from jwins.run_folder.record import Record, ended_well, start_and_end
from jwins.validation import MISSING

SAME_BYTES = 0.02
"""Bytes that differ by at most this fraction count as equal."""

_ATTEMPTS = 4
"""Maximum corrections of a fraction until the bytes are equal; the second is nearly always the last."""


@dataclass(frozen=True)
class Trial:
    """One value of a grid. Means are over the tuning seeds, bytes are per node.

    Attributes:
        variant: variant on which it was tried.
        final: final metric, mean over seeds.
        reached: number of seeds that reached the first target.
        bytes_to_target: mean over the seeds that reached it, None without any.
        seconds_to_target: virtual seconds, mean over the same seeds.
        to_end: final metric of full-length runs, which only the best values have; else None.
        edge: whether it is the best and at an end of the grid, which is then too narrow.
        point: the settings by TOML path; several for a grid of several.
    """

    variant: str
    key: str
    value: Any
    seeds: int
    final: float
    reached: int
    bytes_to_target: float | None
    seconds_to_target: float | None
    status: str
    to_end: float | None = None
    to_end_status: str = ""
    chosen: bool = False
    edge: bool = False
    point: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """Decide as much of a comparison as the runs on disk allow.

    Attributes:
        chosen: for each variant whose settings are decided, those settings by TOML path.
        cells: every run that is compared or leads to a decision, as far as it is known now, including
            ended runs.
        trials: tuning results of each grid whose runs have all ended.
        sensitivity: runs of each variant at each value of the shared setting.
    """

    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    sensitivity: list[Cell] = field(default_factory=list)


def plan(comparison: Comparison, only: Collection[str] = (), *, unconfirmed: bool = False) -> Plan:
    """Return the decisions so far, and the runs that are possible now.

    Args:
        comparison: the comparison.
        only: names of variants; empty for all. The plan also has runs of others that their tuning needs.
        unconfirmed: whether the best of shortened tuning runs counts as chosen before its full-length run.

    Raises:
        ResumeError: a cell's folder holds another experiment.
    """
    found = Plan()
    planner = _Planner(comparison, found, unconfirmed)
    for variant in comparison.variants:
        if not only or variant.name in only:
            settings = planner.settings(variant)
            if settings is not None:
                found.chosen[variant.name] = settings
    for seed in comparison.compare.seeds:
        for variant in comparison.variants:
            if variant.name in found.chosen:
                planner.add(comparison.cell(variant, seed, found.chosen[variant.name]))
    planner.add_sensitivity()
    return found


class _Planner:
    def __init__(self, comparison: Comparison, found: Plan, unconfirmed: bool) -> None:
        self._comparison, self._found, self._unconfirmed = comparison, found, unconfirmed
        self._compare = comparison.settings
        self._folders: set[Path] = set()
        self._settings: dict[str, dict[str, Any] | None] = {}

    def add(self, cell: Cell) -> Record | None:
        """Add a cell to the plan, and return its record if it has ended."""
        if cell.folder not in self._folders:
            self._folders.add(cell.folder)
            self._found.cells.append(cell)
        return ended(cell)

    def settings(self, variant: Variant) -> dict[str, Any] | None:
        """Return a variant's settings, None as long as they are undecided."""
        if variant.name not in self._settings:
            self._settings[variant.name] = self._decide(variant)
        return self._settings[variant.name]

    def _decide(self, variant: Variant) -> dict[str, Any] | None:
        rule, on = self._comparison.rule, self._comparison.tuned_on
        settings: dict[str, Any] = {}
        if rule.shared is not None and on is not None:
            if variant is on:
                return self._best(on, rule.shared, {}, "final")
            shared = self.settings(on)
            if shared is None:
                return None
            settings = dict(shared)
        if variant.tune is not None:
            best = self._best(variant, variant.tune, settings, rule.by)
            return None if best is None else {**settings, **best}
        if variant.bytes_as is not None:
            return self._with_bytes_as(variant, self._comparison.variant(variant.bytes_as), settings)
        return settings

    def _best(
        self, variant: Variant, grid: TuningGrid, settings: dict[str, Any], by: str
    ) -> dict[str, Any] | None:
        comparison = self._comparison
        points = comparison.points(grid)
        if len(points) == 1:
            return points[0]
        records: list[list[Record]] = []
        for point in points:
            cells = [
                comparison.cell(variant, seed, {**settings, **point}, tuning=True)
                for seed in comparison.rule.seeds
            ]
            records.append([record for cell in cells if (record := self.add(cell)) is not None])
        targets = self._tuning_targets(variant, by)
        if targets is None or any(len(of) < len(comparison.rule.seeds) for of in records):
            return None
        tried = [
            _trial(variant, point, of, targets, self._compare)
            for point, of in zip(points, records, strict=True)
        ]
        best = self._confirmed(variant, settings, by, tried, targets)
        if best is None:
            return None
        tried[best] = replace(tried[best], chosen=True, edge=at_edge(grid, best))
        self._found.trials += tried
        return points[best]

    def _confirmed(
        self,
        variant: Variant,
        settings: dict[str, Any],
        by: str,
        tried: list[Trial],
        targets: Mapping[int, Target],
    ) -> int | None:
        """Return the best value, None as long as it is unknown; ``tried`` gets its full-length runs.

        A value that leads after some of the rounds may diverge later. So the best value gets full-length runs.
        If these are no better than the shortened runs of the next best value, that value gets them, too, until
        the best value has had them.
        """
        comparison = self._comparison
        known, confirmed = list(tried), set[int]()
        while True:
            best = min(range(len(known)), key=lambda i: rank(known[i], by, self._compare))
            if best in confirmed or not comparison.confirms(variant):
                return best
            own = {**settings, **tried[best].point}
            cells = [
                comparison.cell(variant, seed, own, tuning=True, to_end=True) for seed in comparison.rule.seeds
            ]
            records = [record for cell in cells if (record := self.add(cell)) is not None]
            if len(records) < len(cells):
                return best if self._unconfirmed else None
            row = tried[best]
            known[best] = _trial(variant, row.point, records, targets, self._compare)
            tried[best] = replace(row, to_end=known[best].final, to_end_status=known[best].status)
            confirmed.add(best)

    def _tuning_targets(self, variant: Variant, by: str) -> dict[int, Target] | None:
        settings, wanted = self._compare, self._compare.all_targets[0]
        seeds = self._comparison.rule.seeds
        if wanted.accuracy is not None:
            target = Target(settings.metric, wanted.accuracy, bool(settings.lower_is_better))
            return dict.fromkeys(seeds, target)
        if by == "final":
            return {}
        full = self._comparison.full_of(variant)
        assert full is not None  # checked by the constructor of the comparison
        chosen = self.settings(full)
        if chosen is None:
            return None
        targets = {}
        for seed in seeds:
            record = self.add(self._comparison.cell(full, seed, chosen, tuning=True))
            if record is not None:
                targets[seed] = target_of(settings, wanted, full.name, [record])
        return targets if len(targets) == len(seeds) else None

    def _with_bytes_as(
        self, variant: Variant, other: Variant, settings: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Choose the fraction with which random sampling sends the same bytes per round as ``other``.

        The first guess is the ratio of the other's bytes to full sharing's. Measured bytes then correct it,
        first with the comparison's first seed, then in the mean over all seeds. A fraction with existing runs
        is kept as long as its bytes match.
        """
        sharing, full = variant.experiment.sharing, self._comparison.full_of(variant)
        assert isinstance(sharing, RandomKConfig)  # checked by the constructor of the comparison
        all_seeds = self._comparison.compare.seeds
        wanted = self._bytes_per_round(other, self.settings(other), all_seeds[:1])
        whole = None if full is None else self._bytes_per_round(full, self.settings(full), all_seeds[:1])
        if wanted is None or (full is not None and whole is None):
            return None
        if not wanted or whole == 0.0:  # one node sends nothing with any fraction
            return settings
        chosen = settings
        fraction = sharing.fraction if whole is None else wanted / whole
        there = self._fraction_there(variant, settings)
        steps: tuple[Sequence[int], ...] = (all_seeds[:1], all_seeds)
        if there is not None:
            fraction = there
            if self._bytes_per_round(variant, {**settings, "sharing.fraction": there}, all_seeds, add=False):
                steps = (all_seeds,)
        for seeds in steps:
            wanted = self._bytes_per_round(other, self.settings(other), seeds)
            if wanted is None:
                return None
            for attempt in range(1, _ATTEMPTS + 1):
                fraction = min(1.0, max(1e-4, round(fraction, 4)))
                chosen = {**settings, "sharing.fraction": fraction}
                sent = self._bytes_per_round(variant, chosen, seeds, add=False)
                if sent is None:
                    self._bytes_per_round(variant, chosen, seeds)
                    return None
                if not (sent and wanted) or attempt == _ATTEMPTS or fraction == 1.0:
                    break
                if abs(sent / wanted - 1.0) <= SAME_BYTES:
                    break
                fraction *= wanted / sent
        return chosen

    def _fraction_there(self, variant: Variant, settings: dict[str, Any]) -> float | None:
        """Return the fraction of the existing run of the comparison's first seed, None without one."""
        cell = self._comparison.cell(variant, self._comparison.compare.seeds[0], settings)
        config = cell.folder / "config.toml"
        if not is_file(config):
            return None
        stored = read_toml(read_text(config), str(config))
        fraction = look_up(stored, "sharing.fraction")
        return float(fraction) if isinstance(fraction, int | float) else None

    def _bytes_per_round(
        self, variant: Variant, settings: dict[str, Any] | None, seeds: Sequence[int], *, add: bool = True
    ) -> float | None:
        """Return bytes per node and round, mean over seeds; None if a run has not ended."""
        if settings is None:
            return None
        cells = [self._comparison.cell(variant, seed, settings) for seed in seeds]
        records = [self.add(cell) if add else ended(cell) for cell in cells]
        there = [record for record in records if record is not None]
        if len(there) < len(cells):
            return None
        return statistics.fmean(record.bytes_per_node()[-1] / max(1, record.rounds) for record in there)

    def add_sensitivity(self) -> None:
        """Add every variant whose own settings are decided, at every value of the shared setting."""
        rule = self._comparison.rule
        if rule.key is None or len(rule.values) < 2:
            return
        for variant in self._comparison.variants:
            settings = self._found.chosen.get(variant.name)
            if settings is None or not self._comparison.in_sensitivity(variant):
                continue
            for value in rule.values:
                cell = self._comparison.cell(variant, rule.seeds[0], {**settings, rule.key: value}, tuning=True)
                self.add(cell)
                self._found.sensitivity.append(cell)


def _trial(
    variant: Variant,
    point: Mapping[str, Any],
    records: Sequence[Record],
    targets: Mapping[int, Target],
    settings: CompareConfig,
) -> Trial:
    finals = [record.final(settings.metric, settings.final_over) for record in records]
    hits = [
        (row.traffic.total / record.start.num_nodes, row.time_s)
        for record in records
        if record.start.seed in targets and (row := targets[record.start.seed].first(record)) is not None
    ]
    ends = [record.status for record in records]
    return Trial(
        variant=variant.name,
        key=", ".join(point),
        value=next(iter(point.values())) if len(point) == 1 else ", ".join(setting_texts(point)),
        point=dict(point),
        seeds=len(records),
        final=statistics.fmean(finals),
        reached=len(hits),
        bytes_to_target=statistics.fmean(sent for sent, _ in hits) if hits else None,
        seconds_to_target=statistics.fmean(time_s for _, time_s in hits) if hits else None,
        status="; ".join(dict.fromkeys(ends)),
    )


def rank(tried: Trial, by: str, settings: CompareConfig) -> tuple[bool, float, float, float]:
    """Return a sort key, smallest for the best value.

    Finished runs come first, then most seeds at the target, fewest bytes or seconds, and the best final value.
    """
    final = tried.final if settings.lower_is_better else -tried.final
    final = math.inf if math.isnan(final) else final
    if by == "final":
        return not ended_well(tried.status), 0.0, 0.0, final
    cost = tried.bytes_to_target if by == "bytes" else tried.seconds_to_target
    return not ended_well(tried.status), -tried.reached, math.inf if cost is None else cost, final


def at_edge(grid: TuningGrid, best: int) -> bool:
    """Return whether a value beyond the grid might be better, for one of its settings.

    False for a grid of which only some combinations were drawn.
    """
    if grid.budget is not None:
        return False
    point, values = grid.points(seed=0)[best], grid.grid if grid.key is None else {grid.key: grid.values}
    return any(len(tried) > 1 and _is_end(key, tried, point[key]) for key, tried in values.items())


def _is_end(key: str, values: Sequence[Any], best: Any) -> bool:
    """Return whether a value is the smallest or largest of a list; nothing is beyond a fraction of 1."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return False
    if best == 1.0 and key.endswith((".gamma", ".fraction")):
        return False
    return bool(best in (min(values), max(values)))


def ended(cell: Cell) -> Record | None:
    """Return the record of a run that has ended, None for any other."""
    for folder in (cell.folder, _earlier(cell)):
        with contextlib.suppress(ResumeError):
            if folder is not None and folder_state(cell.experiment, folder)[0] is FolderState.COMPLETE:
                return Record.read(folder)
    return None


def _earlier(cell: Cell) -> Path | None:
    """Return the folder for a run that was compared before another value was chosen."""
    return _folder_of(cell, _written(cell)) if cell.settings and not cell.tuning else None


def _folder_of(cell: Cell, settings: Mapping[str, Any]) -> Path:
    return cell.folder.parent / "earlier" / settings_slug(settings) / cell.folder.name


def _written(cell: Cell) -> dict[str, Any]:
    """Return the cell's settings as in its ``config.toml``: tables with every default."""
    return _of(cell.experiment.resolved(), cell.settings)


def _of(tables: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    found = {key: look_up(tables, key) for key in keys}
    return {key: None if value is MISSING else value for key, value in found.items()}


def set_aside(cell: Cell) -> None:
    """Move an earlier run out of the cell's folder after another value was chosen, and restore its own run."""
    earlier = _earlier(cell)
    if earlier is None:
        return
    config = cell.folder / "config.toml"
    if config.is_file():
        stored = read_toml(config.read_text(encoding="utf-8"), str(config))
        before = _of(stored, cell.settings)
        if before == _written(cell):
            return
        if not any(map(is_object, before.values())):  # whose fields are not stored
            folder_state(cell.experiment.changed(before), cell.folder)  # differs in more: an error
        aside = _folder_of(cell, before)
        aside.parent.mkdir(parents=True, exist_ok=True)
        cell.folder.rename(aside)
    if earlier.is_dir():
        earlier.rename(cell.folder)


def target_of(settings: CompareConfig, wanted: TargetConfig, name: str, full: Sequence[Record]) -> Target:
    """Return a target from full sharing's results; without any, a target that no run reaches."""
    if wanted.accuracy is not None:
        return Target(settings.metric, wanted.accuracy, bool(settings.lower_is_better))
    if not full:
        return Target(settings.metric, math.nan, bool(settings.lower_is_better), f"{name} has not been run")
    start, final = start_and_end(full, settings.metric, settings.final_over)
    if wanted.fraction is not None:
        value, meaning = final * wanted.fraction, f"{100 * wanted.fraction:.4g} % of the final value of {name}"
    else:
        assert wanted.way is not None
        value = start + wanted.way * (final - start)
        meaning = f"{100 * wanted.way:.4g} % of the way of {name} from start to end"
    return Target(settings.metric, value, bool(settings.lower_is_better), meaning)
