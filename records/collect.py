"""Collect what a comparison measured into a record: raw metrics and configurations, tables and figure.

    python records/collect.py RUNS records/CLAIM

RUNS is the folder of a finished comparison (``compare.folder``). The record then has three files:

- ``runs.tar.xz``: configuration, raw metrics, partition and traffic of each run, and the comparison's
  ``summary.json``. ``jwins report`` reads it as it is, and so does
  ``jwins compare FILE --set compare.folder=records/CLAIM/runs.tar.xz --report-only``. Unpacked, it is a
  comparison's folder and can go on with further seeds.
- ``comparison.png``.
- ``README.md``, to be written by hand; its section "Tables", which is the last one, is replaced.

Final models and checkpoints stay behind, and so do the names of this machine's folders; measurements of single
nodes are rounded to five digits.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from PIL import Image

from jwins.experiment.toml import read_toml, write_toml
from jwins.run_folder import archive

_HEADING = "## Tables\n"


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
    """A row with five digits for each node's measurements; of tuning runs, without nodes and edges."""
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


def _run_files(run: Path, *, tuning: bool) -> dict[str, bytes]:
    """The files of a run that a record keeps, by name."""
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    config = (run / "config.toml").read_text(encoding="utf-8")
    files = {
        "metrics.jsonl": "".join(_row(line, tuning=tuning) for line in rows).encode(),
        "config.toml": _without_paths(config).encode(),
    }
    also = () if tuning else ("partition.json", "traffic.csv")
    return files | {name: (run / name).read_bytes() for name in also if (run / name).is_file()}


def _save_readme(record: Path, tables: str) -> None:
    """Put the tables at the end of the record's page; begin one if there is none."""
    page = record / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# {record.name}\n\n![](comparison.png)\n\n"
    tables = tables.replace("\n## ", "\n### ")
    page.write_text(f"{text.partition(_HEADING)[0]}{_HEADING}\n{tables}", encoding="utf-8")


def _save_picture(source: Path, target: Path) -> None:
    """Save a figure with 64 colours, which takes a quarter of the bytes."""
    picture = Image.open(source).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(target, optimize=True)


def collect(source: Path, record: Path) -> int:
    """Write the record of the comparison in ``source``; returns how many runs were compared."""
    if not (source / "summary.json").is_file():
        sys.exit(f"{source}: no summary.json; run jwins compare to the end, or with --report-only")
    files = {"summary.json": (source / "summary.json").read_bytes()}
    compared = 0
    for log in sorted(source.rglob("metrics.jsonl")):
        place = log.parent.relative_to(source)
        tuning = bool({"tuning", "earlier"} & set(place.parts))
        compared += not tuning
        run = _run_files(log.parent, tuning=tuning)
        files |= {f"{place.as_posix()}/{name}": content for name, content in run.items()}
    record.mkdir(parents=True, exist_ok=True)
    archive.write(record / archive.NAME, files)
    _save_readme(record, (source / "table.md").read_text(encoding="utf-8"))
    _save_picture(source / "comparison.png", record / "comparison.png")
    return compared


def main() -> None:
    """Collect and say how much it is."""
    parser = argparse.ArgumentParser(description="Collect what a comparison measured into a record.")
    parser.add_argument("source", type=Path)
    parser.add_argument("record", type=Path)
    given = parser.parse_args()
    compared = collect(given.source, given.record)
    size = sum(path.stat().st_size for path in given.record.rglob("*") if path.is_file())
    print(f"{given.record}: {compared} runs, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
