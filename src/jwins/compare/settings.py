"""Tables of a comparison's file, and settings by their TOML paths."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from jwins.experiment.field_types import TomlPath, refuse
from jwins.experiment.settings import Settings
from jwins.experiment.toml import flat, toml_text
from jwins.validation import MISSING, Within

FingerprintKind = Literal["model", "partition", "batches", "evaluation", "codec", "task", "data"]
"""Aspects in which variants may differ if allowed."""

Seed = Annotated[int, Within("a signed 64-bit number", -(2**63), 2**63 - 1)]
SettingPath = Annotated[str, Field(pattern=r"^[a-z_]+(\.[a-z_]+)+$")]


class TargetConfig(Settings):
    """The metric value to reach; bytes, rounds and seconds are counted until then. Give one of the keys."""

    accuracy: float | None = Field(default=None, description="value of the metric to reach")
    fraction: Annotated[float, Within("a fraction", 0, open_low=True)] | None = Field(
        default=None, description="fraction of the final value of full sharing to reach"
    )
    way: Annotated[float, Within("a fraction", 0, 1, open_low=True)] | None = Field(
        default=None,
        description="fraction to cover of the change from the first to the final value of full sharing",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [key for key in ("accuracy", "fraction", "way") if getattr(self, key) is not None]
        if len(given) != 1:
            raise refuse("", self.model_dump(exclude_none=True), "expected one of accuracy, fraction, way")
        return self


class CompareConfig(Settings):
    """Settings of a comparison."""

    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = Field(
        default=(1,), description="seeds; each variant runs once per seed"
    )
    metric: str = Field(default="accuracy", description="metric of the task that is compared")
    also: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="additional metrics whose final values are reported"
    )
    lower_is_better: bool | None = Field(
        default=None, description="for a metric whose direction the task does not declare"
    )
    target: TargetConfig = TargetConfig(fraction=0.95)
    targets: Annotated[tuple[TargetConfig, ...], Field(strict=False)] = Field(
        default=(),
        description="several targets, in a table of their own; without target, the first is the target",
    )
    final_over: Annotated[int, Within("a whole number", 1)] = Field(
        default=1, description="number of last evaluations whose mean is the final value"
    )
    full: str | None = Field(
        default=None,
        description="variant from which savings are counted; left out: the first variant with full sharing",
    )
    reference: str | None = Field(
        default=None, description="variant from which differences are counted; left out: the same as full"
    )
    baselines: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(),
        description="variants that are the denominator of ratios at the targets, at most one per group",
    )
    folder: TomlPath | None = Field(default=None, description="folder of the comparison; left out: runs/<name>")

    @property
    def all_targets(self) -> tuple[TargetConfig, ...]:
        """Return the targets; the main table has the first one."""
        if not self.targets:
            if self.lower_is_better and "target" not in self.model_fields_set:
                return (TargetConfig(way=0.95),)  # 0.95 times a final loss is below full sharing's final loss
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
    texts = [setting_text(value) for value in values]
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise refuse(f"values[{index}]", values[index], "is in the list already")


def _dotted(grid: Any) -> Any:
    """Return ``{"train": {"lr": [1]}}``, which TOML makes of ``train.lr = [1]``, as ``{"train.lr": [1]}``."""
    return flat(grid) if isinstance(grid, Mapping) else grid


Values = Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]
Grid = Annotated[dict[SettingPath, Values], BeforeValidator(_dotted)]
Budget = Annotated[int, Within("a whole number", 1)] | None


def _check_grid(grid: Mapping[str, tuple[Any, ...]], key: str | None, budget: int | None) -> None:
    if grid and key is not None:
        raise refuse(
            "grid", list(grid), f"key = {key!r} is tuned by key and values; move it into grid, or remove grid"
        )
    if budget is not None and not grid:
        raise refuse("budget", budget, "needs a grid; add one, or remove budget")
    for name, values in grid.items():
        texts = [setting_text(value) for value in values]
        if len(set(texts)) < len(texts):
            raise refuse(f"grid.{name}", list(values), "has a value twice; remove one")


class TuningGrid(Settings):
    """Values to try for one setting, or for several at once; the best are used."""

    key: SettingPath | None = Field(default=None, description='path of the setting, such as "sharing.gamma"')
    values: Annotated[tuple[Any, ...], Field(strict=False)] = Field(
        default=(), description="values to try for key, in order"
    )
    grid: Grid = Field(
        default_factory=dict,
        description="values by path of several settings, in place of key; all combinations",
    )
    budget: Budget = Field(
        default=None, description="number of combinations of the grid to try, drawn at random; left out: all"
    )

    @model_validator(mode="after")
    def _different(self) -> Self:
        if not self.grid and (self.key is None or not self.values):
            missing = "key" if self.key is None else "values"
            raise refuse(missing, MISSING, "required: the setting that is tuned and its values, or a grid")
        _check_grid(self.grid, self.key, self.budget)
        _check_values(self.values)
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the paths of the settings that are tuned."""
        return tuple(self.grid) if self.key is None else (self.key,)

    def points(self, seed: int) -> list[dict[str, Any]]:
        """Return the combinations to try, in order: all, or as many as the budget has, drawn from the seed."""
        if self.key is not None:
            return [{self.key: value} for value in self.values]
        every = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        if self.budget is None or self.budget >= len(every):
            return every
        from jwins.rng import stream

        drawn = stream(seed, "tuning grid").choice(len(every), self.budget, replace=False)
        return [every[number] for number in sorted(drawn.tolist())]


class TuneConfig(Settings):
    """The tuning rule, and one setting that is tuned on one variant for all variants."""

    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)] = Field(
        default=(101,), description="seeds of tuning runs; none may be a seed of the comparison"
    )
    rounds: Annotated[int, Within("a whole number", 1)] | None = Field(
        default=None, description="number of rounds of tuning runs; left out: as in the comparison"
    )
    confirm: bool = Field(
        default=True,
        description="where tuning runs are shorter: also run the best value at full length, then the next best "
        "if that leads, until the leader has run at full length",
    )
    eval_samples: Annotated[int, Within("a number of samples", 1)] | None = Field(
        default=None, description="number of test samples of tuning runs; left out: as in the comparison"
    )
    by: Literal["final", "bytes", "seconds"] = Field(
        default="final",
        description="criterion; final: best final value; bytes, seconds: fewest to the first target",
    )
    key: SettingPath | None = Field(
        default=None, description='path of a setting that all variants share, such as "train.optimizer.lr"'
    )
    values: Annotated[tuple[Any, ...], Field(strict=False)] = Field(
        default=(), description="values to try for key, in order; the best final value wins"
    )
    grid: Grid = Field(
        default_factory=dict,
        description="values by path of several settings that all variants share, in place of key",
    )
    budget: Budget = Field(
        default=None, description="number of combinations of the grid to try, drawn at random; left out: all"
    )
    on: str | None = Field(
        default=None,
        description="variant on which key is tuned; left out: the variant from which savings are counted",
    )
    sensitivity: bool = Field(
        default=False, description="also run the variants with every value of key, with the first of the seeds"
    )
    sensitivity_of: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="variants that sensitivity runs; left out: all"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.key is None) != (not self.values):
            missing = "key" if self.key is None else "values"
            raise refuse(missing, MISSING, "required: the setting that is tuned and its values belong together")
        if self.sensitivity and self.key is None:
            raise refuse("sensitivity", True, "needs key and values: the setting to vary")
        _check_grid(self.grid, self.key, self.budget)
        _check_values(self.values)
        return self

    @property
    def shared(self) -> TuningGrid | None:
        """Return the settings that are tuned for all variants; None without any."""
        if self.grid:
            return TuningGrid(grid=self.grid, budget=self.budget)
        return None if self.key is None else TuningGrid(key=self.key, values=self.values)


class VariantTable(Settings):
    """An entry of ``[[variants]]``; all further keys are settings of the experiment."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="name in tables and figures", min_length=1)
    allow_different: Annotated[tuple[FingerprintKind, ...], Field(strict=False)] = Field(
        default=(), description="aspects in which this variant may differ from the others"
    )
    group: str | None = Field(
        default=None,
        description="group name; variants of a group share a baseline, and full sharing if one has it",
    )
    tune: TuningGrid | None = None
    bytes_as: str | None = Field(
        default=None,
        description="for random_k: variant whose bytes it sends; the fraction is chosen accordingly",
    )


# --- Settings by path ---------------------------------------------------------------------------------------


def setting_texts(settings: Mapping[str, Any]) -> list[str]:
    """Return texts such as ``["lr = 0.1", "gamma = 0.4"]``."""
    return [f"{key.rpartition('.')[2]} = {setting_text(value)}" for key, value in settings.items()]


def setting_text(value: Any) -> str:
    """Return a setting's value as a text for people."""
    return toml_text(value).strip('"') if value is not None else "none"


def settings_slug(settings: Mapping[str, Any]) -> str:
    """Return the name of a folder for settings."""
    return re.sub(r"[^A-Za-z0-9._=,-]+", "-", ",".join(setting_texts(settings)).replace(" = ", "="))


def look_up(tables: Mapping[str, Any], key: str) -> Any:
    """Return the value at a TOML path, MISSING without one."""
    place: Any = tables
    for step in key.split("."):
        place = place.get(step, MISSING) if isinstance(place, Mapping) else MISSING
    return place
