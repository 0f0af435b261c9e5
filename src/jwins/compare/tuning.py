"""The table ``[tune]``, and the order in which its values are tried."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from jwins.compare.setting_paths import Seed, SettingPath, setting_text
from jwins.experiment.field_types import refuse
from jwins.experiment.settings import Settings
from jwins.experiment.toml import flat
from jwins.validation import MISSING, Within


def _repeat(values: Sequence[Any]) -> int | None:
    """Return the index of the first value that is in the list already."""
    texts = [setting_text(value) for value in values]
    return next((index for index, text in enumerate(texts) if text in texts[:index]), None)


def _dotted(grid: Any) -> Any:
    """Return ``{"train": {"lr": [1]}}``, which TOML makes of ``train.lr = [1]``, as ``{"train.lr": [1]}``."""
    return flat(grid) if isinstance(grid, Mapping) else grid


Values = Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]


class _Tried(Settings):
    """Values to try, for one setting or for several."""

    key: SettingPath | None = Field(default=None, description='path of the setting, such as "sharing.gamma"')
    values: Annotated[tuple[Any, ...], Field(strict=False)] = Field(
        default=(), description="values to try for key, in order"
    )
    grid: Annotated[dict[SettingPath, Values], BeforeValidator(_dotted)] = Field(
        default_factory=dict,
        description="values by path of several settings, in place of key; all combinations",
    )
    budget: Annotated[int, Within("a whole number", 1)] | None = Field(
        default=None, description="number of combinations of the grid to try, drawn at random; left out: all"
    )

    def _different(self) -> Self:
        if self.grid and self.key is not None:
            problem = f"key = {self.key!r} is given, too; move key and values into grid, or remove grid"
            raise refuse("grid", list(self.grid), problem)
        if self.budget is not None and not self.grid:
            raise refuse("budget", self.budget, "needs a grid; add one, or remove budget")
        for name, tried in self.grid.items():
            if _repeat(tried) is not None:
                raise refuse(f"grid.{name}", list(tried), "has a value twice; remove one")
        if (index := _repeat(self.values)) is not None:
            raise refuse(f"values[{index}]", self.values[index], "is in the list already")
        return self


class TuningGrid(_Tried):
    """Values to try for one setting, or for several at once; the best are used."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.grid and (self.key is None or not self.values):
            missing = "key" if self.key is None else "values"
            raise refuse(missing, MISSING, "required: the setting that is tuned and its values, or a grid")
        return self._different()

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


class TuneConfig(_Tried):
    """The tuning rule, and settings that are tuned on one variant for all variants."""

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
    on: str | None = Field(
        default=None,
        description="variant on which these are tuned, by final value; left out: the one of compare.full",
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
        return self._different()

    @property
    def shared(self) -> TuningGrid | None:
        """Return the settings that are tuned for all variants; None without any."""
        if self.grid:
            return TuningGrid(grid=self.grid, budget=self.budget)
        return None if self.key is None else TuningGrid(key=self.key, values=self.values)
