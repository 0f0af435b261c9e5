"""Runs and comparisons as one self-contained HTML page, and its figures as PDF and PNG.

The page loads nothing: style and figures are within, there is no script. Every number in it is computed from
the ``metrics.jsonl`` of the runs; every name and setting is escaped. What the runs do not tell is left out and
said to be missing.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jwins.errors import JwinsError
from jwins.experiment.load import load
from jwins.experiment.toml import write_toml
from jwins.report.charts import (
    PARTS,
    THEME,
    Chart,
    Partition,
    Style,
    as_svg,
    bytes_by_part,
    bytes_chart,
    curve_chart,
    metric_percent,
    nodes_chart,
    number,
    partition_chart,
    save,
    styles_of,
    topology_chart,
)
from jwins.report.studies import (
    Study,
    and_list,
    compared_settings,
    differing_keys,
    flat,
    gather,
    network,
    shown,
)
from jwins.report.tables import metrics_table, reach_table
from jwins.report.words import describe_target, share, size
from jwins.results.groups import reach
from jwins.results.lines import Line
from jwins.results.record import Record
from jwins.run.parts import build_partition, build_task, build_topology, partition_counts
from jwins.runfiles.atomic import write_atomically

__all__ = ["headline", "render", "write_page"]


# --- Comparing --------------------------------------------------------------------------------------------


def _subject(study: Study) -> int:
    """The variant that headline and key numbers are about: the first JWINS, or the first that is not full."""
    order = [v.group.algorithm for v in study.variants]
    for wanted in (lambda kind: kind == "jwins", lambda kind: kind != "full", lambda kind: True):
        for index, kind in enumerate(order):
            if wanted(kind):
                return index
    return 0


def headline(study: Study) -> str:
    """What was found, in words, computed from the runs."""
    table = study.table()
    index = _subject(study)
    line = table[index]
    full = next((other for other in table if other.variant == study.full), None)
    metric = _words(study.target.metric)
    text = f"{line.variant} ends at {_value(line.final, study)} {metric}"
    if line.final_sd is not None:
        text += f" (± {_value(line.final_sd, study, unit=False)} over {line.counted} seeds)"
    if 0 < line.counted < line.seeds:
        text += f" in the {line.counted} of {line.seeds} seeds in which it did not diverge"
    if math.isnan(line.saving_raw):
        return f"{text}; nothing has been sent yet."
    text += f" and sends {_fewer(line.saving_raw)} than uncompressed full sharing (4 bytes per parameter)"
    if full is not None and full is not line and line.saving_codec is not None:
        text += f", {_fewer(line.saving_codec)} than full sharing through the same codec"
    text += "."
    if full is not None and full is not line:
        text += f" {_start(full.variant)} ends at {_value(full.final, study)}"
        if line.reference == full.variant and line.difference is not None and math.isfinite(line.difference):
            text += f", so the difference is {_apart(line.difference, line.difference_half, study)}"
            if line.difference_half is None:
                text += " on one seed"
        text += "."
        if study.has_target:
            what = f"the target of {number(study.target.value, percent=study.percent)}"
            if line.bytes_to_target is None:
                text += f" {_start(line.variant)} never reached {what}."
            elif full.bytes_to_target is not None:
                some = "" if line.reached == line.seeds else f" in {line.reached} of {line.seeds} runs"
                text += (
                    f" To {what} {line.variant} needs {size(line.bytes_to_target)} per node{some}, "
                    f"{line.bytes_to_target / full.bytes_to_target:.2f} times what full sharing needs."
                )
    odd = [f"{line.variant} {line.status}" for line in table if line.status != "finished"]
    if odd:
        text += f" Mind what is not finished: {'; '.join(odd)}."
    return text


def _value(value: float, study: Study, *, unit: bool = True) -> str:
    if study.percent:
        return f"{value * 100:.1f}{' %' if unit else ''}" if math.isfinite(value) else "—"
    return f"{value:.4f}" if math.isfinite(value) else "—"


def _apart(mean: float, half: float | None, study: Study) -> str:
    """Like ``−3.2 points (95 % interval −4.9 to −1.5)``."""
    scale, digits, unit = (100.0, 1, " points") if study.percent else (1.0, 4, "")
    text = f"{_signed(mean * scale, digits)}{unit}"
    if half is not None:
        low, high = _signed((mean - half) * scale, digits), _signed((mean + half) * scale, digits)
        text += f" (95 % interval {low} to {high})"
    return text


def _signed(value: float, digits: int) -> str:
    if math.isnan(value):
        return "—"
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def _fewer(saving: float) -> str:
    return f"{share(abs(saving))} {'fewer' if saving >= 0 else 'more'} bytes"


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]


def _words(name: str) -> str:
    return name.replace("_", " ")


# --- Settings of runs -------------------------------------------------------------------------------------


def _described(table: Any) -> str:
    """A table with a kind, as words: ``regular, degree 4``."""
    if not isinstance(table, Mapping):
        return str(table)
    kind = _words(str(table.get("kind", table.get("name", ""))))
    rest = [
        f"{_words(key)} {shown(value)}" if not isinstance(value, bool) else _words(key)
        for key, value in table.items()
        if key not in ("kind", "name", "options", "partition", "data", "path", "file") and value is not False
    ]
    return ", ".join([kind, *rest])


def _common_settings(study: Study) -> list[tuple[str, str]]:
    """What all variants have in common, for the head of a study."""

    def common(path: str, describe: Callable[[Any], str] = _described) -> str:
        found = []
        for variant in study.variants:
            value: Any = variant.tables
            for key in path.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            found.append(describe(value))
        return " / ".join(dict.fromkeys(found))

    def task(value: Any) -> str:
        if not isinstance(value, Mapping):
            return str(value)
        name = value.get("name") or value.get("own") or Path(str(value.get("file", ""))).name
        options = value.get("options") or {}
        return ", ".join([str(name), *(f"{_words(k)} {shown(v)}" for k, v in options.items())])

    def training(value: Any) -> str:
        optimizer = value.get("optimizer", {})
        steps, batch = value.get("local_steps"), value.get("batch_size")
        return f"{steps} local step{'s' if steps != 1 else ''} of batch {batch}; {_described(optimizer)}"

    seeds = list(dict.fromkeys(record.start.seed for record in study.records))
    dims = list(dict.fromkeys(f"{record.start.dim:,}" for record in study.records))
    samples = list(dict.fromkeys(f"{r.evaluations[-1].samples:,}" for r in study.records))
    return [
        ("task", common("task", task)),
        ("parameters", " / ".join(dims)),
        ("nodes", common("nodes.count", str)),
        ("topology", common("topology")),
        ("partition", common("task.partition")),
        ("training", common("train", training)),
        ("rounds", common("run.rounds", str)),
        ("codec", common("wire.codec", str)),
        (
            "network",
            common("links.uplink_mbps", shown) + " Mbit/s up, " + common("links.latency_ms", shown) + " ms",
        ),
        ("test samples", " / ".join(samples)),
        ("seeds", ", ".join(map(str, seeds)) if len(seeds) <= 12 else f"{len(seeds)}"),
    ]


def _alike(study: Study) -> tuple[bool, str]:
    """Whether the variants are like for like, and the sentence that says so."""
    if len(study.variants) < 2:
        return True, "There is one variant, so nothing had to be alike."
    differing: dict[str, list[str]] = {}
    shared: set[int] = set.intersection(*({r.start.seed for r in g.records} for g in study.groups))
    for seed in sorted(shared):
        prints = [
            next(r.start.fingerprints for r in group.records if r.start.seed == seed) for group in study.groups
        ]
        for what in prints[0]:
            if any(other.get(what) != prints[0][what] for other in prints):
                differing.setdefault(what, []).append(str(seed))
    text = ""
    meaning = {
        "model": "initial model",
        "partition": "samples on each node",
        "batches": "first batches",
        "evaluation": "evaluation samples",
        "codec": "codec",
    }
    same = [meaning.get(what, what) for what in study.records[0].start.fingerprints if what not in differing]
    if shared and same:
        everyone = "both variants" if len(study.variants) == 2 else f"all {len(study.variants)} variants"
        text = f"For every seed, {everyone} have the same {and_list(same)}"
        text += " (compared by fingerprint)."
    if differing:
        what = and_list([meaning.get(name, name) for name in differing])
        text += f" Not like for like: they differ in {what}."
    if not shared:
        text += " Not like for like: there is no seed that every variant has."
    elif any({r.start.seed for r in g.records} != shared for g in study.groups):
        text += " Not every variant has every seed."
    rounds = {record.rounds for record in study.records}
    if len(rounds) > 1:
        text += f" They were measured for {min(rounds)} to {max(rounds)} rounds."
    return bool(shared) and not differing, text.strip()


# --- Figures of a study -----------------------------------------------------------------------------------


@dataclass
class _Figures:
    """The charts of a study, by section; and what is absent and why."""

    curves: list[Chart] = field(default_factory=list)
    traffic: list[Chart] = field(default_factory=list)
    nodes: list[Chart] = field(default_factory=list)
    training: list[Chart] = field(default_factory=list)
    setting: list[Chart] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[Chart]:
        return [*self.curves, *self.traffic, *self.nodes, *self.training, *self.setting]


_CLOCKS = {
    "virtual": "Seconds of the virtual clock: modelled training and link times, not a stopwatch.",
    "real": "Seconds of the wall clock, from the start of the first round.",
    "": "Some runs on the virtual clock, of modelled training and link times, others on the wall clock: see "
    "the table of runs.",
}


def _clock(study: Study) -> str:
    """What the seconds of a study are: virtual, real, or both, which has no word."""
    found = {_clock_of(record) for record in study.records}
    return found.pop() if len(found) == 1 else ""


def _clock_of(record: Record) -> str:
    return "virtual" if record.start.clock == "virtual" else "real"


def _figures(study: Study, styles: Sequence[Style]) -> _Figures:
    groups, metric, percent = study.groups, study.target.metric, study.percent
    name = _start(_words(metric))
    unit = f"{_words(metric)}{' in %' if percent else ''}, mean over nodes"
    bands = " Lines are means over seeds, bands reach from the lowest to the highest seed."
    bands = bands if any(len(group.records) > 1 for group in groups) else ""
    lead = "Lower is better." if study.target.lower_is_better else ""

    def values(record: Record) -> list[float]:
        return record.series(metric)

    def rounds(record: Record) -> list[float]:
        return [float(row.round) for row in record.evaluations]

    def chart(slug: str, title: str, caption: str, **axes: Any) -> Chart:
        return curve_chart(slug, title, caption.strip(), groups, styles, **axes)

    of_metric = {"y": values, "y_label": unit, "percent": percent, "target": study.target}
    clock = _clock(study)
    figures = _Figures()
    figures.curves = [
        chart(
            f"{metric}-rounds", f"{name} against rounds", lead + bands, x=rounds, x_label="rounds", **of_metric
        ),
        chart(
            f"{metric}-bytes",
            f"{name} against bytes",
            "Everything a node sent, headers and control included; log axis.",
            x=Record.bytes_per_node,
            x_label="bytes sent per node",
            in_bytes=True,
            **of_metric,
        ),
        chart(
            f"{metric}-seconds",
            f"{name} against time",
            _CLOCKS[clock],
            x=lambda record: [row.time_s for row in record.evaluations],
            x_label=f"{clock} seconds".strip(),
            **of_metric,
        ),
    ]
    figures.traffic = [bytes_chart(groups)]
    if any(metric in r.evaluations[-1].per_node for r in study.records):
        figures.nodes = [nodes_chart(groups, styles, metric, percent=percent)]
    figures.training = [
        chart(
            "consensus",
            "Consensus distance",
            "Root mean square distance of the nodes’ parameters from their average.",
            x=rounds,
            x_label="rounds",
            y=lambda record: [row.consensus_distance for row in record.evaluations],
            y_label="distance from the average model",
        ),
        chart(
            "training-loss",
            "Training loss",
            "Of the last round’s batches before each evaluation, mean over nodes.",
            x=rounds,
            x_label="rounds",
            y=lambda record: [math.nan if r.train_loss is None else r.train_loss for r in record.evaluations],
            y_label="training loss",
        ),
    ]
    _add_topologies(study, figures)
    _add_partitions(study, figures)
    return figures


_MOST_SETTINGS = 6
"""So many different graphs or partitions of one study are drawn."""


def _add_topologies(study: Study, figures: _Figures) -> None:
    seen: list[Any] = []
    for variant in study.variants:
        record = variant.group.records[0]
        table = variant.tables.get("topology")
        key = [table, record.start.num_nodes, record.start.seed]
        if key in seen:
            continue
        seen.append(key)
        if len(seen) > _MOST_SETTINGS:
            continue
        where = f" of {variant.group.name}" if len(seen) > 1 else ""
        try:
            graph = build_topology(network(record, variant.tables)).at(0)
        except (JwinsError, OSError, KeyError, TypeError) as error:
            figures.absent.append(f"The topology{where} is not drawn: it cannot be rebuilt ({error}).")
            continue
        degrees = [len(row) for row in graph.recipients]
        span = f"{degrees[0]}" if len(set(degrees)) == 1 else f"{min(degrees)} to {max(degrees)}"
        others = "other" if span == "1" else "others"
        caption = f"{_start(_described(table))}: {graph.num_nodes} nodes, each sends to {span} {others}."
        W = graph.matrix()
        if np.allclose(W, W.T) and graph.num_nodes > 1:
            gap = 1 - float(np.sort(np.abs(np.linalg.eigvalsh(W)))[-2])
            caption += f" Spectral gap of the mixing matrix: {gap:.3g}."
        changing = isinstance(table, Mapping) and (
            table.get("dynamic") or table.get("kind") == "one_peer_exponential"
        )
        if changing:
            caption += " This is round 0; every round has another graph."
        caption += f" Seed {record.start.seed}." if changing or _is_drawn(table) else ""
        slug = "topology" if len(seen) == 1 else f"topology-{len(seen)}"
        figures.setting.append(topology_chart(slug, f"Who sends to whom{where}", caption, graph))
    if len(seen) > _MOST_SETTINGS:
        figures.absent.append(f"{len(seen) - _MOST_SETTINGS} more topologies are not drawn.")


def _is_drawn(table: Any) -> bool:
    return isinstance(table, Mapping) and table.get("kind") in ("regular", "small_world", "erdos_renyi")


def _add_partitions(study: Study, figures: _Figures) -> None:
    seen: list[str] = []
    for variant in study.variants:
        record = variant.group.records[0]
        key = record.start.fingerprints.get("partition", "")
        if key in seen:
            continue
        seen.append(key)
        if len(seen) > _MOST_SETTINGS:
            continue
        where = f" of {variant.group.name}" if len(seen) > 1 else ""
        found = _partition(record, variant.tables)
        if isinstance(found, str):
            figures.absent.append(f"The partition{where} is not drawn: {found}.")
            continue
        table = variant.tables.get("task", {}).get("partition")
        natural = isinstance(table, Mapping) and table.get("kind") == "by_key"
        samples = np.array(found.samples)
        caption = f"{_start(_described(table))}: {samples.sum():,} samples; "
        caption += f"{samples.min():,} to {samples.max():,} on a node"
        if found.counts:
            held = [sum(count > 0 for count in row) for row in found.counts]
            caption += f", of {min(held)} to {max(held)} classes" if len(found.labels) > 1 else ""
        caption += f". Seed {record.start.seed}."
        slug = "partition" if len(seen) == 1 else f"partition-{len(seen)}"
        title = f"Who holds which samples{where}"
        figures.setting.append(
            partition_chart(slug, title, caption, found, by_class=not natural and len(found.labels) > 1)
        )
    if len(seen) > _MOST_SETTINGS:
        figures.absent.append(f"{len(seen) - _MOST_SETTINGS} more partitions are not drawn.")


def _partition(record: Record, tables: Mapping[str, Any]) -> Partition | str:
    """Who holds what, or why that is not known."""
    path = record.folder / "partition.json"
    if path.is_file():
        try:
            counts = json.loads(path.read_text(encoding="utf-8"))
            return Partition(
                tuple(map(int, counts["samples"])),
                tuple(map(int, counts.get("labels", ()))),
                tuple(tuple(map(int, row)) for row in counts.get("counts", ())),
            )
        except (ValueError, KeyError, TypeError):
            return f"{path.name} of the run is damaged"
    task = tables.get("task", {})
    data = task.get("data")
    at_hand = task.get("name") == "digits" or (data is not None and (record.folder / data).exists())
    if not isinstance(task, Mapping) or not task.get("name") or not at_hand:
        return "the run has no partition.json, and its data are not at hand"
    try:
        experiment = load(record.folder / "config.toml")
        built = build_task(experiment)
        counts = partition_counts(built, build_partition(experiment, built))
    except (JwinsError, OSError) as error:
        return f"the run has no partition.json, and it cannot be drawn again ({error})"
    rows = tuple(tuple(row) for row in counts.get("counts", ()))
    return Partition(tuple(counts["samples"]), tuple(counts.get("labels", ())), rows)


# --- HTML -------------------------------------------------------------------------------------------------


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
        metric: to show, instead of the comparison's or the task's first.

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
        written += save(_renamed(chart, name), beside)
    write_atomically(out, text.encode())
    return out, written


def _renamed(chart: Chart, slug: str) -> Chart:
    return Chart(slug, chart.title, chart.caption, chart.alt, chart.draw)


def render(studies: Sequence[Study], *, figures: str = "") -> tuple[str, list[tuple[str, Chart]]]:
    """The page as text, and its charts with the names of their files.

    Args:
        studies: at least one.
        figures: where the reader finds the figures as PDF and PNG; "" for nowhere.
    """
    title = _title([study.name for study in studies])
    bodies, charts = [], []
    for index, study in enumerate(studies, start=1):
        body, own = _render_study(study, index, alone=len(studies) == 1)
        bodies.append(body)
        prefix = "" if len(studies) == 1 else f"{_slug(study.name) or 'study'}-{index}-"
        charts += [(prefix + chart.slug, chart) for chart in own]
    navigation = ""
    if len(studies) > 1:
        items = "".join(f'<li><a href="#s{i}">{_e(s.name)}</a></li>' for i, s in enumerate(studies, start=1))
        navigation = f'<nav aria-label="Studies"><ul>{items}</ul></nav>'
    what = (
        " ".join(_compared_what(study) for study in studies[:1])
        if len(studies) == 1
        else (f"{len(studies)} studies, {sum(len(s.records) for s in studies)} runs.")
    )
    lead = f'<p class="lead">{_e(headline(studies[0]))}</p>' if len(studies) == 1 else ""
    foot = "Every number here is computed from the runs’ metrics.jsonl. "
    if figures:
        foot += f"The figures as PDF and PNG: folder {figures}. "
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_e(title)}</title>
<style>
{_theme()}
{_CSS}
</style>
</head>
<body>
<header>
<h1>{_e(title)}</h1>
<p class="what">{_e(what)}</p>
{lead}
{navigation}
</header>
<main>
{"".join(bodies)}
</main>
<footer><p>{_e(foot)}</p></footer>
</body>
</html>
"""
    return text, charts


def _title(names: Sequence[str]) -> str:
    """Of a page: the studies' names; of the groups of one comparison, its name.

    >>> _title(["digits", "movielens"]), _title(["scale: 96 nodes", "scale: 192 nodes"])
    ('digits and movielens', 'scale')
    """
    common = names[0].partition(": ")[0]
    if len(names) > 1 and all(name.startswith(f"{common}: ") for name in names):
        return common
    return and_list(names) if len(names) < 4 else f"{len(names)} studies: {and_list(names[:2])}, …"


def _compared_what(study: Study) -> str:
    names = [group.name for group in study.groups]
    seeds = len({record.start.seed for record in study.records})
    nodes = " / ".join(dict.fromkeys(str(record.start.num_nodes) for record in study.records))
    who = and_list(names) if len(names) < 8 else f"{len(names)} variants"
    return f"{who} on {nodes} nodes, {seeds} seed{'s' if seeds != 1 else ''}."


def _render_study(study: Study, index: int, *, alone: bool) -> tuple[str, list[Chart]]:
    styles = styles_of([group.algorithm for group in study.groups])
    figures = _figures(study, styles)
    numbers = {id(chart): i for i, chart in enumerate(figures.all)}
    level = 2 if alone else 3

    def heading(text: str) -> str:
        return f"<h{level}>{_e(text)}</h{level}>"

    def draw(charts: Sequence[Chart], kind: str = "grid") -> str:
        parts = [
            f"<figure>{_figure_title(chart, level + 1)}{as_svg(chart, f's{index}f{numbers[id(chart)]}')}"
            f"{f'<figcaption>{_e(chart.caption)}</figcaption>' if chart.caption else ''}</figure>"
            for chart in charts
        ]
        return f'<div class="{kind}">{"".join(parts)}</div>' if parts else ""

    legend = _legend(study, styles)
    parts = [f'<section class="study" id="s{index}">']
    if not alone:
        parts.append(f"<h2>{_e(study.name)}</h2>")
        parts.append(f'<p class="what">{_e(_compared_what(study))}</p>')
        parts.append(f'<p class="lead">{_e(headline(study))}</p>')
    parts += [f'<p class="note">{_e(note)}</p>' for note in study.notes]
    parts += [_tiles(study), _settings(study)]
    parts += [heading(_start(_words(study.target.metric))), legend, draw(figures.curves)]
    parts += [heading("Savings"), _savings(study)]
    parts += [heading("What the bytes carried"), '<div class="pair">', draw(figures.traffic, "one")]
    parts += [_bytes_table(study), "</div>"]
    if figures.nodes:
        parts += [heading("Spread over nodes"), '<div class="pair">', draw(figures.nodes, "one")]
        parts += [_nodes_table(study), "</div>"]
    parts += [heading("Consensus and training"), legend, draw(figures.training, "grid two")]
    parts += [heading("Network and data"), draw(figures.setting, "grid two")]
    parts += [f'<p class="note">{_e(reason)}</p>' for reason in figures.absent]
    parts += [heading("How it was run"), _provenance(study, level + 1)]
    parts.append("</section>")
    return "\n".join(parts), figures.all


def _figure_title(chart: Chart, level: int) -> str:
    return f"<h{level}>{_e(chart.title)}</h{level}>"


def _legend(study: Study, styles: Sequence[Style]) -> str:
    items = []
    for group, style in zip(study.groups, styles, strict=True):
        mark = ", ✕" if group.diverged == "diverged" else ""
        name = group.name + (f" ({group.diverged}{mark})" if group.diverged else "")
        items.append(f"<li>{_swatch(style)}{_e(name)}</li>")
    return f'<ul class="legend" aria-label="Legend">{"".join(items)}</ul>'


def _swatch(style: Style) -> str:
    from matplotlib.markers import MarkerStyle

    marker = MarkerStyle(style.marker)
    polygons: Any = marker.get_path().transformed(marker.get_transform()).to_polygons()
    shapes = "".join(
        f'<polygon points="{" ".join(f"{17 + x * 6.5:.1f},{6 - y * 6.5:.1f}" for x, y in polygon)}"/>'
        for polygon in polygons
    )
    dash = "" if style.dash == "-" else f' stroke-dasharray="{" ".join(f"{2 * d:g}" for d in style.dash[1])}"'
    return (
        f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true" style="color:{style.variable}">'
        f'<path d="M1 6H33" stroke="currentColor" stroke-width="2" fill="none"{dash}/>'
        f'<g fill="currentColor">{shapes}</g></svg>'
    )


def _tiles(study: Study) -> str:
    table = study.table()
    line = table[_subject(study)]
    full = next((other for other in table if other.variant == study.full and other is not line), None)
    metric = _words(study.target.metric)
    tiles = [(_less(line.saving_raw), "bytes against uncompressed full sharing")]
    if full is not None and line.saving_codec is not None:
        tiles.append((_less(line.saving_codec), "bytes against full sharing, same codec"))
    beside = f"final {metric}"
    if full is not None:
        beside += f"; {full.variant}: {_value(full.final, study)}"
    tiles.append((_value(line.final, study), beside))
    if study.has_target and full is not None:
        if line.bytes_to_target is None:
            tiles.append(("never", f"reached {number(study.target.value, percent=study.percent)} {metric}"))
        elif full.bytes_to_target is not None:
            ratio = line.bytes_to_target / full.bytes_to_target
            goal = number(study.target.value, percent=study.percent)
            tiles.append((f"{ratio:.2f} ×", f"the bytes of {full.variant} to {goal} {metric}"))
    items = "".join(f"<div><dt>{_e(what)}</dt><dd>{_e(value)}</dd></div>" for value, what in tiles)
    return f'<p class="of">{_e(line.variant)}</p><dl class="tiles">{items}</dl>'


def _less(saving: float) -> str:
    return "—" if math.isnan(saving) else f"{_signed(-saving * 100, 1)} %"


def _settings(study: Study) -> str:
    items = "".join(
        f"<div><dt>{_e(key)}</dt><dd>{_e(value)}</dd></div>" for key, value in _common_settings(study)
    )
    return f'<dl class="settings">{items}</dl>'


# --- Tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    text: str
    small: str = ""
    kind: str = ""
    title: str = ""


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[_Cell | str] | Sequence[str]],
    caption: str,
    *,
    kind: str = "wide",
) -> str:
    """A table. On a narrow screen ``cards`` becomes a list of cards, others scroll under their first column.

    The roles keep it a table for a screen reader, whatever CSS makes of it.
    """
    heads = "".join(f'<th scope="col" role="columnheader">{_e(text)}</th>' for text in head)
    body = []
    for row in rows:
        cells = []
        for index, (label, cell) in enumerate(zip(head, row, strict=True)):
            cell = _Cell(cell) if isinstance(cell, str) else cell
            small = f" <small>{_e(cell.small)}</small>" if cell.small else ""
            title = f' title="{_e(cell.title)}"' if cell.title else ""
            css = f' class="{cell.kind}"' if cell.kind else ""
            if index == 0:
                name = re.sub(r"(?<=\w)([._])(?=\w)", r"\1<wbr>", _e(cell.text))
                cells.append(f'<th scope="row" role="rowheader"{css}{title}>{name}{small}</th>')
            else:
                content = f"<span>{_e(cell.text)}{small}</span>"
                cells.append(f'<td role="cell" data-label="{_e(label)}"{css}{title}>{content}</td>')
        body.append(f'<tr role="row">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_e(caption)}">'
        f'<table class="{kind}" role="table"><caption>{_e(caption)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table></div>'
    )


def _savings(study: Study) -> str:
    metric = _words(study.target.metric)
    table = study.table()
    full = next((line for line in table if line.variant == study.full), None)
    compared = any(line.difference is not None for line in table)
    mixed = any(line.reference not in (None, study.full) for line in table)
    head = ["variant", "seeds", f"final {metric}"]
    head += ["difference" if mixed else "difference to full"] if compared else []
    head += ["bytes per node", "saving against raw"]
    head += ["saving, same codec"] if full is not None else []
    head += (
        ["bytes to target", "rounds to target", f"{_clock(study)} s to target".strip()]
        if study.has_target
        else []
    )
    head.append("status")
    rows = []
    for line in table:
        beside = [] if line.final_sd is None else [f"± {_value(line.final_sd, study, unit=False)}"]
        beside += [f"{line.counted} of {line.seeds} seeds"] if 0 < line.counted < line.seeds else []
        row: list[_Cell | str] = [
            _Cell(line.variant, line.tuned),
            str(line.seeds),
            _Cell(_value(line.final, study), ", ".join(beside)),
        ]
        if compared:
            row.append(_difference_cell(line, study, named=mixed))
        row += [size(line.bytes_per_node), share(line.saving_raw)]
        if full is not None:
            row.append("—" if line.saving_codec is None else share(line.saving_codec))
        if study.has_target:
            row += _target_cells(line, full)
        row.append(_Cell(line.status, kind="" if line.status == "finished" else "bad"))
        rows.append(row)
    over = study.final_over
    last = "a run’s last evaluation" if over == 1 else f"the mean of a run’s last {over} evaluations"
    says = [
        f"Final: {last}; mean ± standard deviation over seeds.",
        "Raw: full sharing at 4 bytes per parameter and recipient, in as many rounds.",
    ]
    if any(line.counted < line.seeds for line in table):
        says.append("Runs that diverged have no final value, and their bytes are not counted.")
    if compared:
        says.append("Difference: paired by seed, with a 95 % interval (Student’s t).")
    if study.has_target:
        says.append(describe_target(study.target) + " “Never reached” counts no bytes.")
    elif full is None:
        says.append("There is no run with full sharing, so nothing is stated against it.")
    elif len(table) < 2:
        says.append("There is nothing to compare full sharing with.")
    alike, statement = _alike(study)
    mark = "" if alike else ' class="warn"'
    caption = f"Final {metric}, bytes and savings"
    return (
        _table(head, rows, caption, kind="cards")
        + f'<p class="under">{_e(" ".join(says))}</p><p{mark}>{_e(statement)}</p>'
        + _further(study)
    )


def _aside(text: str) -> _Cell:
    """``42 % (why)`` with what is in brackets below, and small."""
    value, _, why = text.partition(" (")
    return _Cell(value, why.removesuffix(")"))


def _further(study: Study) -> str:
    """The comparison's other tables, computed anew from the runs where they can be."""
    text = ""
    if len(study.targets) > 1 or study.baselines:
        targets = study.targets or (study.target,)
        found = []
        for group in study.groups:
            found += reach(group, targets, study.group(study.baselines.get(group.name)))
        table = reach_table(found, study.target)
        reached: list[list[_Cell | str]] = [[first, _aside(goal), *rest] for first, goal, *rest in table.rows]
        text += _table(table.head, reached, table.title)
    if study.also:
        known = [m for m in study.also if all(m in r.evaluations[-1].metrics for r in study.records)]
        table = metrics_table([(g, study.reference(g)) for g in study.groups], known, study.final_over)
        text += _details(table.title, _table(table.head, table.rows, table.title)) if known else ""
    for title, rows in study.recorded.items():
        head = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[shown(row.get(key)) for key in head] for row in rows]
        text += _details(
            title, _table(list(map(_words, head)), cells, f"{title}, as the comparison recorded it")
        )
    return text


def _difference_cell(line: Line, study: Study, *, named: bool) -> _Cell | str:
    if line.difference is None or math.isnan(line.difference):
        return "—"
    scale, digits = (100.0, 1) if study.percent else (1.0, 4)
    to = f" (to {line.reference})" if named else ""
    text = _signed(line.difference * scale, digits)
    if line.difference_half is None:
        return _Cell(text, f"one seed{to}")
    low, high = line.difference - line.difference_half, line.difference + line.difference_half
    return _Cell(text, f"{_signed(low * scale, digits)} to {_signed(high * scale, digits)}{to}")


def _target_cells(line: Line, full: Line | None) -> list[_Cell | str]:
    if line.bytes_to_target is None or line.rounds_to_target is None or line.seconds_to_target is None:
        return [_Cell("never reached", kind="bad"), "—", "—"]
    some = [] if line.reached == line.seeds else [f"{line.reached} of {line.seeds} seeds"]
    times = []
    if full is not None and full is not line and full.bytes_to_target:
        times = [f"{line.bytes_to_target / full.bytes_to_target:.2f} × full"]
    faster = ""
    if full is not None and full is not line and full.seconds_to_target:
        faster = f"{line.seconds_to_target / full.seconds_to_target:.2f} × full"
    return [
        _Cell(size(line.bytes_to_target), ", ".join([*times, *some])),
        f"{line.rounds_to_target:.0f}",
        _Cell(f"{line.seconds_to_target:.1f}", faster),
    ]


def _bytes_table(study: Study) -> str:
    rows = []
    for group in study.groups:
        parts = bytes_by_part(group)
        total = sum(parts.values())
        cells: list[_Cell | str] = [group.name]
        cells += [
            _Cell(size(value), f"{value / total * 100:.1f} %" if total else "") for value in parts.values()
        ]
        rows.append([*cells, size(total)])
    legend = "".join(
        f'<li><span class="box" style="background:var(--{THEME[colour][0]})"></span>{part}</li>'
        for part, colour in PARTS.items()
    )
    meaning = (
        "Values and positions as encoded; header: frame headers, lengths and checksums; key: whole frames that "
        "bring a neighbour’s replica up to date; control: messages without parameters."
    )
    return (
        f'<div><ul class="legend">{legend}</ul>'
        f"{_table(['variant', *PARTS, 'total'], rows, 'Bytes per node by content, mean over seeds')}"
        f'<p class="under">{_e(meaning)}</p></div>'
    )


def _nodes_table(study: Study) -> str:
    """The metric over the nodes at the end; other metrics folded away."""
    under = "At the last evaluation, each mean over seeds. Average model: the metric of the nodes’ mean model."
    chosen = study.target.metric
    others = [m for m in study.records[0].evaluations[-1].metrics if m != chosen]
    text = f'<div>{_spread_table(study, chosen)}<p class="under">{_e(under)}</p>'
    for metric in others:
        text += _details(_start(_words(metric)), _spread_table(study, metric))
    return text + "</div>"


def _spread_table(study: Study, metric: str) -> str:
    percent = metric_percent(metric)

    def told(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return number(statistics.fmean(known), percent=percent) if known else "—"

    rows: list[list[_Cell | str]] = []
    for group in study.groups:
        last = [record.evaluations[-1].metrics for record in group.records]
        spreads = [metrics[metric] for metrics in last if metric in metrics]
        parts = ("mean", "sd", "min", "max", "average_model")
        rows.append([group.name, *(told(getattr(s, part) for s in spreads) for part in parts)])
    head = ["variant", "mean", "sd over nodes", "lowest node", "highest node", "average model"]
    return _table(head, rows, f"{_start(_words(metric))} over the nodes, at the end")


def _provenance(study: Study, level: int) -> str:
    parts = [_wall_clock(study)]
    differing = differing_keys([compared_settings(v.tables) for v in study.variants])
    if differing and len(study.variants) > 1:
        flats = [flat(compared_settings(v.tables)) for v in study.variants]
        rows = [[key, *(shown(flat.get(key)) for flat in flats)] for key in differing]
        head = ["setting", *(group.name for group in study.groups)]
        parts.append(_table(head, rows, "Every setting in which the variants differ", kind="wide left"))
    parts.append(_details("Runs: seeds, digests, final parameters", _runs_table(study)))
    parts.append(_details("Fingerprints: what was alike", _fingerprints_table(study)))
    parts.append(_details("Versions and machines", _versions(study)))
    for variant in study.variants:
        tables = {
            key: dict(value) if isinstance(value, Mapping) else value for key, value in variant.tables.items()
        }
        if isinstance(tables.get("run"), dict):
            tables["run"].pop("folder", None)
            tables["run"].pop("seed", None)
        if isinstance(tables.get("task"), dict):
            tables["task"].pop("data", None)
        seeds = ", ".join(str(record.start.seed) for record in variant.group.records)
        text = f"# seeds: {seeds}; left out: run.seed, run.folder, task.data\n{write_toml(tables)}"
        config = f'<pre tabindex="0"><code>{html.escape(text)}</code></pre>'
        parts.append(_details(f"Configuration of {variant.group.name}", config))
    return "\n".join(parts)


def _details(title: str, body: str) -> str:
    return f"<details><summary>{_e(title)}</summary>{body}</details>"


def _wall_clock(study: Study) -> str:
    """Real time by activity, as means over the seeds that ended."""
    rows, activities = [], []
    walls: list[tuple[str, list[dict[str, float]]]] = []
    overheads = {line.variant: line.overhead for line in study.table()}
    for group in study.groups:
        ended = [record.end.wall_s for record in group.records if record.end is not None]
        walls.append((group.name, ended))
        activities += [activity for wall in ended for activity in wall]
    activities = [a for a in dict.fromkeys(activities) if a != "total"]
    if not activities:
        return '<p class="note">No run has ended by itself, so there is no wall-clock time.</p>'
    for name, ended in walls:
        if not ended:
            continue
        mean = {a: statistics.fmean(w.get(a, 0.0) for w in ended) for a in [*activities, "total"]}
        share_of = overheads[name]
        overhead = "—" if share_of is None else f"{share_of * 100:.0f} % of training"
        rows.append([name, *(f"{mean[a]:.1f}" for a in activities), f"{mean['total']:.1f}", overhead])
    caption = "Wall-clock seconds by activity, mean over seeds"
    head = ["variant", *activities, "total", "all but training and evaluation"]
    under = "Of the process that ended the run; a resumed run counts from where it was resumed."
    return _table(head, rows, caption) + f'<p class="under">{_e(under)}</p>'


def _runs_table(study: Study) -> str:
    parent = Path(os.path.commonpath([record.folder.resolve().parent for record in study.records]))
    rows: list[list[_Cell | str]] = []
    for group in study.groups:
        for record in group.records:
            sha = "—" if record.end is None else record.end.sha256
            status = record.status
            reason = record.end.reason if record.end is not None else ""
            rows.append(
                [
                    _Cell(group.name, f"seed {record.start.seed}"),
                    _Cell(status, reason, kind="" if status == "finished" else "bad"),
                    str(record.rounds),
                    _Cell(f"{record.evaluations[-1].time_s:.1f}", "" if _clock(study) else _clock_of(record)),
                    _Cell(record.start.digest, kind="code"),
                    _Cell(sha if len(sha) < 20 else sha[:16] + "…", kind="code", title=sha),
                    record.start.batching,
                    _Cell(record.folder.resolve().relative_to(parent).as_posix(), kind="code"),
                ]
            )
    seconds = f"{_clock(study)} s".strip()
    head = ["run", "status", "rounds", seconds, "digest", "SHA-256 of all parameters", "batching", "folder"]
    return _table(head, rows, "Every run", kind="cards")


def _fingerprints_table(study: Study) -> str:
    names = list(dict.fromkeys(name for record in study.records for name in record.start.fingerprints))
    rows = [
        [
            _Cell(group.name, f"seed {record.start.seed}"),
            *(_Cell(record.start.fingerprints.get(name, "—"), kind="code") for name in names),
        ]
        for group in study.groups
        for record in group.records
    ]
    return _table(["run", *names], rows, "Fingerprints of every run")


def _versions(study: Study) -> str:
    found: dict[str, list[str]] = {}
    for record in study.records:
        machine = {f"machine: {key}": value for key, value in record.start.machine.items()}
        for key, value in (record.start.versions | machine).items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    items = "".join(f"<div><dt>{_e(key)}</dt><dd>{_e(' / '.join(found[key]))}</dd></div>" for key in found)
    return f'<dl class="settings">{items}</dl>'


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40]


def _e(text: object) -> str:
    """Escaped, and numbers kept together with their units."""
    return html.escape(re.sub(r"(?<=\d) (?=[%×]|[kMG]?B\b)", "\N{NO-BREAK SPACE}", str(text)), quote=True)


def _theme() -> str:
    light = ";".join(f"--{name}:{value}" for name, value, _ in THEME.values())
    dark = ";".join(f"--{name}:{value}" for name, _, value in THEME.values())
    more = "--card:#f6f7f9;--line:#d8dce1;--accent:#0b5394;--bad:#a4262c;--warn:#fff4d6;--warn-text:#553c00"
    more_dark = (
        "--card:#1b1f26;--line:#343b45;--accent:#8cc4ff;--bad:#ff9a94;--warn:#3a2f10;--warn-text:#ffe3a3"
    )
    return f":root{{{light};{more}}}\n@media (prefers-color-scheme: dark){{:root{{{dark};{more_dark}}}}}"


_CSS = """
*{box-sizing:border-box}
:root{color-scheme:light dark}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);line-height:1.5;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",sans-serif}
header,main,footer{max-width:78rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.25rem}
footer{padding-block:1.5rem 3rem;color:var(--muted);font-size:.875rem}
h1{font-size:clamp(1.6rem,4vw,2.3rem);line-height:1.2;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.4rem;line-height:1.25;margin:2.75rem 0 .75rem;overflow-wrap:anywhere}
h3{font-size:1.12rem;margin:2rem 0 .6rem}
h4{margin:0 0 .4rem}
figure h3,figure h4{font-size:1rem;margin:0 0 .35rem}
section.study+section.study{border-top:3px solid var(--line);margin-top:3.5rem}
p{margin:.5rem 0;max-width:75ch}
.what,.under,figcaption{color:var(--muted);font-size:.9rem}
.lead{font-size:1.12rem;max-width:70ch;margin:.9rem 0 1.25rem}
.note{border-left:3px solid var(--axis);padding-left:.75rem}
.warn{background:var(--warn);color:var(--warn-text);padding:.5rem .75rem;border-radius:6px}
a{color:var(--accent)}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:0;list-style:none}
.of{font-weight:600;margin:1.5rem 0 .5rem;max-width:none}
dl{margin:0}
dt{color:var(--muted);font-size:.85rem}
dd{margin:0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11.5rem,1fr));gap:.75rem}
.tiles>div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem;
display:flex;flex-direction:column-reverse;justify-content:flex-end}
.tiles dd{font-size:1.75rem;font-weight:650;line-height:1.2;letter-spacing:-.01em}
.settings{display:grid;grid-template-columns:repeat(auto-fill,minmax(12.5rem,1fr));gap:.6rem 1.5rem;
margin:1.25rem 0;font-size:.95rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;list-style:none;padding:0;margin:.25rem 0 .75rem;
font-size:.95rem}
.legend li{display:flex;align-items:center;gap:.5rem;overflow-wrap:anywhere}
.swatch{width:34px;height:12px;flex:none}
.box{width:.85rem;height:.85rem;border-radius:2px;flex:none;display:inline-block}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20.5rem),1fr));gap:1.5rem 1.75rem}
.grid.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
.pair{display:grid;grid-template-columns:minmax(0,1fr);gap:1rem 2rem;align-items:start}
figure{margin:0;min-width:0}
.two figure svg,.one figure svg{max-width:31rem}
figure>svg{display:block;width:100%;height:auto;overflow:visible;font-variant-numeric:tabular-nums}
svg *{stroke-linejoin:round}
svg text{font-family:inherit}
.hit{fill:transparent}
.hit:hover{fill:var(--text);fill-opacity:.15}
figcaption{margin-top:.3rem}
.scroll{overflow-x:auto;margin:.5rem 0}
.scroll:focus-visible,pre:focus-visible,summary:focus-visible{
outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);font-size:.9rem;padding-bottom:.4rem}
th,td{padding:.5rem .6rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:baseline}
th:first-child,.left td,.left th{text-align:left}
thead th{color:var(--muted);font-weight:600;font-size:.84rem;vertical-align:bottom}
tbody th{font-weight:600;overflow-wrap:anywhere;min-width:8rem}
td small,th small{display:block;color:var(--muted);font-weight:400;white-space:nowrap}
td span{white-space:nowrap}
.left td span{white-space:normal;overflow-wrap:anywhere}
.bad{color:var(--bad);font-weight:600}
td.bad span,td.bad small{white-space:normal}
.code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:.82rem}
details{border:1px solid var(--line);border-radius:8px;padding:.15rem .9rem;margin:.6rem 0}
summary{cursor:pointer;padding:.45rem 0;font-weight:600;overflow-wrap:anywhere}
pre{overflow-x:auto;background:var(--card);padding:.8rem;border-radius:6px;margin:.25rem 0 .8rem}
@media (min-width:64rem){.pair{grid-template-columns:minmax(0,2fr) minmax(0,3fr)}}
@media (max-width:44rem){
header,main,footer{padding-inline:1rem}
.lead{font-size:1.02rem}
.tiles{grid-template-columns:1fr 1fr}
.tiles dd{font-size:1.4rem}
.settings{grid-template-columns:1fr 1fr}
.wide{font-size:.86rem}
.wide th,.wide td{padding:.4rem .45rem}
.wide th:first-child{position:sticky;left:0;background:var(--page);padding-left:0;
min-width:6.5rem;max-width:8rem;overflow-wrap:anywhere;border-right:1px solid var(--line)}
.left td span{display:inline-block;min-width:5.5rem}
.cards,.cards tbody,.cards caption{display:block}
.cards thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.cards tr{display:block;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:.5rem .85rem;margin:.6rem 0}
.cards th[scope=row]{display:block;border:0;padding:.2rem 0 .35rem;font-size:1.02rem}
.cards td{display:flex;justify-content:space-between;align-items:baseline;gap:1rem;border:0;
border-top:1px solid var(--line);padding:.3rem 0;text-align:right}
.cards td::before{content:attr(data-label);color:var(--muted);text-align:left;
font:400 .9rem system-ui,sans-serif}
.cards td span{white-space:normal;overflow-wrap:anywhere;min-width:0}
}
@media print{body{font-size:10pt}.scroll{overflow:visible}details{break-inside:avoid}}
""".strip()
