"""Output of the benchmarks: the machine, aligned tables, and whether a number reaches its goal."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = ("jwins", "torch", "numpy", "PyWavelets", "pcodec")


def machine() -> str:
    """One line: processor, cores this process may use, system, versions."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        processor = next(names, processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return (
        f"{processor}, {cores} cores, {platform.system()} {platform.machine()}; "
        f"Python {platform.python_version()}, {versions}"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text in aligned columns: the first to the left, all others to the right.

    >>> print(table(["codec", "bits"], [["pco", 4.71], ["elias", 5.7]]))
    codec  bits
    pco    4.71
    elias   5.7
    """
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def verdict(value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """``reached`` or ``missed``, with what was asked for.

    >>> verdict(1.02, at_most=1.25), verdict(2.0, at_least=2.5)
    ('reached (at most 1.25)', 'missed (at least 2.5)')
    """
    asked = [f"at least {at_least:g}"] if at_least is not None else []
    asked += [f"at most {at_most:g}"] if at_most is not None else []
    good = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return f"{'reached' if good else 'missed'} ({', '.join(asked)})"
