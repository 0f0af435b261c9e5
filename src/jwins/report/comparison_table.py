"""Tables, written as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jwins.report.formatting import (
    NEVER,
    describe_target,
    difference_text,
    final_text,
    is_percent,
    of_seeds,
    share,
    size,
    spaced,
    spread_text,
)
from jwins.report.seed_groups import Group, Target, TargetOutcome
from jwins.report.summary_rows import SummaryRow, summary_row
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.record import ended_well


class TableCell(str):
    """Text of a cell, with its looks in the page.

    Attributes:
        kind: a class of the style sheet: ``bad`` or ``code``.
        tip: text for a pointer that rests on it.
    """

    __slots__ = ("kind", "tip")
    kind: str
    tip: str

    def __new__(cls, text: str, *, kind: str = "", tip: str = "") -> TableCell:
        """Make a cell."""
        cell = super().__new__(cls, text)
        cell.kind, cell.tip = kind, tip
        return cell


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: name of its CSV file and of its entry in ``summary.json``.
        rows: texts; a :class:`TableCell` has looks of its own in the page.
        data: the rows in full precision, one flat dict each.
        notes: sentences below the table.
    """

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    data: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- The main table ---------------------------------------------------------------------------------------


_HEADINGS = (
    "variant",
    "final {metric}",
    "bytes/node",
    "saving vs raw",
    "saving vs codec",
    "bytes to target",
    "rounds",
    "seconds",
    "difference{to} [95 %]",
    "other / training",
    "bits/parameter, step and link (node)",
    "worst 10 % of nodes",
    "status",
)


def table_cells(line: SummaryRow, *, percent: bool, reference: SummaryRow | None = None) -> list[str]:
    """Return the texts below ``_HEADINGS``; the difference agrees with both final values as shown."""

    def to_target(value: float | None, text: Callable[[float], str]) -> str:
        return NEVER if value is None else text(value) + of_seeds(line.reached, line.seeds)

    worst = NEVER if line.worst is None else final_text(line.worst, percent=percent)
    if line.worst is not None and line.node_sd is not None:
        worst += f" (sd {final_text(line.node_sd, percent=percent, unit=False)} over nodes)"
    link, whole = line.bits_per_link, line.bits_per_node
    bits = NEVER if link is None or whole is None else f"{link:.3g} ({whole:.3g})"
    sent = [
        size(line.bytes_per_node),
        share(line.saving_raw),
        NEVER if line.saving_codec is None else share(line.saving_codec),
    ]
    ended = line.counted > 0  # else its bytes are those of runs that ended early
    return [
        line.variant + (f" ({line.tuned})" if line.tuned else ""),
        _final(line, percent=percent),
        *(sent if ended else [NEVER] * len(sent)),
        to_target(line.bytes_to_target, size),
        to_target(line.rounds_to_target, lambda value: f"{value:.0f}"),
        to_target(line.seconds_to_target, lambda value: f"{value:.1f}"),
        _difference(line, reference, percent=percent),
        NEVER if line.overhead is None else share(line.overhead),
        bits if ended else NEVER,
        worst,
        TableCell(line.status, kind="" if ended_well(line.status) else "bad"),
    ]


def _final(line: SummaryRow, *, percent: bool) -> str:
    return spread_text(line.final, line.final_sd, percent=percent) + of_seeds(line.counted, line.seeds)


def _difference(line: SummaryRow, reference: SummaryRow | None, *, percent: bool) -> str:
    if line.difference is None:
        return NEVER
    stated = shown_difference(line, reference, percent=percent)
    text = difference_text(line.difference, line.difference_half, percent=percent, stated=stated)
    return text if reference is None or of_all_seeds(line, reference) else f"{text} ({line.difference_seeds})"


def of_all_seeds(line: SummaryRow, reference: SummaryRow) -> bool:
    """Return whether a difference is over the same seeds as the final values of both variants."""
    return line.difference_seeds == line.counted == reference.counted


def shown_difference(line: SummaryRow, reference: SummaryRow | None, *, percent: bool) -> float | None:
    """Return the difference of two final values as tables show them, so that it agrees with them.

    Returns:
        The difference, or None if the final values are means over other seeds.
    """
    if reference is None or not of_all_seeds(line, reference):
        return None
    if not math.isfinite(line.final - reference.final):
        return None
    scale = 100.0 if percent else 1.0
    own, other = (float(final_text(at.final, percent=percent, unit=False)) for at in (line, reference))
    return (own - other) / scale


def head_and_rows(table: Sequence[SummaryRow], target: Target) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the main table."""
    common, by_name = common_reference(table), {line.variant: line for line in table}
    head = [h.format(metric=target.metric, to=f" to {common}" if common else "") for h in _HEADINGS]
    percent = is_percent(target.metric)
    rows = [table_cells(line, percent=percent, reference=by_name.get(line.reference or "")) for line in table]
    if any(line.epsilon is not None for line in table):
        head.insert(-1, "epsilon")
        for line, row in zip(table, rows, strict=True):
            row.insert(-1, NEVER if line.epsilon is None else f"{line.epsilon:.2f}")
    return head, rows


def page_table(table: Sequence[SummaryRow], target: Target) -> Table:
    """Return the main table for the page, without empty columns and real time, which has its own."""
    head, rows = head_and_rows(table, target)
    real = _HEADINGS.index("other / training")
    used = [i for i in range(len(head)) if i != real and any(row[i] != NEVER for row in rows)]
    title = f"Final {spaced(target.metric)}, bytes and savings"
    return Table("table", title, [head[i] for i in used], [[row[i] for i in used] for row in rows])


def targets_of(table: Sequence[SummaryRow], target: Target) -> list[str]:
    """Return one sentence for each distinct target."""
    variants_of: dict[str, list[str]] = {}
    for line in table:
        own = describe_target(Target(target.metric, line.target, target.lower_is_better, line.meaning))
        variants_of.setdefault(own, []).append(line.variant)
    if len(variants_of) < 2:
        return [describe_target(target)]
    return [f"{own[:-1]}: for {', '.join(names)}." for own, names in variants_of.items()]


def common_reference(table: Sequence[SummaryRow]) -> str | None:
    """Return the common baseline of all lines, None if there is none."""
    names = {line.reference for line in table}
    return names.pop() if len(names) == 1 else None


# --- Tables beside it -------------------------------------------------------------------------------------


def target_table(reached: Sequence[TargetOutcome], target: Target) -> Table:
    """Return the table of bytes, rounds and seconds to several targets, with ratios to a baseline's."""
    percent = is_percent(target.metric)
    head = ["variant", f"{target.metric} to reach", "reached", "bytes/node", "rounds", "seconds"]
    head += ["bytes / baseline's [95 %]", "seconds / baseline's [95 %]", "baseline"]
    rows: list[list[str]] = []
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
                _ratio_text(row.bytes_ratio, row.bytes_interval) + some,
                _ratio_text(row.seconds_ratio, row.seconds_interval) + some,
                row.baseline or NEVER,
            ]
        )
    return Table("targets", "To each target", head, rows, [asdict(row) for row in reached])


def _ratio_text(ratio: float | None, interval: tuple[float, float] | None) -> str:
    if ratio is None:
        return NEVER
    return f"{ratio:.2f}" if interval is None else f"{ratio:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


_FINALS = ("variant", "seeds", "counted", "final", "final_sd", "reference", "difference", "difference_half")
"""Fields of a row of the main table that the table of further metrics has, too."""


def metrics_table(
    groups: Sequence[tuple[Group, Group | None]], metrics: Sequence[str], final_over: int = 1
) -> Table:
    """Return the table of final values of several metrics, with differences to a reference."""
    rows: list[list[str]] = []
    data: list[dict[str, Any]] = []
    for metric in metrics:
        target = Target(metric, math.nan)
        for group, reference in groups:
            line = summary_row(group, target, full=None, reference=reference, final_over=final_over)
            other = (
                None if reference is None else summary_row(reference, target, full=None, final_over=final_over)
            )
            percent = is_percent(metric)
            final, apart = _final(line, percent=percent), _difference(line, other, percent=percent)
            rows.append([metric, group.name, final, apart])
            data.append({"metric": metric} | {name: getattr(line, name) for name in _FINALS})
    return Table("metrics", "Further metrics", ["metric", "variant", "final", "difference [95 %]"], rows, data)


# --- Files ----------------------------------------------------------------------------------------------


def markdown(table: Sequence[SummaryRow], target: Target) -> str:
    """Return the table in Markdown, with a sentence on the target, or on each group's."""
    return "\n".join([*_markdown_rows(*head_and_rows(table, target)), "", *targets_of(table, target), ""])


def _markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    text = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] + ['---:'] * (len(head) - 2) + ['---'])}|"]
    return text + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a paper: a ``tabular`` with rules of the package booktabs.

    Args:
        head: headings of the columns; the first column is text, the others numbers.
        rows: rows with one cell for each heading.
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
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def _latex_text(text: str) -> str:
    """Escape a cell for LaTeX, with minus signs for hyphens before numbers.

    >>> _latex_text("-1.2 [-3.2, +0.8], 20 %, lr_a")
    '$-$1.2 [$-$3.2, +0.8], 20 \\\\%, lr\\\\_a'
    """
    escaped = "".join(_LATEX.get(symbol, symbol) for symbol in text)
    escaped = re.sub(r"(?<![\w.\]])-(?=\d)", "$-$", escaped)
    # LaTeX reads it as the argument of a line break
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped


def save_tables(
    folder: Path,
    table: Sequence[SummaryRow],
    target: Target,
    about: Mapping[str, Any],
    further: Sequence[Table] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write ``summary.json``, all tables as ``table.md`` and ``table.tex``, each as a CSV file."""
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
    flat = [_without_intervals(row) for row in rows]
    if flat:
        writer.writerow(flat[0])
    writer.writerows([[_cell(value) for value in row.values()] for row in flat])
    write_atomically(path, buffer.getvalue().encode())


def _without_intervals(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with two numbers in place of an interval, which is no number for spreadsheets."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith("_interval"):
            flat[f"{name}_low"], flat[f"{name}_high"] = value or (None, None)
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> Any:
    """Return the value for spreadsheets: text that looks like a formula gets a quote in front."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


def _finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with None for numbers that are not finite, which JSON cannot express."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
