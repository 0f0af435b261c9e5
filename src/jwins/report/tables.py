"""Tables as text: Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jwins.report.words import (
    NEVER,
    describe_target,
    difference_text,
    is_percent,
    of_seeds,
    share,
    size,
    spread_text,
)
from jwins.results.groups import Group, Reach, Target, deviation, difference
from jwins.results.lines import Line
from jwins.runfiles.atomic import write_atomically

__all__ = ["Table", "columns", "head_and_rows", "metrics_table", "reach_table", "save_tables", "table_cells"]


@dataclass(frozen=True)
class Table:
    """A table beside the main one.

    Attributes:
        name: of its CSV file, and of its entry in ``summary.json``.
        title: in words.
        head: headings.
        rows: as text.
        data: the same in full precision, one flat dict per row.
        notes: sentences below it.
    """

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    data: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def reach_table(reached: Sequence[Reach], target: Target) -> Table:
    """Bytes, rounds and seconds to several targets, and their ratios to a baseline's."""
    percent = is_percent(target)
    head = ["variant", f"{target.metric} to reach", "reached", "bytes/node", "rounds", "seconds"]
    head += ["bytes / baseline's", "seconds / baseline's", "baseline"]
    rows = []
    for row in reached:
        value = f"{row.target * 100:.1f} %" if percent else f"{row.target:.4g}"
        some = f" ({row.pairs})" if 0 < row.pairs < row.seeds else ""
        rows.append(
            [
                row.variant,
                f"{value} ({row.meaning})" if row.meaning else value,
                f"{row.reached}/{row.seeds}" if row.reached else "never",
                NEVER if row.bytes_per_node is None else size(row.bytes_per_node),
                NEVER if row.rounds is None else f"{row.rounds:.0f}",
                NEVER if row.seconds is None else f"{row.seconds:.1f}",
                NEVER if row.bytes_ratio is None else f"{row.bytes_ratio:.2f}{some}",
                NEVER if row.seconds_ratio is None else f"{row.seconds_ratio:.2f}{some}",
                row.baseline or NEVER,
            ]
        )
    return Table("targets", "To each target", head, rows, [asdict(row) for row in reached])


def metrics_table(
    groups: Sequence[tuple[Group, Group | None]], metrics: Sequence[str], final_over: int = 1
) -> Table:
    """Final values of several metrics, and their differences to a reference.

    Args:
        groups: each variant's runs, and those of its reference.
        metrics: names.
        final_over: how many last evaluations make up the final value.
    """
    rows, data = [], []
    for metric in metrics:
        for group, reference in groups:
            counted = group.counted.records
            finals = [record.final(metric, final_over) for record in counted]
            sd = deviation(finals)
            apart = None if reference is None else difference(group, reference, metric, final_over)
            row = {
                "metric": metric,
                "variant": group.name,
                "seeds": len(group.records),
                "counted": sum(not record.diverged for record in group.records),
                "final": statistics.fmean(finals),
                "final_sd": sd,
                "reference": None if reference is None else reference.name,
                "difference": None if apart is None else apart.mean,
                "difference_half": None if apart is None else apart.half_width,
            }
            percent = is_percent(Target(metric, 0.0))
            data.append(row)
            rows.append(
                [
                    metric,
                    group.name,
                    spread_text(statistics.fmean(finals), sd, percent=percent)
                    + of_seeds(len(counted), len(group.records)),
                    NEVER if apart is None else difference_text(apart.mean, apart.half_width, percent=percent),
                ]
            )
    return Table("metrics", "Further metrics", ["metric", "variant", "final", "difference [95 %]"], rows, data)


def columns(target: Target, reference: str | None = None) -> list[str]:
    """Headings of the table.

    Args:
        target: names the metric.
        reference: what differences are stated to, if it is the same for all lines.
    """
    return [
        "variant",
        f"final {target.metric}",
        "bytes/node",
        "saving vs raw",
        "saving vs codec",
        "bytes to target",
        "rounds",
        "seconds",
        f"difference{f' to {reference}' if reference else ''} [95 %]",
        "other / training",
        "status",
    ]


def table_cells(line: Line, *, percent: bool) -> list[str]:
    """One line of the table as text.

    Args:
        line: what to show.
        percent: whether the metric is a fraction shown in percent.
    """
    some = of_seeds(line.reached, line.seeds)
    return [
        line.variant + (f" ({line.tuned})" if line.tuned else ""),
        spread_text(line.final, line.final_sd, percent=percent) + of_seeds(line.counted, line.seeds),
        size(line.bytes_per_node),
        share(line.saving_raw),
        NEVER if line.saving_codec is None else share(line.saving_codec),
        NEVER if line.bytes_to_target is None else size(line.bytes_to_target) + some,
        NEVER if line.rounds_to_target is None else f"{line.rounds_to_target:.0f}{some}",
        NEVER if line.seconds_to_target is None else f"{line.seconds_to_target:.1f}{some}",
        NEVER
        if line.difference is None
        else difference_text(line.difference, line.difference_half, percent=percent),
        NEVER if line.overhead is None else share(line.overhead),
        line.status,
    ]


def head_and_rows(table: Sequence[Line], target: Target) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the main table as text, as the terminal, Markdown and LaTeX show them.

    Args:
        table: the lines.
        target: what was timed to.
    """
    percent = is_percent(target)
    return columns(target, common_reference(table)), [table_cells(line, percent=percent) for line in table]


def markdown(table: Sequence[Line], target: Target) -> str:
    """The table in Markdown, with a sentence on the target, or on each group's."""
    return "\n".join([*_markdown_rows(*head_and_rows(table, target)), "", *targets_of(table, target), ""])


def targets_of(table: Sequence[Line], target: Target) -> list[str]:
    """The target in a sentence; one for each if variants have different ones."""
    said: dict[str, list[str]] = {}
    for line in table:
        own = describe_target(Target(target.metric, line.target, target.lower_is_better, line.meaning))
        said.setdefault(own, []).append(line.variant)
    if len(said) < 2:
        return [describe_target(target)]
    return [f"{own[:-1]}: for {', '.join(names)}." for own, names in said.items()]


def common_reference(table: Sequence[Line]) -> str | None:
    """What all lines state their difference to, None if that is not the same."""
    names = {line.reference for line in table}
    return names.pop() if len(names) == 1 else None


def _markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    text = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] + ['---:'] * (len(head) - 2) + ['---'])}|"]
    return text + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a paper: a ``tabular`` with the rules of the package booktabs.

    Args:
        head: headings of the columns; the first column is text, the others numbers.
        rows: as many cells each.
    """
    lines = [" & ".join(map(_latex_text, row)) + r" \\" for row in (head, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    columns = "l" + "r" * (len(head) - 1)
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}", ""])


_LATEX = {
    "\\": r"\textbackslash{}",
    **{symbol: f"\\{symbol}" for symbol in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "—": "---",
}


def _latex_text(text: str) -> str:
    """A cell with what LaTeX takes for commands escaped, and hyphens before numbers as minus signs.

    >>> _latex_text("-1.2 [-3.2, +0.8], 20 %, lr_a")
    '$-$1.2 [$-$3.2, +0.8], 20 \\\\%, lr\\\\_a'
    """
    escaped = "".join(_LATEX.get(symbol, symbol) for symbol in text)
    escaped = re.sub(r"(?<![\w.\]])-(?=\d)", "$-$", escaped)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped  # a line break takes it for its argument


def save_tables(
    folder: Path,
    table: Sequence[Line],
    target: Target,
    about: Mapping[str, Any],
    further: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write ``summary.json``, all tables as ``table.md`` and ``table.tex``, each as a CSV file.

    Args:
        folder: an existing folder.
        table: the lines.
        target: what was timed to.
        about: further entries of ``summary.json``.
        further: tables below the main one.
        notes: sentences below the main table.
    """
    text = markdown(table, target) if table else ""
    tabulars = [latex(*head_and_rows(table, target))] if table else []
    text += "".join(f"{note}\n" for note in notes)
    for other in further:
        text += "\n".join(["", f"## {other.title}", "", *_markdown_rows(other.head, other.rows), ""])
        text += "".join(f"\n{note}\n" for note in other.notes)
        tabulars.append(f"% {other.title}\n{latex(other.head, other.rows)}")
        _write_csv(folder / f"{other.name}.csv", other.data)
    write_atomically(folder / "table.md", text.encode())
    write_atomically(folder / "table.tex", "\n".join(tabulars).encode())
    rows = [asdict(line) for line in table]
    _write_csv(folder / "table.csv", rows)
    summary = {
        **about,
        "notes": list(notes),
        "target": _finite_row(asdict(target)),
        "table": [_finite_row(row) for row in rows],
        **{other.name: [_finite_row(row) for row in other.data] for other in further},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "summary.json", (text + "\n").encode())


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
    writer.writerows([["" if value is None else value for value in row.values()] for row in rows])
    write_atomically(path, buffer.getvalue().encode())


def _finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) for name, value in row.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
