"""Findings in words and a few numbers, computed from the runs; the best variant comes first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jwins.report.formatting import (
    NEVER,
    and_list,
    capital,
    final_text,
    fixed,
    minus,
    number,
    share,
    size,
    spaced,
)
from jwins.report.seed_groups import difference
from jwins.report.studies import Study
from jwins.report.summary_rows import SummaryRow
from jwins.run_folder.record import ended_well


def verdict(study: Study) -> list[str]:
    """State the best variant, the variants ahead of the featured one, and unfinished runs."""
    table = study.table()
    best, line = _best(study, table), table[_subject(study)]
    if best is None:
        sentences = [_end_sentence(study, line)]
    else:
        sentences = [_best_sentence(study, table, best, line)]
        sentences += _fewest_sentence(study, table, _full(study, table))
        sentences += _ahead_sentence(study, table, line)
    odd = [f"{other.variant} {other.status}" for other in table if not ended_well(other.status)]
    return [*sentences, f"Unfinished: {'; '.join(odd)}."] if odd else sentences


def _full(study: Study, table: Sequence[SummaryRow]) -> SummaryRow | None:
    return next((line for line in table if line.variant == study.full), None)


def _subject(study: Study) -> int:
    """Return the featured variant: the first JWINS, or the first that is not full sharing."""
    order = [v.group.algorithm for v in study.variants]
    for wanted in (lambda kind: kind == "jwins", lambda kind: kind != "full", lambda kind: True):
        for index, kind in enumerate(order):
            if wanted(kind):
                return index
    return 0


# --- The best variant ---------------------------------------------------------------------------------------


def _best(study: Study, table: Sequence[SummaryRow]) -> SummaryRow | None:
    """Return the line with the best final value; None without a choice."""
    known = _ranked(table)
    if len(known) < 2:
        return None
    return min(known, key=lambda line: (_worse(study, line), line.bytes_per_node))


def _ranked(table: Sequence[SummaryRow]) -> list[SummaryRow]:
    """Return the lines with a final value."""
    return [line for line in table if math.isfinite(line.final) and line.counted]


def _worse(study: Study, line: SummaryRow) -> float:
    """Return a sort key: smaller for better final values, equal if tables show equal values."""
    shown = float(final_text(line.final, percent=study.percent, unit=False))
    return shown if study.target.lower_is_better else -shown


def _fewest(study: Study, table: Sequence[SummaryRow]) -> SummaryRow | None:
    """Return the variant that reached the target in every seed with the fewest bytes; None without rivals."""
    reached = [line for line in table if line.bytes_to_target is not None and line.reached == line.seeds]
    if not study.has_target or len(table) < 2 or not reached:
        return None
    return min(reached, key=lambda line: line.bytes_to_target or 0.0)


def _best_sentence(study: Study, table: Sequence[SummaryRow], best: SummaryRow, subject: SummaryRow) -> str:
    """Return ``A ends at 95.8 % accuracy (± 0.5 over 3 seeds), the highest of 4 variants``, and equal ones."""
    word = "lowest" if study.target.lower_is_better else "highest"
    known = _ranked(table)
    text = f"{_ends(study, best)}, the {word} of {len(known)} variants"
    ties = [
        other.variant for other in known if other is not best and _worse(study, other) == _worse(study, best)
    ]
    text += f", shared with {and_list(ties)}" if ties else ""
    equals = [name for name in _statistical_ties(study, best) if name not in ties]
    if equals:
        if len(equals) > 3:
            equals = [*equals[:2], f"{len(equals) - 2} more"]
        text += f" (the 95 % interval of the difference to {and_list(equals)} includes 0)"
    saves = _saves(study, best) if best is subject else ""
    return capital(f"{text}{',' if saves else ''}{saves}.")


def _statistical_ties(study: Study, best: SummaryRow) -> list[str]:
    """Return the variants whose difference to the best may be chance, by the seeds that both ran."""
    group = study.group(best.variant)
    found = []
    for other in study.groups:
        if group is None or other.name == best.variant:
            continue
        apart = difference(other, group, study.target.metric, study.final_over)
        if apart is not None and apart.half_width is not None and abs(apart.mean) <= apart.half_width:
            found.append(other.name)
    return found


def _fewest_sentence(study: Study, table: Sequence[SummaryRow], full: SummaryRow | None) -> list[str]:
    fewest = _fewest(study, table)
    if fewest is None or fewest.bytes_to_target is None:
        return []
    goal = number(study.target.value, percent=study.percent)
    text = f"{capital(fewest.variant)} needs the fewest bytes to the target of {goal}: "
    text += f"{size(fewest.bytes_to_target)} per node"
    if full is not None and full is not fewest and full.bytes_to_target:
        text += f", {fewest.bytes_to_target / full.bytes_to_target:.2f} times what full sharing needs"
    return [f"{text}."]


def _ahead_sentence(study: Study, table: Sequence[SummaryRow], line: SummaryRow) -> list[str]:
    """Return the variants that end no worse than the featured one with fewer bytes, as tables show both."""
    if line not in _ranked(table):
        return []
    ahead = [
        other
        for other in _ranked(table)
        if other is not line
        and _worse(study, other) <= _worse(study, line)
        and other.bytes_per_node < line.bytes_per_node
        and size(other.bytes_per_node) != size(line.bytes_per_node)
    ]
    if not ahead:
        return []
    ahead.sort(key=lambda other: (_worse(study, other), other.bytes_per_node))
    listed = [
        f"{other.variant} ({_value(study, other.final)}, {size(other.bytes_per_node)} per node)"
        for other in ahead[:3]
    ]
    listed += [f"{len(ahead) - 3} more"] if len(ahead) > 3 else []
    metric = spaced(study.target.metric)
    better = "lower" if study.target.lower_is_better else "higher"
    levels = [_worse(study, other) == _worse(study, line) for other in ahead]
    what = f"the same {metric}" if all(levels) else f"{better} {metric}"
    what = f"the same or {better} {metric}" if any(levels) and not all(levels) else what
    have, send = ("have", "send") if len(ahead) > 1 else ("has", "sends")
    own = f"{line.variant} ({_value(study, line.final)}, {size(line.bytes_per_node)})"
    return [f"{capital(and_list(listed))} {have} {what} and {send} fewer bytes than {own}."]


# --- One variant --------------------------------------------------------------------------------------------


def _value(study: Study, value: float, *, unit: bool = True) -> str:
    return final_text(value, percent=study.percent, unit=unit)


def _ends(study: Study, line: SummaryRow) -> str:
    text = f"{line.variant} ends at {_value(study, line.final)} {spaced(study.target.metric)}"
    if line.final_sd is not None:
        text += f" (± {_value(study, line.final_sd, unit=False)} over {line.counted} seeds)"
    if 0 < line.counted < line.seeds:
        text += f" in the {line.counted} of {line.seeds} seeds in which it did not diverge"
    return text


def _end_sentence(study: Study, line: SummaryRow) -> str:
    if math.isnan(line.saving_raw):
        return f"{_ends(study, line)}; nothing has been sent yet."
    return f"{_ends(study, line)}{_saves(study, line)}."


def _saves(study: Study, line: SummaryRow) -> str:
    if math.isnan(line.saving_raw):
        return ""
    text = f" and sends {_fewer(line.saving_raw)} than uncompressed full sharing (4 bytes per parameter)"
    if study.full not in (None, line.variant) and line.saving_codec is not None:
        text += f", {_fewer(line.saving_codec)} than full sharing through the same codec"
    return text


def _fewer(saving: float) -> str:
    return f"{share(abs(saving))} {'fewer' if saving >= 0 else 'more'} bytes"


# --- In numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tiles:
    """Key numbers.

    Attributes:
        of: their subject.
        numbers: (name, number) each.
    """

    of: str
    numbers: list[tuple[str, str]]


def tiles(study: Study) -> list[Tiles]:
    """State the best variant and the featured one."""
    table = study.table()
    metric = spaced(study.target.metric)
    goal = number(study.target.value, percent=study.percent)
    winners = []
    if (best := _best(study, table)) is not None:
        word = "lowest" if study.target.lower_is_better else "highest"
        winners.append((f"{word} final {metric}: {best.variant}", _value(study, best.final)))
    if (fewest := _fewest(study, table)) is not None and fewest.bytes_to_target is not None:
        what = f"fewest bytes per node to {goal} {metric}: {fewest.variant}"
        winners.append((what, size(fewest.bytes_to_target)))
    line = table[_subject(study)]
    own = Tiles(line.variant, _numbers_of(study, table, line))
    return [Tiles("Best", winners), own] if winners else [own]


def _numbers_of(study: Study, table: Sequence[SummaryRow], line: SummaryRow) -> list[tuple[str, str]]:
    full = next((other for other in table if other.variant == study.full and other is not line), None)
    metric = spaced(study.target.metric)
    goal = number(study.target.value, percent=study.percent)
    found = [("bytes against uncompressed full sharing", _less(line.saving_raw))]
    if full is not None and line.saving_codec is not None:
        found.append(("bytes against full sharing, same codec", _less(line.saving_codec)))
    beside = f"final {metric}"
    if full is not None:
        beside += f"; {full.variant}: {_value(study, full.final)}"
    found.append((beside, _value(study, line.final)))
    if study.has_target and full is not None:
        if line.bytes_to_target is None:
            found.append((f"reached {goal} {metric}", "never"))
        elif full.bytes_to_target:
            ratio = line.bytes_to_target / full.bytes_to_target
            found.append((f"the bytes of {full.variant} to {goal} {metric}", f"{ratio:.2f} ×"))
    return found


def _less(saving: float) -> str:
    return NEVER if math.isnan(saving) else f"{minus(fixed(-saving * 100, 1, sign=True))} %"
