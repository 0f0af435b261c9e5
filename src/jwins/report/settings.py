"""Settings of runs: those of a variant, differences between variants, and their texts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from jwins.experiment.experiment import drop_without_effect_, rewrite_paths_
from jwins.experiment.toml import flat
from jwins.report.formatting import shown, spaced

_OF_A_RUN = {"run": ("seed", "folder", "threads", "checkpoint_every", "tensorboard"), "task": ("data",)}
"""Settings in which the runs of one variant may differ."""


def compared_settings(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment's tables without settings that may differ between the runs of a variant."""
    kept = {key: copy.copy(value) for key, value in tables.items() if key != "name"}
    for section, keys in _OF_A_RUN.items():
        if isinstance(kept.get(section), Mapping):
            kept[section] = {key: value for key, value in kept[section].items() if key not in keys}
    drop_without_effect_(kept)
    return kept


def without_folders(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment's tables with names of files, without their folders, which are private."""
    named = copy.deepcopy(dict(tables))
    rewrite_paths_(named, _file_name)
    return {key: _without_folders(value) for key, value in named.items()}


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~/")) or PureWindowsPath(value).is_absolute()):
        return _file_name(value)
    return value


def _file_name(path: str) -> str:
    return PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name


def differing_keys(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between tables."""
    flats = [flat(table) for table in tables]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if any(flat.get(key) != flats[0].get(key) for flat in flats)]


def described(table: Any) -> str:
    """Describe a table with a kind.

    >>> described({"kind": "regular", "degree": 4, "dynamic": True})
    'regular, degree 4, dynamic'
    """
    if not isinstance(table, Mapping):
        return str(table)
    kind = spaced(str(table.get("kind", table.get("name", ""))))
    rest = [
        f"{spaced(key)} {shown(value)}" if not isinstance(value, bool) else spaced(key)
        for key, value in table.items()
        if key not in ("kind", "name", "options", "partition", "data", "path", "file") and value is not False
    ]
    return ", ".join([kind, *rest])
