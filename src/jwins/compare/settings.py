"""Settings in a comparison's TOML file, except for the table ``[tune]`` (tuning.py)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from jwins.compare.setting_paths import Seed
from jwins.compare.tuning import TuningGrid
from jwins.experiment.field_types import TomlPath, refuse
from jwins.experiment.settings import Settings
from jwins.validation import Within

FingerprintKind = Literal["model", "partition", "batches", "evaluation", "codec", "task", "data"]
"""Aspects in which variants may differ if allowed."""


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
