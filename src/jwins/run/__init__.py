"""Run experiments in run folders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jwins.run.assembly import AssembledRun, build
    from jwins.run.builders import (
        build_partition,
        build_sharing,
        build_task,
        build_topology,
        evaluation_rounds,
        own_test_samples,
        partition_counts,
        raw_bytes_per_node,
    )
    from jwins.run.folder import FolderState, check_folder, folder_state, locked
    from jwins.run.result import Result
    from jwins.run.run import Ray, simulate

__all__ = [
    "FolderState",
    "AssembledRun",
    "Ray",
    "Result",
    "build",
    "build_partition",
    "build_sharing",
    "build_task",
    "build_topology",
    "check_folder",
    "evaluation_rounds",
    "folder_state",
    "locked",
    "own_test_samples",
    "partition_counts",
    "raw_bytes_per_node",
    "simulate",
]

_HOMES = {
    "FolderState": "jwins.run.folder",
    "AssembledRun": "jwins.run.assembly",
    "Ray": "jwins.run.run",
    "Result": "jwins.run.result",
    "build": "jwins.run.assembly",
    "build_partition": "jwins.run.builders",
    "build_sharing": "jwins.run.builders",
    "build_task": "jwins.run.builders",
    "build_topology": "jwins.run.builders",
    "check_folder": "jwins.run.folder",
    "evaluation_rounds": "jwins.run.builders",
    "folder_state": "jwins.run.folder",
    "locked": "jwins.run.folder",
    "own_test_samples": "jwins.run.builders",
    "partition_counts": "jwins.run.builders",
    "raw_bytes_per_node": "jwins.run.builders",
    "simulate": "jwins.run.run",
}


def __getattr__(name: str) -> object:
    """Import names when they are first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
