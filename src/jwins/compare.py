"""Several variants of one experiment, over several seeds, like for like.

A comparison is a list of cells, one per variant and seed. Each cell is a run of its own, in
``<folder>/<variant>/seed-<seed>``: what is finished is not run again, what was interrupted goes on. All
variants of a seed must start from the same model, hold the same samples, see the same batches and use the
same codec.

Some settings are chosen by runs, too: the learning rate on one variant for all of them, and what a variant's
``tune`` lists, by the same rule on the same seeds, which are not the comparison's. :func:`plan` reads from the
disk what has been decided and says what is to be run next, so a comparison may stop and go on anywhere.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from jwins.errors import ConfigError, DataError, ResumeError, UsageError
from jwins.experiment import Experiment, FullConfig, RandomKConfig, lay_over, read
from jwins.jobs import CellProgress, Job, cores, last_progress, memory_free, memory_needed, run_jobs, that_fit
from jwins.report import (
    Group,
    Line,
    Record,
    Table,
    Target,
    figure,
    is_percent,
    line_of,
    metrics_table,
    reach,
    reach_table,
    save_figure,
    save_tables,
    size,
    spread_text,
)
from jwins.run import FolderState, check_folder, folder_state, raw_bytes_per_node
from jwins.settings import (
    MISSING,
    Settings,
    TomlPath,
    Within,
    nearest,
    parse_overrides,
    read_toml,
    refuse,
    write_toml,
)

__all__ = [
    "Cell",
    "CellProgress",
    "CompareConfig",
    "Compared",
    "Comparison",
    "Grid",
    "Plan",
    "TargetConfig",
    "Tried",
    "TuneConfig",
    "Variant",
    "compare",
    "load_comparison",
    "plan",
    "summarize",
]

Like = Literal["model", "partition", "batches", "evaluation", "codec"]
Seed = Annotated[int, Within("a signed 64-bit number", -(2**63), 2**63 - 1)]
Key = Annotated[str, Field(pattern=r"^[a-z_]+(\.[a-z_]+)+$")]

_SAME_BYTES = 0.02
"""Bytes that differ by no more than this fraction count as the same."""

_ATTEMPTS = 4
"""How often a fraction is corrected until the bytes are the same; the second is nearly always the last."""


# --- Settings ---------------------------------------------------------------------------------------------


class TargetConfig(Settings):
    """The value of the metric that bytes, rounds and seconds are counted to. One of the keys is given."""

    accuracy: float | None = Field(default=None, description="reach this value of the metric")
    fraction: Annotated[float, Within("a fraction", 0, open_low=True)] | None = Field(
        default=None, description="reach this fraction of full sharing's final value"
    )
    way: Annotated[float, Within("a fraction", 0, 1, open_low=True)] | None = Field(
        default=None, description="go this fraction of full sharing's way from its first to its final value"
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [key for key in ("accuracy", "fraction", "way") if getattr(self, key) is not None]
        if len(given) != 1:
            raise refuse("", self.model_dump(exclude_none=True), "expected one of accuracy, fraction, way")
        return self


class CompareConfig(Settings):
    """How variants are compared."""

    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = Field(
        default=(1,), description="each variant runs once per seed"
    )
    metric: str = Field(default="accuracy", description="what is compared: a metric of the task")
    also: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="further metrics whose final values are reported"
    )
    lower_is_better: bool = Field(default=False, description="for metrics such as loss")
    target: TargetConfig = TargetConfig(fraction=0.95)
    targets: Annotated[tuple[TargetConfig, ...], Field(strict=False)] = Field(
        default=(), description="several targets, for a table of their own; the first is the target if none is"
    )
    final_over: Annotated[int, Within("a whole number", 1)] = Field(
        default=1, description="last evaluations whose mean is the final value"
    )
    full: str | None = Field(
        default=None, description="variant that savings refer to; left out: the first with full sharing"
    )
    reference: str | None = Field(
        default=None, description="variant that differences refer to; left out: the one that savings refer to"
    )
    baselines: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="variants that ratios to the targets refer to, at most one per group"
    )
    folder: TomlPath | None = Field(
        default=None, description="where everything is written; left out: runs/<name>"
    )

    @property
    def all_targets(self) -> tuple[TargetConfig, ...]:
        """The targets, the first of which stands in the main table."""
        if not self.targets:
            return (self.target,)
        if "target" in self.model_fields_set:
            return (self.target, *(other for other in self.targets if other != self.target))
        return self.targets

    @model_validator(mode="after")
    def _different(self) -> Self:
        for index, seed in enumerate(self.seeds):
            if seed in self.seeds[:index]:
                raise refuse(f"seeds[{index}]", seed, "is in the list already")
        return self


def _check_values(values: Sequence[Any]) -> None:
    texts = [_setting_text(value) for value in values]
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise refuse(f"values[{index}]", values[index], "is in the list already")


class Grid(Settings):
    """Values of one setting, of which the best is used."""

    key: Key = Field(description='the setting, such as "sharing.gamma"')
    values: Annotated[tuple[Any, ...], Field(strict=False, min_length=1)] = Field(
        description="values to try, in order"
    )

    @model_validator(mode="after")
    def _different(self) -> Self:
        _check_values(self.values)
        return self


class TuneConfig(Settings):
    """The rule by which everything is tuned, and a setting that is tuned on one variant for all."""

    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = Field(
        default=(101,), description="seeds of tuning runs, none of them the comparison's"
    )
    rounds: Annotated[int, Within("a whole number", 1)] | None = Field(
        default=None, description="rounds of tuning runs; left out: as many as the comparison's"
    )
    eval_samples: Annotated[int, Within("a number of samples", 1)] | None = Field(
        default=None, description="test samples of tuning runs; left out: as many as the comparison's"
    )
    by: Literal["final", "bytes", "seconds"] = Field(
        default="final",
        description="the best final value, or the fewest bytes or seconds to the first target",
    )
    key: Key | None = Field(
        default=None, description='a setting that all variants share, such as "train.optimizer.lr"'
    )
    values: Annotated[tuple[Any, ...], Field(strict=False)] = Field(
        default=(), description="values to try for it, in order; the best final value counts"
    )
    on: str | None = Field(
        default=None, description="variant it is tuned on; left out: the one that savings refer to"
    )
    sensitivity: bool = Field(
        default=False, description="also run the variants at every value, with the first of the seeds"
    )
    sensitivity_of: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="which variants; left out: all"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.key is None) != (not self.values):
            missing = "key" if self.key is None else "values"
            raise refuse(missing, MISSING, "required: the setting that is tuned and its values belong together")
        if self.sensitivity and self.key is None:
            raise refuse("sensitivity", True, "sensitivity to what? Give key and values")
        _check_values(self.values)
        return self


class Variant(Settings):
    """One variant of the comparison.

    Attributes:
        name: what table and figure call it.
        experiment: as it is run, but for seed and folder.
        allow_different: what need not be the same as in the other variants.
        group: variants of a group share full sharing, if one of them has it, and a baseline.
        tune: a setting of its own that is tuned.
        bytes_as: for random sampling, the variant that sends as many bytes.
    """

    name: str = Field(min_length=1)
    experiment: Experiment
    allow_different: Annotated[tuple[Like, ...], Field(strict=False)] = ()
    group: str | None = None
    tune: Grid | None = None
    bytes_as: str | None = None

    @property
    def slug(self) -> str:
        """The variant's folder."""
        return re.sub(r"[^a-z0-9._]+", "-", self.name.lower()).strip("-.") or "variant"


class VariantTable(Settings):
    """An entry of ``[[variants]]``: its own keys; all others are an experiment's."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="what table and figure call it", min_length=1)
    allow_different: Annotated[tuple[Like, ...], Field(strict=False)] = Field(
        default=(), description="what need not be as in the other variants"
    )
    group: str | None = Field(
        default=None,
        description="variants of a group share full sharing, if one of them has it, and a baseline",
    )
    tune: Grid | None = None
    bytes_as: str | None = Field(
        default=None, description="for random sampling: choose the fraction that sends this variant's bytes"
    )


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        variant: of the comparison.
        seed: one of the comparison's, or of tuning.
        experiment: with seed, folder and all settings.
        settings: what was chosen or is tried, by TOML path.
    """

    variant: Variant
    seed: int
    experiment: Experiment
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The cell's run folder."""
        return self.experiment.folder

    @property
    def name(self) -> str:
        """In words."""
        return ", ".join([self.variant.name, *_settings_texts(self.settings), f"seed {self.seed}"])


def _settings_texts(settings: Mapping[str, Any]) -> list[str]:
    """``["lr = 0.1", "gamma = 0.4"]``."""
    return [f"{key.rpartition('.')[2]} = {_setting_text(value)}" for key, value in settings.items()]


def _setting_text(value: Any) -> str:
    return write_toml({"v": value}).partition(" = ")[2].strip().strip('"') if value is not None else "none"


def _settings_slug(settings: Mapping[str, Any]) -> str:
    return re.sub(r"[^A-Za-z0-9._=,-]+", "-", ",".join(_settings_texts(settings)).replace(" = ", "="))


def _tables(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"train.optimizer.lr": 1}`` as ``{"train": {"optimizer": {"lr": 1}}}``."""
    tables: dict[str, Any] = {}
    for key, value in settings.items():
        place = tables
        *steps, last = key.split(".")
        for step in steps:
            place = place.setdefault(step, {})
        place[last] = value
    return tables


def _look_up(tables: Mapping[str, Any], key: str) -> Any:
    place: Any = tables
    for step in key.split("."):
        place = place.get(step, MISSING) if isinstance(place, Mapping) else MISSING
    return place


class Comparison(Settings):
    """Variants, seeds and how they are compared; see :func:`load_comparison` for the TOML form."""

    name: str = Field(min_length=1)
    variants: Annotated[tuple[Variant, ...], Field(strict=False, min_length=1)]
    compare: CompareConfig = CompareConfig()
    tune: TuneConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        slugs: dict[str, int] = {}
        for index, variant in enumerate(self.variants):
            if variant.slug in slugs:
                other = self.variants[slugs[variant.slug]].name
                raise refuse(
                    f"variants[{index}].name",
                    variant.name,
                    f"has the same folder as {other!r}; choose another name",
                )
            slugs[variant.slug] = index
        self._check_names()
        for wanted in self.compare.all_targets:
            if self.full is None and wanted.accuracy is None:
                raise refuse(
                    "compare.target",
                    wanted.model_dump(exclude_none=True),
                    "refers to full sharing, but no variant has sharing.kind = 'full'; write "
                    "{ accuracy = 0.9 }",
                )
        for index, variant in enumerate(self.variants):
            self._check_alike(index, variant)
            run = variant.experiment.run
            if run.eval_samples_early is not None and self.compare.final_over > run.eval_last:
                raise refuse(
                    "compare.final_over",
                    self.compare.final_over,
                    f"only the last {run.eval_last} evaluations use all samples; raise run.eval_last",
                )
        self._check_tuning()
        return self

    def _check_names(self) -> None:
        """Whatever names a variant names one that is there."""
        names = [variant.name for variant in self.variants]
        named = [("compare.full", self.compare.full), ("compare.reference", self.compare.reference)]
        named += [(f"compare.baselines[{i}]", name) for i, name in enumerate(self.compare.baselines)]
        if self.tune is not None:
            named.append(("tune.on", self.tune.on))
            named += [(f"tune.sensitivity_of[{i}]", name) for i, name in enumerate(self.tune.sensitivity_of)]
        named += [(f"variants[{i}].bytes_as", variant.bytes_as) for i, variant in enumerate(self.variants)]
        for path, name in named:
            if name is not None and name not in names:
                raise refuse(path, name, f"expected a variant: {', '.join(names)}{nearest(name, names)}")
        groups = [self.variant(name).group for name in self.compare.baselines]
        for index, group in enumerate(groups):
            if group in groups[:index]:
                problem = f"{'its group' if group else 'variants without a group'} have a baseline already"
                raise refuse(f"compare.baselines[{index}]", self.compare.baselines[index], problem)

    def _check_tuning(self) -> None:
        """Every setting that may be tried makes an experiment, and no tuning seed is compared."""
        for index, variant in enumerate(self.variants):
            path = f"variants[{index}]"
            if variant.bytes_as is not None:
                if not isinstance(variant.experiment.sharing, RandomKConfig):
                    raise refuse(f"{path}.bytes_as", variant.bytes_as, "is for sharing.kind = 'random_k' only")
                if self.variant(variant.bytes_as).bytes_as is not None or variant.bytes_as == variant.name:
                    raise refuse(f"{path}.bytes_as", variant.bytes_as, "sends another variant's bytes itself")
                if variant.tune is not None:
                    raise refuse(f"{path}.tune", variant.tune.key, "cannot be tuned: it has bytes_as")
            for value in variant.tune.values if variant.tune is not None else ():
                assert variant.tune is not None
                self._try(variant, variant.tune.key, value, f"{path}.tune")
        tune = self.tune
        if tune is not None and tune.key is not None:
            on = self.tuned_on
            if on is None:
                raise refuse("tune.on", MISSING, "required: no variant has sharing.kind = 'full'")
            if on.tune is not None or on.bytes_as is not None:
                raise refuse(
                    "tune.on", on.name, "has a setting of its own to be chosen; tune on another variant"
                )
            for variant in self.variants:
                for value in tune.values:
                    self._try(variant, tune.key, value, "tune")
        if self.is_tuned:
            for index, seed in enumerate(self.rule.seeds):
                if seed in self.compare.seeds:
                    problem = "is a seed of the comparison, too; what is tuned on a seed looks too good on it"
                    raise refuse(f"tune.seeds[{index}]", seed, problem)

    def _try(self, variant: Variant, key: str, value: Any, path: str) -> None:
        try:
            variant.experiment.changed(_tables({key: value}))
        except ConfigError as error:
            raise refuse(path, {"key": key, "value": value}, f"{error.path}: {error.problem}") from None

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def rule(self) -> TuneConfig:
        """How everything is tuned."""
        return self.tune if self.tune is not None else TuneConfig()

    @property
    def is_tuned(self) -> bool:
        """Whether there is a choice to make by tuning runs."""
        return len(self.rule.values) > 1 or any(v.tune and len(v.tune.values) > 1 for v in self.variants)

    @property
    def tuned_on(self) -> Variant | None:
        """The variant on which the shared setting is tuned."""
        return self.full if self.rule.on is None else self.variant(self.rule.on)

    def full_of(self, variant: Variant) -> Variant | None:
        """Full sharing to which a variant's savings and targets refer: its group's, or the comparison's."""
        for other in self.variants:
            if other.group == variant.group and isinstance(other.experiment.sharing, FullConfig):
                if variant.group is None and self.compare.full is not None:
                    break
                return other
        return self.full

    def reference_of(self, variant: Variant) -> Variant | None:
        """The variant to which a variant's difference refers."""
        if self.compare.reference is not None:
            return self.variant(self.compare.reference)
        return self.full_of(variant)

    def baseline_of(self, variant: Variant) -> Variant | None:
        """The variant to which a variant's ratios refer."""
        named = [self.variant(name) for name in self.compare.baselines]
        return next((other for other in named if other.group == variant.group), None)

    def _check_alike(self, index: int, variant: Variant) -> None:
        """What must differ by the settings alone is found before anything runs."""
        first = self.variants[0]
        keys = {"wire.codec": "codec", "train.batch_size": "batches", "train.local_steps": "batches"}
        keys |= {"task.partition": "partition", "nodes.count": "partition"}
        for key, like in keys.items():
            section, _, name = key.partition(".")
            mine = getattr(getattr(variant.experiment, section), name)
            other = getattr(getattr(first.experiment, section), name)
            if mine != other and like not in (*variant.allow_different, *first.allow_different):
                raise refuse(
                    f"variants[{index}].{key}",
                    mine,
                    f"{first.name!r} has {other!r}, so the two are not like for like; "
                    f"use the same, or say allow_different = [{like!r}]",
                )

    @property
    def full(self) -> Variant | None:
        """The variant that savings refer to."""
        if self.compare.full is not None:
            return next(variant for variant in self.variants if variant.name == self.compare.full)
        return next((v for v in self.variants if isinstance(v.experiment.sharing, FullConfig)), None)

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.compare.folder if self.compare.folder is not None else Path("runs") / self.name

    def cells(self, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
        """The runs that are compared, all variants of a seed before the next seed.

        Args:
            chosen: by variant, the settings that tuning has chosen, by TOML path; None for none.
        """
        settings = chosen or {}
        return [
            self.cell(variant, seed, settings.get(variant.name, {}))
            for seed in self.compare.seeds
            for variant in self.variants
        ]

    def cell(self, variant: Variant, seed: int, settings: Mapping[str, Any], *, tuning: bool = False) -> Cell:
        """One run.

        Args:
            variant: one of the comparison's.
            seed: any.
            settings: laid over the variant's experiment, by TOML path.
            tuning: whether it is a tuning run, which has a place and a length of its own.
        """
        folder = self.folder / variant.slug
        run: dict[str, Any] = {"seed": seed}
        if tuning:
            folder = folder / "tuning" / _settings_slug(settings)
            wanted = variant.experiment.run
            run["rounds"] = min(wanted.rounds, self.rule.rounds or wanted.rounds)
            run["eval_at"] = [at for at in wanted.eval_at if at <= run["rounds"]]
            if self.rule.eval_samples is not None:
                run |= {"eval_samples": self.rule.eval_samples, "eval_samples_early": None}
        run["folder"] = folder / f"seed-{seed}"
        name = f"{self.name}: {variant.name}".replace("/", "-")
        experiment = variant.experiment.changed(_tables(settings)).changed({"name": name, "run": run})
        return Cell(variant, seed, experiment, dict(settings))

    def expected(self, only: Collection[str] = ()) -> tuple[int, int]:
        """Runs and rounds of the whole comparison, as far as they are known beforehand.

        Args:
            only: names of variants; empty for all.
        """
        rule, on = self.rule, self.tuned_on
        runs = rounds = 0

        def add(variant: Variant, count: int, *, tuning: bool) -> None:
            nonlocal runs, rounds
            each = variant.experiment.run.rounds
            runs += count
            rounds += count * (min(each, rule.rounds or each) if tuning else each)

        shared = len(rule.values) if len(rule.values) > 1 else 0
        if shared and on is not None:
            add(on, shared * len(rule.seeds), tuning=True)
        for variant in self.variants:
            if only and variant.name not in only:
                continue
            add(variant, len(self.compare.seeds), tuning=False)
            grid = len(variant.tune.values) if variant.tune is not None else 0
            add(variant, grid * len(rule.seeds) if grid > 1 else 0, tuning=True)
            if self._in_sensitivity(variant) and shared and variant is not on:
                add(variant, shared - (grid > 1), tuning=True)
        return runs, rounds

    def _in_sensitivity(self, variant: Variant) -> bool:
        rule = self.rule
        return rule.sensitivity and (not rule.sensitivity_of or variant.name in rule.sensitivity_of)


def load_comparison(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] | None = None,
) -> Comparison:
    """A comparison from a TOML file, or a bundled one by name.

    ``base`` names the experiment all variants start from; the file's own sections lie over it, each
    variant's keys over those, and ``overrides`` over everything.

    Args:
        source: file or name.
        overrides: ``key=value`` assignments; ``compare.…`` concerns the comparison, all else every variant.
        seeds: instead of the file's.

    Raises:
        ConfigError: with TOML path, value and remedy.
    """
    tables, origin = read(source)
    try:
        return _comparison(tables, parse_overrides(overrides), seeds, source)
    except ConfigError as error:
        error.add_note(f"in {origin}")
        raise


def _comparison(
    tables: dict[str, Any], given: dict[str, Any], seeds: Sequence[int] | None, source: str | Path
) -> Comparison:
    if "variants" not in tables:
        raise ConfigError(
            "variants", MISSING, "required in a comparison; run a single experiment with `jwins run`"
        )
    tables = dict(tables)
    entries, settings, base = tables.pop("variants"), tables.pop("compare", {}), tables.pop("base", None)
    tune = tables.pop("tune", None)
    if isinstance(settings, Mapping):
        settings = {**settings, **given.pop("compare", {})}
    if "tune" in given:
        tune = {**(tune or {}), **given.pop("tune")}
    shared = tune.get("key") if isinstance(tune, Mapping) else None
    if isinstance(shared, str) and _look_up(given, shared) is not MISSING:
        problem = f"is tuned for all variants; write --set tune.values=[{_look_up(given, shared)}]"
        raise ConfigError(shared, _look_up(given, shared), problem)
    if seeds is not None:
        settings = {**settings, "seeds": list(seeds)}
    instead = {
        "run.seed": "a comparison has seeds of its own; use --seeds or compare.seeds",
        "run.folder": "each run of a comparison has its own folder; use compare.folder",
    }
    for key, problem in instead.items():
        if _look_up(given, key) is not MISSING:
            raise ConfigError(key, _look_up(given, key), problem)
    if not isinstance(entries, list):
        raise ConfigError("variants", entries, "expected an array of tables: [[variants]]")
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError("base", base, "expected the name or the file of an experiment")
        beside = Path(source).parent / base
        start, _ = read(beside if beside.is_file() else base)
        name = tables.get("name", Path(str(source)).stem)
        tables = {**lay_over(start, tables), "name": name}
    tables.setdefault("name", Path(str(source)).stem)
    variants = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"variants[{index}]", entry, "expected a table")
        try:
            table = VariantTable(**entry)
        except ConfigError as error:
            raise ConfigError(f"variants[{index}].{error.path}", error.value, error.problem) from None
        own = table.model_extra or {}
        if isinstance(shared, str) and _look_up(own, shared) is not MISSING:
            problem = "is tuned for all variants ([tune]); remove it here"
            raise ConfigError(f"variants[{index}].{shared}", _look_up(own, shared), problem)
        try:
            experiment = Experiment(**lay_over(lay_over(tables, own), given))
        except ConfigError as error:
            error.add_note(f"in variants[{index}], {table.name!r}")
            raise
        keys = {key: getattr(table, key) for key in VariantTable.model_fields}
        variants.append(Variant(experiment=experiment, **keys))
    return Comparison(name=tables["name"], variants=tuple(variants), compare=settings, tune=tune)


# --- What has been decided, and what is to be run ----------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """One value of a grid. Means are over the tuning seeds, bytes are per node.

    Attributes:
        variant: on which it was tried.
        key: TOML path of the setting.
        value: of the setting.
        seeds: how many runs.
        final: final metric, mean over seeds.
        reached: how many seeds reached the first target.
        bytes_to_target: mean over the seeds that did, None if none did.
        seconds_to_target: likewise, virtual.
        status: how the runs ended.
        chosen: whether it is the best.
        edge: whether it is the best and the smallest or largest of the grid, which is then too narrow.
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
    chosen: bool = False
    edge: bool = False


@dataclass
class Plan:
    """What of a comparison is decided, by what is on the disk.

    Attributes:
        chosen: for each variant whose settings are decided, those settings by TOML path.
        cells: every run that is part of it or leads to a decision, as far as it can be known now; those
            that have ended, too.
        tried: tuning, for each grid of which all runs have ended.
        sensitivity: runs of each variant at each value of the shared setting.
    """

    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)
    sensitivity: list[Cell] = field(default_factory=list)


def plan(comparison: Comparison, only: Collection[str] = ()) -> Plan:
    """What has been decided and what can be run now.

    Args:
        comparison: what to compare.
        only: names of variants; empty for all. What their tuning needs of others is in the plan, too.

    Raises:
        ResumeError: a cell's folder holds another experiment.
    """
    found = Plan()
    planner = _Planner(comparison, found)
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
    def __init__(self, comparison: Comparison, found: Plan) -> None:
        self._comparison, self._found = comparison, found
        self._folders: set[Path] = set()
        self._settings: dict[str, dict[str, Any] | None] = {}

    def add(self, cell: Cell) -> Record | None:
        """Make the cell part of the plan; its record, if it has ended."""
        if cell.folder not in self._folders:
            self._folders.add(cell.folder)
            self._found.cells.append(cell)
        return ended(cell)

    def settings(self, variant: Variant) -> dict[str, Any] | None:
        """What a variant is run with, None as long as that is undecided."""
        if variant.name not in self._settings:
            self._settings[variant.name] = self._decide(variant)
        return self._settings[variant.name]

    def _decide(self, variant: Variant) -> dict[str, Any] | None:
        rule, on = self._comparison.rule, self._comparison.tuned_on
        settings: dict[str, Any] = {}
        if rule.key is not None and on is not None:
            if variant is on:
                value = self._best(on, Grid(key=rule.key, values=rule.values), {}, "final")
                return None if value is None else {rule.key: value}
            shared = self.settings(on)
            if shared is None:
                return None
            settings = dict(shared)
        if variant.tune is not None:
            value = self._best(variant, variant.tune, settings, rule.by)
            return None if value is None else {**settings, variant.tune.key: value}
        if variant.bytes_as is not None:
            return self._with_bytes_as(variant, self._comparison.variant(variant.bytes_as), settings)
        return settings

    def _best(self, variant: Variant, grid: Grid, settings: dict[str, Any], by: str) -> Any:
        """The best value of a grid, None as long as it is not known."""
        if len(grid.values) == 1:
            return grid.values[0]
        comparison = self._comparison
        records: list[list[Record]] = []
        for value in grid.values:
            cells = [
                comparison.cell(variant, seed, {**settings, grid.key: value}, tuning=True)
                for seed in comparison.rule.seeds
            ]
            records.append([record for cell in cells if (record := self.add(cell)) is not None])
        targets = self._tuning_targets(variant, by)
        if targets is None or any(len(of) < len(comparison.rule.seeds) for of in records):
            return None
        tried = [
            _tried(variant, grid.key, value, of, targets, comparison.compare)
            for value, of in zip(grid.values, records, strict=True)
        ]
        best = min(range(len(tried)), key=lambda i: _rank(tried[i], by, comparison.compare))
        tried[best] = replace(tried[best], chosen=True, edge=_at_edge(grid, best))
        self._found.tried += tried
        return grid.values[best]

    def _tuning_targets(self, variant: Variant, by: str) -> dict[int, Target] | None:
        """By tuning seed, what bytes and seconds are counted to; None as long as that is not known."""
        settings, wanted = self._comparison.compare, self._comparison.compare.all_targets[0]
        seeds = self._comparison.rule.seeds
        if wanted.accuracy is not None:
            target = Target(settings.metric, wanted.accuracy, settings.lower_is_better)
            return dict.fromkeys(seeds, target)
        if by == "final":
            return {}
        full = self._comparison.full_of(variant)
        assert full is not None  # checked when the comparison was made
        chosen = self.settings(full)
        if chosen is None:
            return None
        targets = {}
        for seed in seeds:
            record = self.add(self._comparison.cell(full, seed, chosen, tuning=True))
            if record is not None:
                targets[seed] = _target(settings, wanted, full.name, [record])
        return targets if len(targets) == len(seeds) else None

    def _with_bytes_as(
        self, variant: Variant, other: Variant, settings: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Random sampling with the fraction that sends as many bytes per round as ``other``.

        The first guess is the ratio of the other's bytes to full sharing's; then it is corrected by what it
        turns out to send. All are means over the comparison's seeds.
        """
        sharing, full = variant.experiment.sharing, self._comparison.full_of(variant)
        assert isinstance(sharing, RandomKConfig)  # checked when the comparison was made
        wanted = self._bytes_per_round(other, self.settings(other))
        whole = None if full is None else self._bytes_per_round(full, self.settings(full))
        if wanted is None or (full is not None and whole is None):
            return None
        fraction = sharing.fraction if whole is None else wanted / whole
        for attempt in range(1, _ATTEMPTS + 1):
            fraction = min(1.0, max(1e-4, round(fraction, 4)))
            chosen = {**settings, "sharing.fraction": fraction}
            sent = self._bytes_per_round(variant, chosen, add=False)
            if sent is None:
                self._bytes_per_round(variant, chosen)
                return None
            if attempt == _ATTEMPTS or fraction == 1.0 or abs(sent / wanted - 1.0) <= _SAME_BYTES:
                break
            fraction *= wanted / sent
        return chosen

    def _bytes_per_round(
        self, variant: Variant, settings: dict[str, Any] | None, *, add: bool = True
    ) -> float | None:
        """Bytes per node and round, mean over the comparison's seeds; None if a run has not ended."""
        if settings is None:
            return None
        cells = [self._comparison.cell(variant, seed, settings) for seed in self._comparison.compare.seeds]
        records = [self.add(cell) if add else ended(cell) for cell in cells]
        there = [record for record in records if record is not None]
        if len(there) < len(cells):
            return None
        return statistics.fmean(record.bytes_per_node()[-1] / max(1, record.rounds) for record in there)

    def add_sensitivity(self) -> None:
        """Every variant whose own settings are decided, at every value of the shared setting."""
        rule = self._comparison.rule
        if rule.key is None or len(rule.values) < 2:
            return
        for variant in self._comparison.variants:
            settings = self._found.chosen.get(variant.name)
            if settings is None or not self._comparison._in_sensitivity(variant):
                continue
            for value in rule.values:
                cell = self._comparison.cell(variant, rule.seeds[0], {**settings, rule.key: value}, tuning=True)
                self.add(cell)
                self._found.sensitivity.append(cell)


def _tried(
    variant: Variant,
    key: str,
    value: Any,
    records: Sequence[Record],
    targets: Mapping[int, Target],
    settings: CompareConfig,
) -> Tried:
    finals = [record.final(settings.metric, settings.final_over) for record in records]
    hits = [
        (row.traffic.total / record.start.num_nodes, row.time_s)
        for record in records
        if record.start.seed in targets and (row := targets[record.start.seed].first(record)) is not None
    ]
    ends = [record.status for record in records]
    return Tried(
        variant=variant.name,
        key=key,
        value=value,
        seeds=len(records),
        final=statistics.fmean(finals),
        reached=len(hits),
        bytes_to_target=statistics.fmean(sent for sent, _ in hits) if hits else None,
        seconds_to_target=statistics.fmean(time_s for _, time_s in hits) if hits else None,
        status="; ".join(dict.fromkeys(ends)),
    )


def _rank(tried: Tried, by: str, settings: CompareConfig) -> tuple[bool, float, float, float]:
    """The smallest is the best: finished, reached by most seeds, fewest bytes or seconds, best final value."""
    final = tried.final if settings.lower_is_better else -tried.final
    final = math.inf if math.isnan(final) else final
    if by == "final":
        return tried.status != "finished", 0.0, 0.0, final
    cost = tried.bytes_to_target if by == "bytes" else tried.seconds_to_target
    return tried.status != "finished", -tried.reached, math.inf if cost is None else cost, final


def _at_edge(grid: Grid, best: int) -> bool:
    """Whether a value beyond the grid might have been better still; beyond a fraction of 1 there is none."""
    values = grid.values
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return False
    if values[best] == 1.0 and grid.key.endswith((".gamma", ".fraction")):
        return False
    return bool(values[best] in (min(values), max(values)))


def ended(cell: Cell) -> Record | None:
    """The record of a run that has ended, None for any other."""
    with contextlib.suppress(ResumeError):
        if folder_state(cell.experiment, cell.folder)[0] is FolderState.COMPLETE:
            return Record.read(cell.folder)
    earlier = _earlier(cell)
    if earlier is not None:
        with contextlib.suppress(ResumeError):
            if folder_state(cell.experiment, earlier)[0] is FolderState.COMPLETE:
                return Record.read(earlier)
    return None


def _earlier(cell: Cell) -> Path | None:
    """Where a run is kept that was compared before another value was chosen."""
    if not cell.settings or "tuning" in cell.folder.parts[-3:]:
        return None
    return cell.folder.parent / "earlier" / _settings_slug(cell.settings) / cell.folder.name


def _make_room(cell: Cell) -> None:
    """Set aside what the cell's folder holds from before another value was chosen, and take back its own."""
    earlier = _earlier(cell)
    if earlier is None:
        return
    config = cell.folder / "config.toml"
    if config.is_file():
        stored = read_toml(config.read_text(encoding="utf-8"), str(config))
        before = {key: _look_up(stored, key) for key in cell.settings}
        if before == dict(cell.settings):
            return
        old = replace(cell, experiment=cell.experiment.changed(_tables(before)), settings=before)
        folder_state(old.experiment, cell.folder)  # differs in more than what was chosen: an error, as always
        aside = _earlier(old)
        assert aside is not None
        aside.parent.mkdir(parents=True, exist_ok=True)
        cell.folder.rename(aside)
    if earlier.is_dir():
        earlier.rename(cell.folder)


# --- Running the cells ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """A comparison's outcome.

    Attributes:
        comparison: what was compared.
        folder: has ``table.md``, ``table.csv``, ``summary.json``, ``comparison.png`` and ``.pdf``.
        table: one line per variant.
        target: what bytes, rounds and seconds were counted to.
        groups: the runs.
        status: ``finished``, ``partial`` if runs are missing, or ``interrupted`` with an empty table.
        further: tables beside the main one: several targets, further metrics, tuning, sensitivity.
        notes: what a reader of the table must know.
    """

    comparison: Comparison
    folder: Path
    table: list[Line]
    target: Target | None
    groups: list[Group]
    status: str
    further: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(
    comparison: Comparison,
    *,
    jobs: int | None = None,
    progress: Callable[[CellProgress], None] | None = None,
    only: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> Compared:
    """Run all cells that are not finished, check that they are like for like, and write tables and figure.

    Args:
        comparison: what to compare.
        jobs: cells side by side, each in a process of its own with one thread; None: one per core, as far as
            memory allows. At most one per unfinished cell. With 1, cells run in this process.
        progress: told how far the cells are.
        only: names of variants to run; the tables then have what is there. Empty for all.
        say: told in a sentence what a user should know, such as that memory is short.

    Raises:
        ConfigError: a cell cannot be built as written, variants are not like for like, or the first evaluation
            has no metric of a name that the comparison asks for.
        DataError: data are missing.
        ResumeError: a cell's folder holds another experiment.
    """
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs = {jobs}: expected at least 1")
    _check_only(comparison, only)
    outer, speak = progress or (lambda _: None), say or (lambda _: None)

    def tell(of: CellProgress) -> None:
        _check_metrics(comparison.compare, of.metrics or ())
        outer(of)

    check_folder("compare.folder", comparison.folder)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[tuple[Path, str], int] = {}
    done: set[str] = set()
    while True:
        todo: list[Job] = []
        for cell in plan(comparison, only).cells:
            begun = (cell.folder, cell.name) in numbers
            number = numbers.setdefault((cell.folder, cell.name), len(numbers))
            job = Job(number, cell.name, cell.experiment)
            _make_room(cell)
            if folder_state(cell.experiment, cell.folder)[0] is not FolderState.COMPLETE:
                todo.append(job)
            elif not begun:
                tell(last_progress(job, Record.read(cell.folder)))
        if not todo:
            break
        again = [job for job in todo if job.name in done]  # an attempt at equal bytes has another name
        if again:
            raise ResumeError(f"{again[0].experiment.folder}: this run has ended, and yet it is incomplete")
        done |= {job.name for job in todo}
        workers = _workers(todo, jobs, speak)
        statuses = run_jobs(todo, workers, tell)
        if "interrupted" in statuses:
            return Compared(comparison, comparison.folder, [], None, [], "interrupted")
    return summarize(comparison, only=only)


def _check_only(comparison: Comparison, only: Collection[str]) -> None:
    names = [variant.name for variant in comparison.variants]
    for name in only:
        if name not in names:
            raise ConfigError("--only", name, f"expected a variant: {', '.join(names)}{nearest(name, names)}")


def _check_metrics(settings: CompareConfig, measured: Collection[str]) -> None:
    """The metrics that are asked for are among those of an evaluation, if there was one."""
    wanted = [("compare.metric", settings.metric)]
    wanted += [(f"compare.also[{index}]", name) for index, name in enumerate(settings.also)]
    for path, name in wanted:
        if measured and name not in measured:
            problem = f"expected a metric of the task: {', '.join(measured)}{nearest(name, measured)}"
            raise ConfigError(path, name, problem)


def _workers(todo: Sequence[Job], wanted: int | None, say: Callable[[str], None]) -> int:
    """How many runs side by side. A number that was asked for is kept; too large a one is remarked on."""
    workers = min(wanted or cores(), len(todo))
    if workers == 1:
        return 1
    fit, remark = that_fit(workers, memory_needed([job.experiment for job in todo]), memory_free())
    if not remark:
        return workers
    if wanted is not None:
        say(f"memory may not do for {workers} runs side by side, as asked for: {remark.partition(': ')[2]}")
        return workers
    say(remark)
    return fit


def summarize(comparison: Comparison, *, partial: bool = False, only: Collection[str] = ()) -> Compared:
    """Tables and figure of a comparison from what is on the disk; nothing is run.

    Args:
        comparison: what was compared.
        partial: whether runs may be missing; the tables then have what has ended.
        only: names of variants whose runs must be there; others may be missing.

    Raises:
        DataError: a cell has not been run.
        ConfigError: variants are not like for like.
    """
    found = plan(comparison)
    cells = [cell for cell in comparison.cells(found.chosen) if cell.variant.name in found.chosen]
    records: dict[tuple[str, int], Record] = {}
    for cell in cells:
        record = ended(cell)
        if record is None and not partial and not only:
            Record.read(cell.folder)  # says what is missing
            raise DataError(f"{cell.folder}: this run has not ended; go on with `jwins compare`")
        if record is not None:
            records[cell.variant.name, cell.seed] = record
    undecided = [v.name for v in comparison.variants if v.name not in found.chosen]
    if undecided and not partial and not only:
        raise DataError(f"{comparison.folder}: tuning of {undecided[0]!r} has not ended; run `jwins compare`")
    _check_like_for_like(comparison, records)
    groups = _groups(comparison, cells, records)
    missing = len(comparison.variants) * len(comparison.compare.seeds) - len(records)
    return _written(comparison, found, groups, missing)


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
            groups.append(Group(variant.name, getattr(variant.experiment.sharing, "kind", "own"), of, raw))
    return groups


def _written(comparison: Comparison, found: Plan, groups: list[Group], missing: int) -> Compared:
    """Compute the tables and write everything."""
    settings, folder = comparison.compare, comparison.folder
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
            line_of(
                group,
                own_targets[0],
                full=full,
                reference=reference,
                final_over=settings.final_over,
                label=variant.group,
                tuned=", ".join(_settings_texts(_own_settings(comparison, found, variant))),
            )
        )
        reached += reach(group, own_targets, of(comparison.baseline_of(variant)), variant.group)
        with_reference.append((group, reference))
    target = targets[0] if targets else _targets(comparison, None)[0]
    further = []
    if groups and (settings.targets or settings.baselines):
        further.append(reach_table(reached, target))
    if groups and settings.also:
        further.append(metrics_table(with_reference, settings.also, settings.final_over))
    further += _tuning_tables(comparison, found)
    notes = list(_notes(comparison, found, by_name, missing))
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
        shown = target if all(other.value == target.value for other in targets) else None
        drawing = figure(groups, shown, metric=settings.metric, title=_title(comparison, groups))
        save_figure(drawing, folder / "comparison.png")
    _save_configs(comparison, found)
    status = "partial" if missing else "finished"
    return Compared(comparison, folder, table, target if groups else None, groups, status, further, notes)


def _own_settings(comparison: Comparison, found: Plan, variant: Variant) -> dict[str, Any]:
    """What was chosen for this variant and not for all."""
    chosen = found.chosen.get(variant.name, {})
    return {key: value for key, value in chosen.items() if key != comparison.rule.key}


def _notes(comparison: Comparison, found: Plan, groups: Mapping[str, Group], missing: int) -> Iterator[str]:
    if missing:
        yield f"{missing} run{'s have' if missing != 1 else ' has'} not ended and are left out."
    rule, on = comparison.rule, comparison.tuned_on
    if rule.key is not None and on is not None and on.name in found.chosen:
        value = _setting_text(found.chosen[on.name][rule.key])
        how = f", the best of {len(rule.values)} on {on.name}" if len(rule.values) > 1 else ""
        yield f"All variants: {rule.key} = {value}{how}."
    for tried in found.tried:
        if tried.edge:
            yield (
                f"{tried.variant}: the best {tried.key}, {_setting_text(tried.value)}, is at the edge of what "
                f"was tried; a wider grid may have a better one."
            )
    for variant in comparison.variants:
        mine, other = groups.get(variant.name), groups.get(variant.bytes_as or "")
        if mine is not None and other is not None:
            ratio = _bytes(mine) / _bytes(other) if _bytes(other) else math.nan
            yield f"{variant.name} sends {ratio:.3f} times the bytes of {variant.bytes_as}."


def _bytes(group: Group) -> float:
    return statistics.fmean(record.bytes_per_node()[-1] for record in group.records)


def _tuning_tables(comparison: Comparison, found: Plan) -> list[Table]:
    settings, rule = comparison.compare, comparison.rule
    percent = is_percent(Target(settings.metric, 0.0))
    tables = []
    if found.tried:
        rows = [
            [
                row.variant,
                f"{row.key} = {_setting_text(row.value)}",
                spread_text(row.final, None, percent=percent),
                "—" if row.bytes_to_target is None else size(row.bytes_to_target),
                "—" if row.seconds_to_target is None else f"{row.seconds_to_target:.1f}",
                row.status,
                "chosen, at the edge" if row.edge else "chosen" if row.chosen else "",
            ]
            for row in found.tried
        ]
        head = ["variant", "tried", f"final {settings.metric}", "bytes to target", "seconds", "status", ""]
        if rule.by == "final" and not any(
            row.reached for row in found.tried
        ):  # nothing was counted to a target
            head, rows = head[:3] + head[5:], [row[:3] + row[5:] for row in rows]
        by = {"final": f"final {settings.metric}", "bytes": "bytes to the first target"}
        how = by.get(rule.by, "seconds to the first target")
        seeds = ", ".join(map(str, rule.seeds))
        length = f", {rule.rounds} rounds" if rule.rounds is not None else ""
        note = f"Chosen by {how}; seed{'s' if len(rule.seeds) > 1 else ''} {seeds}{length}."
        if rule.key is not None and rule.by != "final":
            note += f" {rule.key} is chosen by final {settings.metric}."
        data = [asdict(row) | {"value": _plain(row.value)} for row in found.tried]
        tables.append(Table("tuning", "Tuning", head, rows, data, [note]))
    lines, data = [], []
    for cell in found.sensitivity:
        record = ended(cell)
        if record is None or rule.key is None:
            continue
        value = cell.settings[rule.key]
        final = record.final(settings.metric, settings.final_over)
        lines.append(
            [cell.variant.name, _setting_text(value), spread_text(final, None, percent=percent), record.status]
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


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else _setting_text(value)


def _title(comparison: Comparison, groups: Sequence[Group]) -> str:
    seeds = len(comparison.compare.seeds)
    counts = sorted({group.records[0].start.num_nodes for group in groups})
    nodes = ", ".join(map(str, counts))
    return f"{comparison.name} · {nodes} nodes · {seeds} seed{'s' if seeds != 1 else ''}"


def _save_configs(comparison: Comparison, found: Plan) -> None:
    """``<variant>/experiment.toml``: each variant as it was run, but for the seed."""
    for variant in comparison.variants:
        folder = comparison.folder / variant.slug
        if variant.name not in found.chosen or not folder.is_dir():
            continue
        experiment = variant.experiment.changed(_tables(found.chosen[variant.name]))
        tables = experiment.resolved(folder)
        del tables["run"]["seed"], tables["run"]["folder"]
        (folder / "experiment.toml").write_text(write_toml(tables), encoding="utf-8")


def _targets(comparison: Comparison, full: Group | None) -> list[Target]:
    settings = comparison.compare
    return [
        _target(settings, wanted, full.name if full else "full sharing", full.records if full else ())
        for wanted in settings.all_targets
    ]


def _target(settings: CompareConfig, wanted: TargetConfig, name: str, full: Sequence[Record]) -> Target:
    """A target by what full sharing reached; one that nothing reaches if it has not been run."""
    if wanted.accuracy is not None:
        return Target(settings.metric, wanted.accuracy, settings.lower_is_better)
    if not full:
        return Target(settings.metric, math.nan, settings.lower_is_better, f"{name} has not been run")
    final = statistics.fmean(record.final(settings.metric, settings.final_over) for record in full)
    if wanted.fraction is not None:
        value, meaning = final * wanted.fraction, f"{wanted.fraction:.0%} of the final value of {name}"
    else:
        assert wanted.way is not None
        start = statistics.fmean(record.series(settings.metric)[0] for record in full)
        value = start + wanted.way * (final - start)
        meaning = f"{wanted.way:.0%} of the way of {name} from start to end"
    return Target(settings.metric, value, settings.lower_is_better, meaning.replace("%", " %"))


def _check_like_for_like(comparison: Comparison, records: Mapping[tuple[str, int], Record]) -> None:
    """All variants of a seed have the same fingerprints, as far as they do not say otherwise.

    A group that differs from the first variant, for instance by its number of nodes, is alike within itself.
    """
    for seed in comparison.compare.seeds:
        there = [variant for variant in comparison.variants if (variant.name, seed) in records]
        for variant in there[1:]:
            leader = next(other for other in there if other.group == variant.group)
            for first in dict.fromkeys([there[0].name, leader.name]):
                within = first == leader.name != there[0].name
                _check_pair(comparison.variant(first), variant, seed, records, within=within)


def _check_pair(
    first: Variant, variant: Variant, seed: int, records: Mapping[tuple[str, int], Record], *, within: bool
) -> None:
    expected = records[first.name, seed].start.fingerprints
    found = records[variant.name, seed].start.fingerprints
    for what in expected:
        allowed = what in (*first.allow_different, *variant.allow_different)
        if within and what != "codec" and what in first.allow_different and what in variant.allow_different:
            allowed = False
        if found.get(what) != expected[what] and not allowed:
            raise ConfigError(
                f"variants: {variant.name!r}, seed {seed}, {what}",
                found.get(what),
                f"{first.name!r} has {expected[what]!r}, so the two are not like for like; make them "
                f"the same, or say allow_different = [{what!r}] in the variant",
            )
