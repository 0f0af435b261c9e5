"""A comparison: variants of one experiment, seeds, targets and tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from jwins.compare.direction import lower_is_better
from jwins.compare.setting_paths import look_up, setting_texts, settings_slug
from jwins.compare.settings import CompareConfig, VariantTable
from jwins.compare.tuning import TuneConfig, TuningGrid
from jwins.errors import ConfigError
from jwins.experiment.error_messages import nearest
from jwins.experiment.experiment import Experiment, is_folder_name, merge_experiment
from jwins.experiment.field_types import refuse
from jwins.experiment.load import from_here, read
from jwins.experiment.plugins import FullConfig, RandomKConfig, SharingTable
from jwins.experiment.settings import Settings
from jwins.experiment.toml import parse_overrides
from jwins.report.formatting import is_percent
from jwins.run.folder import variant_folder
from jwins.validation import MISSING


class Variant(VariantTable):
    """One variant of the comparison: the keys of its table, and its experiment without seed and folder."""

    model_config = ConfigDict(extra="forbid")

    experiment: Experiment

    @property
    def slug(self) -> str:
        """Return the name of the variant's folder."""
        return variant_folder(self.name)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        seed: a seed of the comparison or of tuning.
        experiment: experiment with seed, folder and all settings.
        settings: chosen or tried settings, by TOML path.
        tuning: whether the run serves to choose a setting and is not compared itself.
        to_end: whether it is a full-length run that confirms a choice.
    """

    variant: Variant
    seed: int
    experiment: Experiment
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuning: bool = False
    to_end: bool = False

    @property
    def folder(self) -> Path:
        """Return the cell's run folder."""
        return self.experiment.folder

    @property
    def name(self) -> str:
        """Return a name for people, with variant and seed."""
        words = [self.variant.name, *setting_texts(self.settings), f"seed {self.seed}"]
        return ", ".join([*words, "to the end"] if self.to_end else words)


class Comparison(Settings):
    """Variants, seeds and settings of a comparison; :func:`load_comparison` describes the TOML form."""

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
                problem = f"has the same folder as {other!r}; choose another name"
                raise refuse(f"variants[{index}].name", variant.name, problem)
            slugs[variant.slug] = index
        self._check_names()
        for wanted in self.compare.all_targets:
            if self.full is None and wanted.accuracy is None:
                raise refuse(
                    "compare.target",
                    wanted.model_dump(exclude_none=True),
                    "refers to full sharing, but no variant has sharing.kind = 'full'; write "
                    "{ accuracy = 0.9 }, or name a variant in compare.full",
                )
            given = wanted.accuracy
            if given is not None and is_percent(self.compare.metric) and 1 < given <= 100:
                problem = f"expected a fraction of at most 1; did you mean {given / 100:g}?"
                raise refuse("compare.target", wanted.model_dump(exclude_none=True), problem)
        for index, variant in enumerate(self.variants):
            self._check_alike(index, variant)
            run = variant.experiment.run
            if run.eval_samples_early is not None and self.compare.final_over > run.eval_last:
                problem = f"only the last {run.eval_last} evaluations use all samples; raise run.eval_last"
                raise refuse("compare.final_over", self.compare.final_over, problem)
        self._check_tuning()
        return self

    def _check_names(self) -> None:
        """Check that every reference to a variant names an existing one."""
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
        """Check that every setting to try makes a valid experiment, and that no tuning seed is compared."""
        for index, variant in enumerate(self.variants):
            path = f"variants[{index}]"
            if variant.bytes_as is not None:
                if not isinstance(variant.experiment.sharing, RandomKConfig):
                    raise refuse(f"{path}.bytes_as", variant.bytes_as, "is for sharing.kind = 'random_k' only")
                if self.variant(variant.bytes_as).bytes_as is not None or variant.bytes_as == variant.name:
                    raise refuse(f"{path}.bytes_as", variant.bytes_as, "sends another variant's bytes itself")
                if variant.tune is not None:
                    keys = ", ".join(variant.tune.keys)
                    raise refuse(f"{path}.tune", keys, "cannot be tuned: it has bytes_as")
            for point in self.points(variant.tune):
                self._try(variant, point, f"{path}.tune")
        shared = self.rule.shared
        if shared is not None:
            on = self.tuned_on
            if on is None:
                raise refuse("tune.on", MISSING, "required: no variant has sharing.kind = 'full'")
            if on.tune is not None or on.bytes_as is not None:
                raise refuse("tune.on", on.name, "this variant has its own tune table; tune on another variant")
            for variant in self.variants:
                for point in self.points(shared):
                    self._try(variant, point, "tune")
        if self.is_tuned:
            for index, seed in enumerate(self.rule.seeds):
                if seed in self.compare.seeds:
                    problem = (
                        "is also a seed of the comparison, which would favour the tuned values; use another"
                    )
                    raise refuse(f"tune.seeds[{index}]", seed, problem)

    def _try(self, variant: Variant, point: Mapping[str, Any], path: str) -> None:
        try:
            variant.experiment.changed(point)
        except ConfigError as error:
            first = next(iter(point))
            one = {"key": first, "value": point[first]} if len(point) == 1 else dict(point)
            raise refuse(path, one, f"{error.path}: {error.problem}") from None

    def points(self, grid: TuningGrid | None) -> list[dict[str, Any]]:
        """Return the settings that tuning tries, by TOML path; none without a grid."""
        return [] if grid is None else grid.points(self.rule.seeds[0])

    def variant(self, name: str) -> Variant:
        """Return the variant with this name."""
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def settings(self) -> CompareConfig:
        """Return ``compare``, with the direction of the metric that the tasks declare.

        Raises:
            ConfigError: no task declares a direction, or two declare different ones.
        """
        lower = lower_is_better(self.compare, [variant.experiment for variant in self.variants])
        return self.compare.model_copy(update={"lower_is_better": lower})

    @property
    def rule(self) -> TuneConfig:
        """Return the tuning of all variants."""
        return self.tune if self.tune is not None else TuneConfig()

    @property
    def is_tuned(self) -> bool:
        """Return whether a setting is chosen by tuning runs."""
        grids = [self.rule.shared, *(variant.tune for variant in self.variants)]
        return any(len(self.points(grid)) > 1 for grid in grids)

    @property
    def tuned_on(self) -> Variant | None:
        """Return the variant on which the shared setting is tuned."""
        return self.full if self.rule.on is None else self.variant(self.rule.on)

    def full_of(self, variant: Variant) -> Variant | None:
        """Return the full sharing for a variant's savings and targets: its group's, or the comparison's."""
        for other in self.variants:
            if other.group == variant.group and _is_full(other):
                if variant.group is None and self.compare.full is not None:
                    break
                return other
        return self.full

    def reference_of(self, variant: Variant) -> Variant | None:
        """Return the variant that a variant's difference refers to."""
        if self.compare.reference is not None:
            return self.variant(self.compare.reference)
        return self.full_of(variant)

    def baseline_of(self, variant: Variant) -> Variant | None:
        """Return the variant that a variant's ratios refer to."""
        named = [self.variant(name) for name in self.compare.baselines]
        return next((other for other in named if other.group == variant.group), None)

    def _check_alike(self, index: int, variant: Variant) -> None:
        """Refuse a variant whose settings make it incomparable to the first, before anything runs."""
        first = self.variants[0]
        keys = {"wire.codec": "codec", "train.batch_size": "batches", "train.local_steps": "batches"}
        keys |= {"task.label_noise": "data", "task.feature_shift": "data", "train.balanced": "batches"}
        keys |= {"train.local_epochs": "batches", "task.partition": "partition", "nodes.count": "partition"}
        for key, like in keys.items():
            section, _, name = key.partition(".")
            mine = getattr(getattr(variant.experiment, section), name)
            other = getattr(getattr(first.experiment, section), name)
            if mine != other and like not in (*variant.allow_different, *first.allow_different):
                raise refuse(
                    f"variants[{index}].{key}",
                    mine,
                    f"{first.name!r} has {other!r}, so the two are not comparable; "
                    f"use the same, or set allow_different = [{like!r}]",
                )

    @property
    def full(self) -> Variant | None:
        """Return the variant that savings refer to."""
        if self.compare.full is not None:
            return next(variant for variant in self.variants if variant.name == self.compare.full)
        return next((variant for variant in self.variants if _is_full(variant)), None)

    @property
    def folder(self) -> Path:
        """Return the folder of the comparison."""
        return self.compare.folder if self.compare.folder is not None else Path("runs") / self.name

    def cells(self, chosen: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
        """Return the compared runs, all variants of a seed before the next seed."""
        settings = chosen or {}
        return [
            self.cell(variant, seed, settings.get(variant.name, {}))
            for seed in self.compare.seeds
            for variant in self.variants
        ]

    def cell(
        self,
        variant: Variant,
        seed: int,
        settings: Mapping[str, Any],
        *,
        tuning: bool = False,
        to_end: bool = False,
    ) -> Cell:
        """Return one run.

        Args:
            variant: a variant of the comparison.
            seed: any seed.
            settings: settings that replace those of the variant's experiment, by TOML path.
            tuning: whether it is a tuning run, which has its own folder and length.
            to_end: whether a tuning run has full length, to confirm a choice.
        """
        folder = self.folder / variant.slug
        run: dict[str, Any] = {"seed": seed}
        if tuning:
            folder = folder / "tuning" / settings_slug(settings)
            wanted = variant.experiment.run
            run["rounds"] = wanted.rounds if to_end else self.tuning_rounds(variant)
            if to_end:
                folder = folder / "to-end"
            run["eval_at"] = [at for at in wanted.eval_at if at <= run["rounds"]]
            if self.rule.eval_samples is not None:
                run |= {"eval_samples": self.rule.eval_samples, "eval_samples_early": None}
        run["folder"] = folder / f"seed-{seed}"
        changes = {"name": self.run_name(variant), "run": run}
        experiment = variant.experiment.changed(settings).changed(changes)
        return Cell(variant, seed, experiment, dict(settings), tuning, to_end)

    def run_name(self, variant: Variant) -> str:
        """Return the name of a variant's runs, which is also that of a folder."""
        name = f"{self.name}: {variant.name}".replace("/", "-")
        return name if is_folder_name(name) else variant.slug

    def tuning_rounds(self, variant: Variant) -> int:
        """Return the number of rounds of a variant's tuning runs."""
        rounds = variant.experiment.run.rounds
        return min(rounds, self.rule.rounds or rounds)

    def confirms(self, variant: Variant) -> bool:
        """Return whether the best value of shortened tuning runs is also run to the end."""
        return self.rule.confirm and self.tuning_rounds(variant) < variant.experiment.run.rounds

    def expected(self, only: Collection[str] = ()) -> tuple[int, int]:
        """Return runs and rounds of the whole comparison, as far as they are known beforehand.

        Unknown are full-length runs of second-best values, and those of fractions that match bytes.
        """
        rule, on = self.rule, self.tuned_on
        runs = rounds = 0

        def add(variant: Variant, count: int, *, tuning: bool) -> None:
            nonlocal runs, rounds
            runs += count
            rounds += count * (self.tuning_rounds(variant) if tuning else variant.experiment.run.rounds)

        def add_grid(variant: Variant, count: int) -> None:
            if count > 1:
                add(variant, count * len(rule.seeds), tuning=True)
                add(variant, len(rule.seeds) if self.confirms(variant) else 0, tuning=False)

        tried = len(self.points(rule.shared))
        shared = tried if tried > 1 else 0
        if on is not None:
            add_grid(on, shared)
        for variant in self.variants:
            if only and variant.name not in only:
                continue
            add(variant, len(self.compare.seeds), tuning=False)
            grid = len(self.points(variant.tune))
            add_grid(variant, grid)
            if self.in_sensitivity(variant) and shared and variant is not on:
                add(variant, shared - (grid > 1), tuning=True)
        return runs, rounds

    def in_sensitivity(self, variant: Variant) -> bool:
        """Return whether the variant is run at every value of the shared setting."""
        rule = self.rule
        return rule.sensitivity and (not rule.sensitivity_of or variant.name in rule.sensitivity_of)


def _is_full(variant: Variant) -> bool:
    """Return whether a variant's algorithm is full sharing, as a table or as an object."""
    sharing = variant.experiment.sharing
    if isinstance(sharing, SharingTable):
        return isinstance(sharing, FullConfig)
    from jwins.sharing import Full  # imports torch, as the object's module has done

    return type(sharing) is Full


def load_comparison(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] | None = None,
) -> Comparison:
    """Load a comparison from a TOML file, or a bundled one by name.

    ``base`` names the experiment that all variants start from. The file's own sections replace its keys, each
    variant's keys replace those, and ``overrides`` replace all of them.

    Args:
        source: file or name.
        overrides: ``key=value`` assignments. ``compare.…`` applies to the comparison, all others to every
            variant.
        seeds: seeds in place of the file's.

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
    shared = _shared_keys(tune)
    for key in shared:
        if look_up(given, key) is not MISSING:
            name = "tune.values" if len(shared) == 1 else f"tune.grid.{key}"
            problem = f"is tuned for all variants; write --set {name}=[{look_up(given, key)}]"
            raise ConfigError(key, look_up(given, key), problem)
    if seeds is not None:
        settings = {**settings, "seeds": list(seeds)}
    instead = {
        "run.seed": "a comparison has seeds of its own; use --seeds or compare.seeds",
        "run.folder": "each run of a comparison has its own folder; use compare.folder",
    }
    for key, problem in instead.items():
        if look_up(given, key) is not MISSING:
            raise ConfigError(key, look_up(given, key), problem)
    if not isinstance(entries, list):
        raise ConfigError("variants", entries, "expected an array of tables: [[variants]]")
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError("base", base, "expected the name or the file of an experiment")
        beside = from_here(source).parent / base
        start, _ = read(beside if beside.is_file() else base)
        name = tables.get("name", Path(str(source)).stem)
        tables = {**merge_experiment(start, tables), "name": name}
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
        for key in shared:
            if look_up(own, key) is not MISSING:
                problem = "is tuned for all variants ([tune]); remove it here"
                raise ConfigError(f"variants[{index}].{key}", look_up(own, key), problem)
        try:
            experiment = Experiment(**merge_experiment(merge_experiment(tables, own), given))
        except ConfigError as error:
            error.add_note(f"in variants[{index}], {table.name!r}")
            raise
        keys = {key: getattr(table, key) for key in VariantTable.model_fields}
        variants.append(Variant(experiment=experiment, **keys))
    return Comparison(name=tables["name"], variants=tuple(variants), compare=settings, tune=tune)


def _shared_keys(tune: Any) -> list[str]:
    """Return the paths of the settings that a file's ``[tune]`` tunes for all variants."""
    if not isinstance(tune, Mapping):
        return []
    with contextlib.suppress(ConfigError):  # raised again, with its place, by the comparison
        shared = TuneConfig(**tune).shared
        return [] if shared is None else list(shared.keys)
    return [tune["key"]] if isinstance(tune.get("key"), str) else []
