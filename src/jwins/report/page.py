"""Runs and comparisons as one self-contained HTML page, and its figures as PDF and PNG.

The page loads nothing: it contains style and figures, and has no script. Every number is computed from
the ``metrics.jsonl`` of the runs. Every name and setting is escaped. Missing information is marked as missing.
The HTML and the style sheet are in ``templates/``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jwins.report import provenance
from jwins.report.bar_charts import kinds_sent
from jwins.report.chart import Chart, as_svg, load_matplotlib, save
from jwins.report.colours import KIND_COLOURS, ON_PAGE, THEME, Style, styles_of
from jwins.report.comparison_table import page_table
from jwins.report.figures import figures_of
from jwins.report.formatting import and_list, capital, spaced
from jwins.report.headline import verdict
from jwins.report.page_tables import bytes_table, evaluations_table, further_tables, savings_notes, spread_table
from jwins.report.studies import Study, gather
from jwins.report.templating import templates
from jwins.run_folder.atomic import write_atomically


def write_page(
    folders: Sequence[Path],
    out: Path,
    *,
    figures: Path | None = None,
    metric: str | None = None,
) -> tuple[Path, list[Path]]:
    """Write the page, and every figure as PDF and PNG.

    Args:
        folders: see :func:`gather`.
        out: the page.
        figures: folder for the figures; None: ``<stem of out>-figures`` beside the page.
        metric: metric to show in place of the comparison's or the task's first.

    Returns:
        The page and the figures' files.

    Raises:
        DataError: no measured run in a folder, or a damaged one.
        UsageError: no folder, or a metric that no run has.
    """
    studies = gather(folders, metric=metric)
    beside = figures if figures is not None else out.with_name(f"{out.stem}-figures")
    text, charts = render(studies, figures=Path(os.path.relpath(beside, out.parent)).as_posix())
    out.parent.mkdir(parents=True, exist_ok=True)
    beside.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in charts:
        written += save(chart, beside / name)
    write_atomically(out, text.encode())
    return out, written


def render(studies: Sequence[Study], *, figures: str = "") -> tuple[str, list[tuple[str, Chart]]]:
    """Return the page as text, and its charts with the names of their files in ``figures``, if not ""."""
    views, charts = [], []
    for index, study in enumerate(studies, start=1):
        view = _view(study, index)
        views.append(view)
        slug = re.sub(r"[^a-z0-9]+", "-", study.name.lower()).strip("-")[:40] or "study"
        prefix = "" if len(studies) == 1 else f"{slug}-{index}-"
        charts += [(prefix + chart.slug, chart) for chart in view["figures"].all]
    text = (
        templates()
        .get_template("page.html.jinja")
        .render(
            title=_title([study.name for study in studies]),
            studies=views,
            runs=sum(len(study.records) for study in studies),
            figures=figures,
            light={name: light for name, light, _ in THEME.values()}
            | {n: light for n, (light, _) in ON_PAGE.items()},
            dark={name: dark for name, _, dark in THEME.values()}
            | {n: dark for n, (_, dark) in ON_PAGE.items()},
        )
    )
    return text, charts


def _title(names: Sequence[str]) -> str:
    """Return the title of a page: the studies' names, or the name of the comparison of all groups.

    >>> _title(["digits", "movielens"]), _title(["scale: 96 nodes", "scale: 192 nodes"])
    ('digits and movielens', 'scale')
    """
    common = names[0].partition(": ")[0]
    if len(names) > 1 and all(name.startswith(f"{common}: ") for name in names):
        return common
    return and_list(names) if len(names) < 4 else f"{len(names)} studies: {and_list(names[:2])}, …"


# --- Data of the template ---------------------------------------------------------------------------


def _view(study: Study, index: int) -> dict[str, Any]:
    styles = styles_of([group.algorithm for group in study.groups])
    figures = figures_of(study, styles)
    metric, others = study.target.metric, list(study.records[0].evaluations[-1].metrics)
    alike, alike_words = provenance.alike(study)
    return {
        "index": index,
        "name": study.name,
        "what": _subtitle(study),
        "verdict": verdict(study),
        "notes": study.notes,
        "settings": provenance.common_settings(study),
        "metric": capital(spaced(metric)),
        "legend": [_entry(study, i, style) for i, style in enumerate(styles)],
        "figures": figures,
        "pictures": {chart.slug: as_svg(chart, f"s{index}f{i}") for i, chart in enumerate(figures.all)},
        "evaluations": evaluations_table(study),
        "savings": page_table(study.table(), study.target),
        "savings_notes": savings_notes(study),
        "alike": alike,
        "alike_words": alike_words,
        "further": further_tables(study),
        "byte_kinds": [(kind, f"var(--{THEME[KIND_COLOURS[kind]][0]})") for kind in kinds_sent(study.groups)],
        "bytes": bytes_table(study),
        "spreads": [spread_table(study, name) for name in [metric, *(m for m in others if m != metric)]],
        "wall": provenance.wall_clock_table(study),
        "differences": provenance.differences_table(study),
        "runs": provenance.runs_table(study),
        "versions": provenance.versions(study),
        "configurations": [(v.group.name, provenance.configuration(v)) for v in study.variants],
    }


def _subtitle(study: Study) -> str:
    names = [group.name for group in study.groups]
    seeds = len({record.start.seed for record in study.records})
    nodes = " / ".join(dict.fromkeys(str(record.start.num_nodes) for record in study.records))
    who = and_list(names) if len(names) < 8 else f"{len(names)} variants"
    return f"{who} on {nodes} nodes, {seeds} seed{'s' if seeds != 1 else ''}."


def _entry(study: Study, index: int, style: Style) -> dict[str, Any]:
    """Return a line of the legend: a variant's name, and its line and marker as a picture of 34 x 12."""
    load_matplotlib()
    from matplotlib.markers import MarkerStyle

    group = study.groups[index]
    mark = ", ✕" if group.diverged == "diverged" else ""
    marker = MarkerStyle(style.marker)
    polygons: Any = marker.get_path().transformed(marker.get_transform()).to_polygons()
    return {
        "name": group.name + (f" ({group.diverged}{mark})" if group.diverged else ""),
        "colour": style.variable,
        "dash": "" if style.dash == "-" else " ".join(f"{2 * length:g}" for length in style.dash[1]),
        "shapes": [" ".join(f"{17 + x * 6.5:.1f},{6 - y * 6.5:.1f}" for x, y in shape) for shape in polygons],
    }
