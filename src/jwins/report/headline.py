"""Findings in words, computed from the runs; the best variant comes first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jwins.report.formatting import and_list, capital, final_text, number, size, spaced
from jwins.report.seed_groups import difference
from jwins.report.studies import Study
from jwins.report.summary_rows import SummaryRow
from jwins.run_folder.record import ended_well


def verdict(study: Study) -> list[str]:
    """State the best variant, the one with the fewest bytes to the target, and unfinished runs."""
    table = study.table()
    known = [line for line in table if math.isfinite(line.final) and line.counted]
    sentences = [_best_sentence(study, known) if known else "No run has a final value."]
    sentences += _fewest_sentence(study, table)
    odd = [f"{other.variant} {other.status}" for other in table if not ended_well(other.status)]
    return [*sentences, f"Unfinished: {'; '.join(odd)}."] if odd else sentences


def _best_sentence(study: Study, known: Sequence[SummaryRow]) -> str:
    """Return ``A ends at 95.8 % accuracy (± 0.5 over 3 seeds), the highest of 4 variants``, and equal ones."""
    best = min(known, key=lambda line: (_worse(study, line), line.bytes_per_node))
    text = f"{best.variant} ends at {final_text(best.final, percent=study.percent)} "
    text += spaced(study.target.metric)
    if best.final_sd is not None:
        sd = final_text(best.final_sd, percent=study.percent, unit=False)
        text += f" (± {sd} over {best.counted} seeds)"
    if best.counted < best.seeds:
        text += f" in the {best.counted} of {best.seeds} seeds in which it did not diverge"
    if len(known) > 1:
        text += f", the {'lowest' if study.target.lower_is_better else 'highest'} of {len(known)} variants"
    ties = [
        other.variant for other in known if other is not best and _worse(study, other) == _worse(study, best)
    ]
    text += f", shared with {and_list(ties)}" if ties else ""
    equals = [name for name in _statistical_ties(study, best) if name not in ties]
    if equals:
        if len(equals) > 3:
            equals = [*equals[:2], f"{len(equals) - 2} more"]
        text += f" (the 95 % interval of the difference to {and_list(equals)} includes 0)"
    return capital(f"{text}.")


def _worse(study: Study, line: SummaryRow) -> float:
    """Return a sort key: smaller for better final values, equal if tables show equal values."""
    shown = float(final_text(line.final, percent=study.percent, unit=False))
    return shown if study.target.lower_is_better else -shown


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


def _fewest_sentence(study: Study, table: Sequence[SummaryRow]) -> list[str]:
    """Name the variant that reached the target in every seed with the fewest bytes, if it has rivals."""
    sent = {
        line: line.bytes_to_target
        for line in table
        if line.bytes_to_target is not None and line.reached == line.seeds
    }
    if not study.has_target or len(table) < 2 or not sent:
        return []
    fewest = min(sent, key=lambda line: sent[line])
    full = next((line.bytes_to_target for line in table if line.variant == study.full), None)
    goal = number(study.target.value, percent=study.percent)
    what = f"the target of {goal}"
    if any(0 < line.reached < line.seeds for line in table):
        what += " in every seed"
    verb = f"alone reaches {what}" if len(sent) == 1 else f"needs the fewest bytes to reach {what}"
    text = f"{capital(fewest.variant)} {verb}: {size(sent[fewest])} per node"
    if full and fewest.variant != study.full:
        text += f", {sent[fewest] / full:.2f} times what full sharing needs"
    return [f"{text}."]
