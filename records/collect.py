"""Copy what a comparison measured into a record: configurations, raw metrics, tables, figure and report.

    python records/collect.py RUNS records/CLAIM

RUNS is the folder of a finished comparison (``compare.folder``). The record can be compared again, and go on
with further seeds: ``jwins compare FILE --set compare.folder=records/CLAIM/runs``. Final models and checkpoints
stay behind, and so do the names of this machine's folders; what each node measured is rounded to five digits.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from jwins.experiment.toml import read_toml, write_toml
from jwins.report.page import render
from jwins.report.studies import gather

_TABLES = ("table.md", "summary.json", "comparison.png")


def _without_paths(text: str) -> str:
    """A run's ``config.toml`` without folders of this machine, none of which are part of its digest."""
    tables = read_toml(text, "config.toml")
    tables["run"]["folder"] = "RUN"
    if "data" in tables["task"]:
        tables["task"]["data"] = "DATA"
    if "file" in tables["task"]:  # from the root of the project, as far as it is in there
        tables["task"]["file"] = re.sub(r"^.*/(?=experiments/)", "", tables["task"]["file"])
    return write_toml(tables)


def _row(line: str, *, tuning: bool) -> str:
    """A row, but what each node measured has five digits; of tuning runs that and the edges are left out."""
    row = json.loads(line)
    if row["kind"] == "eval":
        row["per_node"] = {
            name: [value if value is None else float(f"{value:.5g}") for value in values]
            for name, values in row["per_node"].items()
            if not tuning
        }
    if row["kind"] == "end" and tuning:
        row["traffic"] = []
    return json.dumps(row, separators=(",", ":")) + "\n"


def collect(source: Path, record: Path) -> list[Path]:
    """Copy the runs below ``source`` to ``record / "runs"`` and make the report; returns the compared runs."""
    if not (source / "summary.json").is_file():
        sys.exit(f"{source}: no summary.json; run jwins compare to the end, or with --report-only")
    runs = record / "runs"
    compared = []
    for log in sorted(source.rglob("metrics.jsonl")):
        run = log.parent
        place = runs / run.relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        tuning = bool({"tuning", "earlier"} & set(run.relative_to(source).parts))
        rows = (_row(line, tuning=tuning) for line in log.read_text(encoding="utf-8").splitlines())
        (place / "metrics.jsonl").write_text("".join(rows), encoding="utf-8")
        config = (run / "config.toml").read_text(encoding="utf-8")
        (place / "config.toml").write_text(_without_paths(config), encoding="utf-8")
        if not tuning:
            compared.append(place)
            if (run / "partition.json").is_file():
                shutil.copyfile(run / "partition.json", place / "partition.json")
    for name in _TABLES:
        shutil.copyfile(source / name, record / name)
    page, _ = render(gather([source]))
    for folder in (source, Path.cwd(), Path.home()):
        if str(folder) in page:
            sys.exit(f"the report names a folder of this machine: {folder}")
    (record / "report.html").write_text(page, encoding="utf-8")
    return compared


def main() -> None:
    """Collect and say what is there."""
    parser = argparse.ArgumentParser(description="Copy what a comparison measured into a record.")
    parser.add_argument("source", type=Path)
    parser.add_argument("record", type=Path)
    given = parser.parse_args()
    compared = collect(given.source.resolve(), given.record.resolve())
    size = sum(path.stat().st_size for path in given.record.rglob("*") if path.is_file())
    print(f"{given.record}: {len(compared)} runs, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
