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
    difference_texts,
    final_text,
    is_percent,
    minus,
    of_seeds,
    share,
    size,
    spread_text,
)
from jwins.report.seed_groups import Group, Target, TargetOutcome
from jwins.report.summary_rows import SummaryRow, summary_row
from jwins.run_folder.atomic import write_atomically
from jwins.run_folder.record import ended_well


class TableCell(str):
    """Cell of a table: a text of one line, and its layout in two lines for the page.

    Attributes:
        value: the main part.
        aside: small text below it.
        kind: a class of the style sheet: ``bad`` or ``code``.
        tip: text for a pointer that rests on it.
    """

    __slots__ = ("aside", "kind", "tip", "value")
    value: str
    aside: str
    kind: str
    tip: str

    def __new__(
        cls, text: str, aside: str = "", *, value: str | None = None, kind: str = "", tip: str = ""
    ) -> TableCell:
        """Make a cell.

        Args:
            text: the whole text in one line.
            aside: small text below the main part.
            value: main part; None for ``text``.
            kind: a class of the style sheet.
            tip: text for a pointer.
        """
        cell = super().__new__(cls, text)
        cell.value = text if value is None else value
        cell.aside, cell.kind, cell.tip = aside, kind, tip
        return cell


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: name of its CSV file and of its entry in ``summary.json``.
        title: its title.
        head: headings.
        rows: texts, or a :class:`TableCell` for two lines in the page.
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


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the main table, with its references.

    Attributes:
        line: line of the variant.
        percent: whether the metric is a fraction shown in percent.
        full: the line of full sharing, None without one and for itself.
        reference: line that its difference refers to, None without one.
        mixed: whether differences refer to different variants.
    """

    line: SummaryRow
    percent: bool
    full: SummaryRow | None = None
    reference: SummaryRow | None = None
    mixed: bool = False

    def variant(self) -> TableCell:
        line = self.line
        tuned = f" ({line.tuned})" if line.tuned else ""
        return TableCell(line.variant + tuned, line.tuned, value=line.variant)

    def seeds(self) -> TableCell:
        return TableCell(str(self.line.seeds))

    def final(self) -> TableCell:
        line = self.line
        text = spread_text(line.final, line.final_sd, percent=self.percent)
        beside = (
            []
            if line.final_sd is None
            else [f"± {final_text(line.final_sd, percent=self.percent, unit=False)}"]
        )
        beside += [f"{line.counted} of {line.seeds} seeds"] if 0 < line.counted < line.seeds else []
        return TableCell(
            text + of_seeds(line.counted, line.seeds),
            ", ".join(beside),
            value=final_text(line.final, percent=self.percent),
        )

    def difference(self) -> TableCell:
        line, percent = self.line, self.percent
        if line.difference is None or math.isnan(line.difference):
            return TableCell(NEVER)
        stated = shown_difference(line, self.reference, percent=percent)
        text = difference_text(line.difference, line.difference_half, percent=percent, stated=stated)
        value, low, high = map(
            minus, difference_texts(line.difference, line.difference_half, percent=percent, stated=stated)
        )
        to = f" (to {line.reference})" if self.mixed else ""
        return TableCell(
            text, f"one seed{to}" if line.difference_half is None else f"{low} to {high}{to}", value=value
        )

    def sent(self) -> TableCell:
        return TableCell(size(self.line.bytes_per_node))

    def bits(self) -> TableCell:
        link, whole = self.line.bits_per_link, self.line.bits_per_node
        if link is None or whole is None:
            return TableCell(NEVER)
        return TableCell(f"{link:.3g} ({whole:.3g})", f"{whole:.3g} in all", value=f"{link:.3g}")

    def saving_raw(self) -> TableCell:
        return TableCell(share(self.line.saving_raw))

    def saving_codec(self) -> TableCell:
        return TableCell(NEVER if self.line.saving_codec is None else share(self.line.saving_codec))

    def bytes_to_target(self) -> TableCell:
        line = self.line
        if line.bytes_to_target is None:
            return TableCell(NEVER, value="never reached", kind="bad")
        beside = []
        if self.full is not None and self.full.bytes_to_target:
            beside = [f"{line.bytes_to_target / self.full.bytes_to_target:.2f} × full"]
        beside += [] if line.reached == line.seeds else [f"{line.reached} of {line.seeds} seeds"]
        return self._to_target(size(line.bytes_to_target), ", ".join(beside))

    def rounds_to_target(self) -> TableCell:
        rounds = self.line.rounds_to_target
        return TableCell(NEVER) if rounds is None else self._to_target(f"{rounds:.0f}")

    def seconds_to_target(self) -> TableCell:
        seconds, full = self.line.seconds_to_target, self.full
        if seconds is None:
            return TableCell(NEVER)
        times = ""
        if full is not None and full.seconds_to_target:
            times = f"{seconds / full.seconds_to_target:.2f} × full"
        return self._to_target(f"{seconds:.1f}", times)

    def _to_target(self, value: str, aside: str = "") -> TableCell:
        return TableCell(value + of_seeds(self.line.reached, self.line.seeds), aside, value=value)

    def overhead(self) -> TableCell:
        return TableCell(NEVER if self.line.overhead is None else share(self.line.overhead))

    def worst(self) -> TableCell:
        worst, sd = self.line.worst, self.line.node_sd
        if worst is None:
            return TableCell(NEVER)
        value = final_text(worst, percent=self.percent)
        beside = "" if sd is None else f"sd {final_text(sd, percent=self.percent, unit=False)} over nodes"
        return TableCell(f"{value} ({beside})" if beside else value, beside, value=value)

    def status(self) -> TableCell:
        return TableCell(self.line.status, kind="" if ended_well(self.line.status) else "bad")


_IN_ONE_LINE: tuple[tuple[str, Callable[[_Row], TableCell]], ...] = (
    ("variant", _Row.variant),
    ("final {metric}", _Row.final),
    ("bytes/node", _Row.sent),
    ("saving vs raw", _Row.saving_raw),
    ("saving vs codec", _Row.saving_codec),
    ("bytes to target", _Row.bytes_to_target),
    ("rounds", _Row.rounds_to_target),
    ("seconds", _Row.seconds_to_target),
    ("difference{to} [95 %]", _Row.difference),
    ("other / training", _Row.overhead),
    ("bits/parameter, step and link (node)", _Row.bits),
    ("worst 10 % of nodes", _Row.worst),
    ("status", _Row.status),
)
"""Headings and cells of the main table with one line per cell; :func:`page_table` is for the page."""


def shown_difference(line: SummaryRow, reference: SummaryRow | None, *, percent: bool) -> float | None:
    """Return the difference of two final values as tables show them, so that it agrees with them.

    Args:
        line: line of the variant.
        reference: line of its reference.
        percent: whether the metric is a fraction shown in percent.

    Returns:
        The difference, or None if the final values are means over other seeds.
    """
    if reference is None or not line.difference_seeds == line.counted == reference.counted:
        return None
    if not math.isfinite(line.final - reference.final):
        return None
    scale = 100.0 if percent else 1.0
    own, other = (float(final_text(at.final, percent=percent, unit=False)) for at in (line, reference))
    return (own - other) / scale


def columns(target: Target, reference: str | None = None) -> list[str]:
    """Return headings of the main table with one line per cell.

    Args:
        target: target, which names the metric.
        reference: common reference of all differences, if there is one.
    """
    to = f" to {reference}" if reference else ""
    return [heading.format(metric=target.metric, to=to) for heading, _ in _IN_ONE_LINE]


def table_cells(line: SummaryRow, *, percent: bool, reference: SummaryRow | None = None) -> list[str]:
    """Return one line of the main table, with one line of text per cell.

    Args:
        line: the line.
        percent: whether the metric is a fraction shown in percent.
        reference: line that its difference refers to; the difference then agrees with both final values.
    """
    row = _Row(line, percent, reference=reference)
    return [cell(row) for _, cell in _IN_ONE_LINE]


def head_and_rows(table: Sequence[SummaryRow], target: Target) -> tuple[list[str], list[list[str]]]:
    """Return headings and lines of the main table as text, for the terminal, Markdown and LaTeX.

    Args:
        table: the lines.
        target: the target.
    """
    percent, by_name = is_percent(target), {line.variant: line for line in table}
    rows = [table_cells(line, percent=percent, reference=by_name.get(line.reference or "")) for line in table]
    return columns(target, common_reference(table)), rows


def page_table(table: Sequence[SummaryRow], target: Target, full: str | None, clock: str = "virtual") -> Table:
    """Return the main table for the page, without empty columns.

    Args:
        table: the lines.
        target: the target; its value is NaN without one.
        full: name of the variant with full sharing that savings refer to.
        clock: kind of the seconds.
    """
    metric, by_name = target.metric.replace("_", " "), {line.variant: line for line in table}
    whole = by_name.get(full or "")
    compared = any(line.difference is not None for line in table)
    mixed = any(line.reference not in (None, full) for line in table)
    chosen = [("variant", _Row.variant), ("seeds", _Row.seeds), (f"final {metric}", _Row.final)]
    chosen += [("difference" if mixed else "difference to full", _Row.difference)] if compared else []
    chosen.append(("bytes per node", _Row.sent))
    counted = any(line.bits_per_link is not None for line in table)
    chosen += [("bits per parameter, local step and link", _Row.bits)] if counted else []
    chosen.append(("saving against raw", _Row.saving_raw))
    chosen += [("saving, same codec", _Row.saving_codec)] if whole is not None else []
    if math.isfinite(target.value):
        chosen += [
            ("bytes to target", _Row.bytes_to_target),
            ("rounds to target", _Row.rounds_to_target),
            (f"{clock} s to target".strip(), _Row.seconds_to_target),
        ]
    chosen += [("worst 10 % of nodes", _Row.worst)] if any(line.worst is not None for line in table) else []
    chosen.append(("status", _Row.status))
    rows = [
        _Row(
            line, is_percent(target), None if line is whole else whole, by_name.get(line.reference or ""), mixed
        )
        for line in table
    ]
    body: list[list[str]] = [[cell(row) for _, cell in chosen] for row in rows]
    return Table("table", f"Final {metric}, bytes and savings", [name for name, _ in chosen], body)


def targets_of(table: Sequence[SummaryRow], target: Target) -> list[str]:
    """Return a sentence about the target, or one for each of different targets."""
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
    percent = is_percent(target)
    head = ["variant", f"{target.metric} to reach", "reached", "bytes/node", "rounds", "seconds"]
    head += ["bytes / baseline's", "seconds / baseline's", "baseline"]
    rows: list[list[str]] = []
    for row in reached:
        value = f"{row.target * 100:.1f} %" if percent else f"{row.target:.4g}"
        some = f" ({row.pairs})" if 0 < row.pairs < row.seeds else ""
        rows.append(
            [
                row.variant,
                TableCell(f"{value} ({row.meaning})" if row.meaning else value, row.meaning, value=value),
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
    """Return the table of final values of several metrics, with differences to a reference.

    Args:
        groups: each variant's runs, and those of its reference.
        metrics: names of the metrics.
        final_over: number of last evaluations whose mean is the final value.
    """
    rows: list[list[str]] = []
    data: list[dict[str, Any]] = []
    for metric in metrics:
        target = Target(metric, math.nan)
        for group, reference in groups:
            line = summary_row(group, target, full=None, reference=reference, final_over=final_over)
            other = (
                None if reference is None else summary_row(reference, target, full=None, final_over=final_over)
            )
            row = _Row(line, is_percent(target), reference=other)
            rows.append([metric, group.name, row.final(), row.difference()])
            data.append(
                {
                    "metric": metric,
                    "variant": group.name,
                    "seeds": line.seeds,
                    "counted": line.counted,
                    "final": line.final,
                    "final_sd": line.final_sd,
                    "reference": line.reference,
                    "difference": line.difference,
                    "difference_half": line.difference_half,
                }
            )
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
    """Write ``summary.json``, all tables as ``table.md`` and ``table.tex``, each as a CSV file.

    Args:
        folder: an existing folder.
        table: the lines.
        target: the target.
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
    writer.writerows([[_cell(value) for value in row.values()] for row in rows])
    write_atomically(path, buffer.getvalue().encode())


def _cell(value: Any) -> Any:
    """Return the value for spreadsheets: text that looks like a formula gets a quote in front."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


def _finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) for name, value in row.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
