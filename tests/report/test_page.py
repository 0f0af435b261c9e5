"""The report: its numbers against the raw JSONL, its HTML, and how a browser lays it out."""

from __future__ import annotations

import ast
import html
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from made_up import TABLES, group, record, study
from markupsafe import escape
from matplotlib import rc_context
from typer.testing import CliRunner

import jwins
import jwins.report
from empty_figures import empty_figures
from jwins.cli.app import app
from jwins.compare import compare
from jwins.compare.comparison import load_comparison
from jwins.errors import ConfigError, DataError, UsageError
from jwins.report.bar_charts import PartitionCounts, partition_chart
from jwins.report.chart import as_svg, drawing_style, save
from jwins.report.colours import KIND_COLOURS, THEME, styles_of
from jwins.report.comparison_table import page_table
from jwins.report.headline import verdict
from jwins.report.page import render, write_page
from jwins.report.page_tables import savings_notes
from jwins.report.seed_groups import Target
from jwins.report.studies import Study, StudyVariant, _direction, gather
from jwins.report.templating import templates
from jwins.run_folder.archive import write as write_archive

NASTY = "JWINS <script>alert('x')</script> & $\\alpha$ \"quoted\", a rather long name that goes on and on"

FILE = f"""
name = "tiny"
base = "digits"
[nodes]
count = 6
[topology]
kind = "regular"
degree = 3
[train]
batching = "loop"
[run]
rounds = 12
eval_every = 3
[compare]
seeds = [1, 2]
target = {{ way = 0.5 }}
folder = "FOLDER"
[[variants]]
name = "full sharing"
sharing = {{ kind = "full" }}
[[variants]]
name = {json.dumps(NASTY)}
[[variants]]
name = "random 10 %"
sharing = {{ kind = "random_k", fraction = 0.1 }}
[[variants]]
name = "diverging"
sharing = {{ kind = "full" }}
train = {{ optimizer = {{ kind = "sgd", lr = 1e6 }} }}
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    (folder / "tiny.toml").write_text(FILE.replace("FOLDER", str(folder / "out")))
    with empty_figures():
        compare(load_comparison(folder / "tiny.toml"), jobs=1)
    return folder / "out"


@pytest.fixture(scope="module")
def written(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("page")
    return write_page([compared], folder / "deep" / "report.html", figures=folder / "figures")


@pytest.fixture(scope="module")
def page(written: tuple[Path, list[Path]]) -> str:
    return written[0].read_text("utf-8")


@pytest.fixture
def single(compared: Path, tmp_path: Path) -> Path:
    """A copy of one JWINS run, to be changed."""
    slug = next(p for p in compared.iterdir() if p.name.startswith("jwins"))
    return Path(shutil.copytree(slug / "seed-1", tmp_path / "single"))


def rendered(*folders: Path) -> str:
    return render(gather(folders))[0]


# --- Reading a page ---------------------------------------------------------------------------------------

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Elements, tables and text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._text: list[str] | None = None
        self._caption: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}>: an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th", "caption"):
            self._text = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert "svg" in self.open, f"<{tag}/> is not HTML"

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()
        if tag in ("td", "th"):
            self._rows[-1].append(" ".join("".join(self._text or []).split()))
            self._text = None
        if tag == "caption":
            self._caption, self._text = "".join(self._text or []), None
        if tag == "table":
            self.tables[self._caption or ""] = self._rows

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)


def raw(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any] | None]:
    """A run's rows, without any code of the package."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        rows[0],
        [row for row in rows if row["kind"] == "eval"],
        rows[-1] if rows[-1]["kind"] == "end" else None,
    )


def size(number: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} B"


# --- Numbers ----------------------------------------------------------------------------------------------


def test_the_savings_table_says_what_the_raw_metrics_say(compared: Path, page: str) -> None:
    table = Page(page).tables["Final accuracy, bytes and savings"]
    head, body = table[0], {row[0]: row for row in table[1:]}
    runs = {
        slug.name: [raw(slug / f"seed-{seed}") for seed in (1, 2)]
        for slug in compared.iterdir()
        if slug.is_dir()
    }
    slugs = {
        name: next(s for s in runs if s.startswith(re.sub("[^a-z]+", "-", name.lower())[:7])) for name in body
    }
    assert len(body) == len(runs) == 4

    def accuracy(row: dict[str, Any]) -> float:
        return float(row["metrics"]["accuracy"]["mean"])

    full = runs[slugs["full sharing"]]
    starts = [accuracy(rows[0]) for _, rows, _ in full]
    target = statistics.fmean(starts) + 0.5 * (
        statistics.fmean(accuracy(rows[-1]) for _, rows, _ in full) - statistics.fmean(starts)
    )
    for name, row in body.items():
        mine = runs[slugs[name]]
        cell = dict(zip(head, row, strict=True))
        nodes = mine[0][0]["num_nodes"]
        ends = [end["status"] for _, _, end in mine if end is not None]
        finals = [accuracy(rows[-1]) * 100 for _, rows, _ in mine]
        if ends == ["diverged", "diverged"]:
            assert cell["final accuracy"] == "—"
        else:
            assert ends == ["finished", "finished"]
            assert (
                cell["final accuracy"] == f"{statistics.fmean(finals):.1f} ± {statistics.stdev(finals):.1f} %"
            )

        sent = [sum(rows[-1]["traffic"].values()) / nodes for _, rows, _ in mine]
        assert cell["bytes/node"] == ("—" if "diverged" in ends else size(statistics.fmean(sent)))
        uncompressed = [4 * start["dim"] * 3 * rows[-1]["round"] for start, rows, _ in mine]  # degree 3
        if "diverged" in ends:
            assert cell["saving vs raw"] == cell["saving vs codec"] == "—"
        else:
            assert cell["saving vs raw"] == f"{(1 - sum(sent) / sum(uncompressed)) * 100:.1f} %"
            whole = [
                next(sum(r["traffic"].values()) / nodes for r in theirs if r["round"] == rows[-1]["round"])
                for (_, rows, _), (_, theirs, _) in zip(mine, full, strict=True)
            ]
            assert cell["saving vs codec"] == f"{(1 - sum(sent) / sum(whole)) * 100:.1f} %"

        hits = [next((r for r in rows if accuracy(r) >= target), None) for _, rows, _ in mine]
        reached = [hit for hit in hits if hit is not None]
        if not reached:
            assert cell["bytes to target"] == cell["rounds"] == cell["seconds"] == "—"
        else:
            needed = statistics.fmean(sum(hit["traffic"].values()) / nodes for hit in reached)
            some = " (1/2)" if len(reached) == 1 else ""
            assert cell["bytes to target"] == size(needed) + some
            assert cell["rounds"] == f"{statistics.fmean(hit['round'] for hit in reached):.0f}{some}"
            assert cell["seconds"] == f"{statistics.fmean(hit['time_s'] for hit in reached):.1f}{some}"

        if name == "full sharing" or "diverged" in ends:
            assert cell["difference to full sharing [95 %]"] == "—"
        else:
            apart = [
                accuracy(rows[-1]) * 100 - accuracy(theirs[-1]) * 100
                for (_, rows, _), (_, theirs, _) in zip(mine, full, strict=True)
            ]
            mean, half = statistics.fmean(apart), 12.706 * statistics.stdev(apart) / math.sqrt(2)
            text = cell["difference to full sharing [95 %]"]
            found = [float(v) for v in re.findall(r"[-+]?[\d.]+", text)]
            assert found == pytest.approx([mean, mean - half, mean + half], abs=0.051)
        assert ("diverged" in cell["status"]) == ("diverged" in ends)
    assert "diverged @" in body["diverging"][-1]


def test_the_bytes_are_split_as_in_the_raw_metrics(compared: Path, page: str) -> None:
    table = Page(page).tables["Bytes per node by content, mean over seeds"]
    for row in table[1:]:
        if row[0] not in ("full sharing", "random 10 %"):
            continue
        slug = row[0].replace(" %", "-").replace(" ", "-").strip("-")
        ends = [raw(compared / slug / f"seed-{seed}")[1][-1]["traffic"] for seed in (1, 2)]
        for part, cell in zip(table[0][1:-1], row[1:-1], strict=True):
            assert cell.startswith(size(statistics.fmean(end[part] / 6 for end in ends)))


def test_the_headline_follows_the_runs(compared: Path, page: str) -> None:
    study = gather([compared])[0]
    text = " ".join(verdict(study))
    best = text.split(" ends at ")[0]
    assert escape(best) in page
    lines = {line.variant.lower(): line for line in study.table()}
    assert f"ends at {lines[best.lower()].final * 100:.1f} % accuracy" in text
    assert re.search(r"Unfinished: diverging (\d )?diverged @ \d", text)


def test_every_run_and_setting_is_in_the_page(compared: Path, page: str) -> None:
    for run in sorted(compared.glob("*/seed-*")):
        start, _, end = raw(run)
        assert start["digest"] in page
        assert end is not None
        assert end["sha256"] in page
    tables = Page(page).tables
    differing = [row[0] for row in tables["Every setting in which the variants differ"][1:]]
    assert "sharing.kind" in differing
    assert "train.optimizer.lr" in differing
    assert "run.seed" not in differing
    assert "all 4 variants have the same initial model, samples on each node" in page
    assert str(compared) not in page  # where it was run is nobody's business


# --- HTML -------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained(page: str) -> None:
    parsed = Page(page)
    assert not {"script", "link", "iframe", "img", "object", "embed", "video"} & {
        tag for tag, _ in parsed.elements
    }
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href"):
                assert value is not None
                assert value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
            assert not name.startswith("on"), f"<{tag} {name}>"
    assert "http" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_the_page_is_well_formed_and_accessible(page: str) -> None:
    assert page.startswith("<!DOCTYPE html>")
    parsed = Page(page)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert set(targets) <= set(ids)
    assert parsed.headings[0] == 1
    assert parsed.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(parsed.headings, parsed.headings[1:], strict=False))
    for tag, attributes in parsed.elements:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "html":
            assert attributes["lang"] == "en"
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.elements


def test_names_are_escaped_everywhere(page: str) -> None:
    assert "<script" not in page
    assert escape("<script>alert('x')</script>") in page
    assert "alpha" in page


def test_figures_follow_the_theme(page: str) -> None:
    """No colour of a figure is written out, so that all of them change with the reader's theme."""
    figures = "".join(re.findall(r"<figure>.*?</figure>", page, re.DOTALL))
    assert not re.search(r"#[0-9a-fA-F]{6}\b", figures)
    assert "prefers-color-scheme: dark" in page
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    assert used <= set(re.findall(r"--([\w-]+):", page))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", [1, 2], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(theme: int) -> None:
    colours = {entry[0]: entry[theme] for entry in THEME.values()}
    ground = luminance(colours["page"])

    def contrast(colour: str) -> float:
        light, dark = max(luminance(colour), ground), min(luminance(colour), ground)
        return (light + 0.05) / (dark + 0.05)

    assert contrast(colours["text"]) >= 7
    assert contrast(colours["muted"]) >= 4.5
    for name in ("full-0", "top-k-0", "choco-0", "jwins-0", "kind-values"):
        assert contrast(colours[name]) >= 3, name
    assert contrast(colours["random-k-0"]) >= 2  # the palette's orange; its marker and table say it, too


def test_the_variants_of_an_ablation_have_different_colours() -> None:
    few = styles_of(["full", "jwins", "jwins", "jwins", "choco"])
    assert len({style.colour for style in few[1:4]} & {style.colour for style in (few[0], few[4])}) == 0
    many = styles_of(["full", *["jwins"] * 6, "choco"])
    looks = [(style.colour, str(style.dash)) for style in many]
    assert len(set(looks)) == 8
    assert len({THEME[style.colour][0].rpartition("-")[0] for style in many}) == 6  # CHOCO-SGD keeps its own
    assert many[-1].colour == styles_of(["choco"])[0].colour


# --- All kinds of runs ------------------------------------------------------------------------------------


def test_every_figure_is_also_pdf_and_png(
    compared: Path, written: tuple[Path, list[Path]], page: str, tmp_path: Path
) -> None:
    names = {path.stem for path in written[1]}
    assert names == {
        "accuracy-rounds",
        "accuracy-bytes",
        "accuracy-seconds",
        "pareto",
        "bytes-by-content",
        "per-node",
        "consensus",
        "training-loss",
        "partition",
    }
    for path in written[1]:
        assert path.parent == written[0].parents[1] / "figures"
        assert path.read_bytes().startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
    assert page.count("<figure>") == len(names)
    assert "folder ../figures" in page
    with empty_figures():
        name, chart = render(gather([compared]))[1][0]
    again = save(chart, tmp_path / chart.slug)
    first = [path for path in written[1] if path.stem == name]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in first]


@pytest.mark.usefixtures("unseen_figures")
def test_a_single_run_without_full_sharing(single: Path) -> None:
    text = rendered(single)
    head = Page(text).tables["Final accuracy, bytes and savings"][0]
    assert head[:4] == ["variant", "final accuracy", "bytes/node", "saving vs raw"]
    assert head[4:] == ["bits/parameter, step and link (node)", "worst 10 % of nodes", "status"]
    assert "There is no run with full sharing" in text
    assert "±" not in text.partition("Savings")[2].partition("mean ±")[0]
    Page(text)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_run_that_is_not_finished(single: Path, rows: int) -> None:
    lines = (single / "metrics.jsonl").read_text().splitlines(keepends=True)
    (single / "metrics.jsonl").write_text("".join(lines[:rows]) + lines[rows][:40])  # killed while writing
    text = rendered(single)
    rounds = raw_rounds(lines[rows - 1])
    assert f"unfinished @ {rounds}" in text
    assert "No run has ended by itself" in text
    assert ("nothing measured yet" in text) == (rows == 2)
    Page(text)


def raw_rounds(line: str) -> int:
    return int(json.loads(line)["round"])


def test_a_run_that_has_only_begun_is_refused(single: Path) -> None:
    first = (single / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (single / "metrics.jsonl").write_text(first)
    with pytest.raises(DataError, match="nothing has been measured yet"):
        gather([single])


@pytest.mark.usefixtures("unseen_figures")
def test_a_comparison_that_is_not_finished(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "part"))
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "full-sharing" / "seed-2")
    begun = folder / "random-10" / "seed-2" / "metrics.jsonl"
    begun.write_text(begun.read_text().splitlines(keepends=True)[0])
    study = gather([folder])[0]
    assert {g.name: len(g.records) for g in study.groups} == {
        "full sharing": 1,
        "diverging": 2,
        NASTY.replace("/", "-"): 2,
        "random 10 %": 1,
    }
    text = render([study])[0]
    assert "This comparison has not finished" in text
    assert "1 run has measured nothing yet" in text
    assert "Not every variant has every seed" in text


@pytest.mark.usefixtures("unseen_figures")
def test_runs_that_are_not_alike_are_said_to_be_so(compared: Path, single: Path) -> None:
    path = single / "metrics.jsonl"
    fingerprint = json.loads(path.read_text().splitlines()[0])["fingerprints"]["partition"]
    path.write_text(path.read_text().replace(fingerprint, "0" * 16))
    text = rendered(compared / "full-sharing" / "seed-1", single)
    assert "Not comparable: they differ in samples on each node" in text
    assert 'class="warn"' in text


@pytest.mark.usefixtures("unseen_figures")
def test_another_metric_where_lower_is_better(compared: Path, tmp_path: Path) -> None:
    runs = []
    for slug in ("full-sharing", "random-10"):
        run = Path(shutil.copytree(compared / slug / "seed-1", tmp_path / slug))
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(
            text.replace('"accuracy"', '"rank"')
            .replace('"loss"', '"squared_error"')
            .replace('"batching":', '"better":{"squared_error":"lower"},"batching":', 1)
        )
        runs.append(run)
    study = gather(runs)[0]
    assert study.target.metric == "squared_error"
    assert study.target.lower_is_better
    line = next(line for line in study.table() if "full" in line.variant)
    assert line.reached == 1
    text = render([study])[0]
    assert "Lower is better." in text
    last = raw(runs[0])[1][-1]["metrics"]["squared_error"]["mean"]
    assert Page(text).tables["Final squared error, bytes and savings"][1][1] == f"{last:.4f}"
    with pytest.raises(UsageError, match="--metric f1: these runs have rank, squared_error"):
        gather(runs, metric="f1")
    with pytest.raises(ConfigError, match=r"--metric = 'rank': .*; write --metric rank:lower \(or :higher\)"):
        gather(runs, metric="rank")
    assert gather(runs, metric="rank:lower")[0].target.lower_is_better
    assert not gather(runs, metric="rank:higher")[0].target.lower_is_better
    with pytest.raises(ConfigError, match=r"--metric = 'squared_error': .*leave out :higher"):
        gather(runs, metric="squared_error:higher")


def test_no_figure_depends_on_the_style_of_the_program(single: Path) -> None:
    page = rendered(single)
    with rc_context({"text.usetex": True, "font.size": 30, "lines.linewidth": 9}):
        assert rendered(single) == page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "style"),
    [
        ("module://no.such_backend", "text.usetex: True\nfont.size: 30\nlines.linewidth: 9\n"),
        ("nonsense", ""),
    ],
)
def test_no_figure_depends_on_the_users_matplotlib(
    backend: str,
    style: str,
    compared: Path,
    written: tuple[Path, list[Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    again = tmp_path_factory.mktemp("again")  # as far from the runs as the other page
    (again / "matplotlibrc").write_text(style)
    code = (
        "import sys\nfrom pathlib import Path\nfrom jwins.report.page import write_page\n"
        "runs, to = map(Path, sys.argv[1:])\n"
        "write_page([runs], to / 'deep' / 'report.html', figures=to / 'figures')\n"
        "assert 'torch' not in sys.modules, 'a report takes seconds longer with torch'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(compared), str(again)],
        env={**os.environ, "MPLBACKEND": backend, "MATPLOTLIBRC": str(again)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page, figures = written
    assert len(figures) > 5
    assert (again / "deep" / "report.html").read_bytes() == page.read_bytes()
    for figure in figures:
        assert (again / "figures" / figure.name).read_bytes() == figure.read_bytes()


def test_a_comparison_keeps_its_rules_for_another_metric(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "rules"))
    summary = json.loads((folder / "summary.json").read_text())
    summary["final_over"] = 2
    for row in summary["table"]:
        row["tuned"] = "x = 1"
        row["reference"] = "random 10 %" if row["variant"] == NASTY else None
    (folder / "summary.json").write_text(json.dumps(summary))
    study = gather([folder], metric="loss")[0]
    line = next(line for line in study.table() if line.variant == NASTY)
    mine = [raw(path)[1] for path in sorted(folder.glob("jwins*/seed-*"))]
    means = [statistics.fmean(row["metrics"]["loss"]["mean"] for row in rows[-2:]) for rows in mine]
    assert line.final == pytest.approx(statistics.fmean(means))
    assert (line.tuned, line.reference) == ("x = 1", "random 10 %")


@pytest.mark.parametrize(
    ("task", "metric", "expected"),
    [
        ("digits", "accuracy", "higher"),
        ("digits", "squared_error", None),
        ("movielens", "squared_error", "lower"),
        ("movielens", "own_within_half_star", "higher"),
        ("mine", "loss", "lower"),
    ],
)
def test_metrics_have_the_direction_that_bundled_tasks_declare(
    task: str, metric: str, expected: str | None
) -> None:
    variant = StudyVariant(group("x", "jwins", [record([0.1])]), {**TABLES, "task": {"name": task}})
    assert _direction(metric, variant) == expected


def test_a_record_keeps_its_tables_beside_its_runs(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "record" / "runs")
    (tmp_path / "record" / "runs" / "summary.json").rename(tmp_path / "record" / "summary.json")
    study = gather([tmp_path / "record"])[0]
    assert (study.name, study.target) == ("tiny", gather([compared])[0].target)
    assert not any("has not finished" in note for note in study.notes)


def packed(folder: Path, archive: Path) -> Path:
    """An archive of all files of a folder."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    write_archive(archive, files)
    return archive


@pytest.mark.usefixtures("unseen_figures")
def test_a_record_s_archive_gives_the_same_page_as_its_folder(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "folder" / "runs.tar.xz")  # a folder, by the name of the archive
    (tmp_path / "record").mkdir()
    archive = packed(compared, tmp_path / "record" / "runs.tar.xz")
    folder = rendered(tmp_path / "folder" / "runs.tar.xz")
    assert rendered(archive) == rendered(tmp_path / "record") == folder
    run = Path("full-sharing") / "seed-1"
    assert rendered(archive / run) == rendered(tmp_path / "folder" / "runs.tar.xz" / run)
    assert CliRunner().invoke(app, ["report", str(archive / run)]).exit_code == 0
    assert (tmp_path / "record" / "report.html").is_file()


def test_an_archive_of_several_comparisons_is_a_page_of_several_studies(compared: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(compared, tmp_path / "runs" / name)
    packed(tmp_path / "runs", tmp_path / "runs.tar.xz")
    shutil.rmtree(tmp_path / "runs")
    assert [study.name for study in gather([tmp_path])] == ["tiny", "tiny"]


@pytest.mark.usefixtures("unseen_figures")
def test_a_damaged_archive_is_named_with_the_remedy(compared: Path, tmp_path: Path) -> None:
    archive = packed(compared / "full-sharing", tmp_path / "runs.tar.xz")
    archive.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(
        DataError, match=rf"^{archive}: cut off after [\d,]+ bytes; restore or download it again$"
    ):
        gather([tmp_path])
    told = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert told.exit_code == 4
    assert "restore or download it again" in told.output


def test_runs_of_different_experiments_become_studies_of_their_own(
    compared: Path, single: Path, tmp_path: Path
) -> None:
    sets = ["nodes.count=4", "topology.kind=ring", "train.batching=loop", "run.rounds=2"]
    experiment = jwins.load("digits", sets)
    jwins.simulate(experiment.changed({"run": {"folder": tmp_path / "other"}}))
    studies = gather([compared, single, tmp_path / "other", compared])
    assert [study.name for study in studies] == ["tiny", f"tiny: {NASTY}".replace("/", "-"), "digits"]
    text, charts = render(studies)
    parsed = Page(text)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len({name for name, _ in charts}) == len(charts)
    assert all(b - a <= 1 for a, b in zip(parsed.headings, parsed.headings[1:], strict=False))
    assert {study.name for study in gather([tmp_path])} == {study.name for study in studies[1:]}


def test_values_that_are_not_finite_leave_a_dash(compared: Path) -> None:
    """The loss of a run that diverged is not a number."""
    study = gather([compared], metric="loss")[0]
    line = next(line for line in study.table() if line.variant == "diverging")
    text = render([study])[0]
    row = next(r for r in Page(text).tables["Final loss, bytes and savings"] if r[0] == "diverging")
    if math.isnan(line.final):
        assert row[1] == "—"
    assert not re.search(r"\bnan\b", text)


def test_the_same_run_is_counted_once(compared: Path) -> None:
    study = gather([compared, compared / "full-sharing" / "seed-1"])
    assert len(study) == 1
    assert len(study[0].records) == 8


@pytest.mark.usefixtures("unseen_figures")
def test_groups_with_a_full_sharing_each_are_studies(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "grouped"))
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["table"]:
        row["group"] = "wild" if row["variant"] == "diverging" else "tame"
    (folder / "summary.json").write_text(json.dumps(summary))
    studies = {study.name: study for study in gather([folder])}
    assert list(studies) == ["tiny: tame", "tiny: wild"]
    assert "diverging" in [group.name for group in studies["tiny: wild"].groups]
    assert all(study.full is not None for study in studies.values())
    render(list(studies.values()))


@pytest.mark.usefixtures("unseen_figures")
def test_several_targets_and_baselines(compared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compared, tmp_path / "several"))
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["table"]:
        row["group"] = None if row["variant"] in ("full sharing", "diverging") else "sparse"
    summary["targets"] = [
        {"variant": row["variant"], "target": value, "meaning": meaning, "baseline": baseline}
        for row in summary["table"]
        for value, meaning in ((0.2, "low"), (0.99, "out of reach"))
        for baseline in (["random 10 %"] if row["variant"] == NASTY else [None])
    ]
    summary["metrics"] = [{"metric": "loss", "variant": "full sharing"}]
    summary["tuning"] = [
        {"variant": "full sharing", "key": "train.optimizer.lr", "value": 0.05, "chosen": True}
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    study = gather([folder])[0]
    assert [target.value for target in study.targets] == [0.2, 0.99]
    tables = Page(render([study])[0]).tables
    rows = [row for row in tables["To each target"] if row[0] == NASTY]
    assert [row[2] for row in rows] == ["2/2", "never"]
    assert rows[0][-1] == "random 10 %"
    own, other = (
        [
            next(r for r in raw(p)[1] if r["metrics"]["accuracy"]["mean"] >= 0.2)
            for p in sorted(compared.glob(f"{slug}*/seed-*"))
        ]
        for slug in ("jwins", "random")
    )
    ratio = statistics.geometric_mean(
        sum(a["traffic"].values()) / sum(b["traffic"].values()) for a, b in zip(own, other, strict=True)
    )
    assert rows[0][-3].startswith(f"{ratio:.2f} [")
    assert tables["Further metrics"][1][:2] == ["loss", "full sharing"]
    assert "train.optimizer.lr" in tables["Tuning: tried values, as the comparison recorded it"][1]


@pytest.mark.usefixtures("unseen_figures")
def test_a_partition_that_was_not_recorded_is_said_to_be_missing(single: Path) -> None:
    recorded = json.loads((single / "partition.json").read_text())
    assert f"{sum(recorded['samples']):,} samples" in rendered(single)
    for damaged in (b"{", b"\xff"):
        (single / "partition.json").write_bytes(damaged)
        assert "partition.json of the run is damaged" in rendered(single)
    (single / "partition.json").unlink()
    assert "The partition is not drawn: the run has no partition.json" in rendered(single)


def test_the_partition_file_counts_what_each_node_holds(single: Path) -> None:
    counts = json.loads((single / "partition.json").read_text())
    assert [sum(row) for row in counts["counts"]] == counts["samples"]
    assert sum(counts["samples"]) == 1437
    assert counts["labels"] == list(range(10))


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        gather([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="neither a run"):
        gather([tmp_path])
    with pytest.raises(UsageError, match="no folder given"):
        gather([])
    (tmp_path / "summary.json").write_text("{}")
    run = tmp_path / "v" / "seed-1"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="not the summary of a comparison"):
        gather([tmp_path])


def test_large_partitions_stay_small() -> None:
    counts = tuple(tuple((i + k) % 3 for k in range(90)) for i in range(400))
    partition = PartitionCounts(tuple(map(sum, counts)), tuple(range(90)), counts)
    assert len(as_svg(partition_chart("p", "P", "", partition, by_class=True), "x")) < 100_000
    assert len(as_svg(partition_chart("p", "P", "", partition, by_class=False), "x")) < 100_000


@pytest.mark.usefixtures("unseen_figures")
def test_the_command_writes_page_and_figures(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(compared), "--out", "page.html", "--open", "no"])
    assert done.exit_code == 0, done.output
    assert "page: page.html" in done.output
    assert (tmp_path / "page.html").is_file()
    assert (tmp_path / "page-figures" / "partition.pdf").is_file()
    for arguments, code, message in (
        (["nowhere"], 4, "no such folder"),
        ([str(compared), "--out", "page.txt"], 2, "expected a file that ends in .html"),
        ([str(compared), "--open", "maybe"], 2, "expected yes or no"),
        ([str(compared), "--metric", "nonsense"], 2, "these runs have accuracy, loss"),
    ):
        failed = runner.invoke(app, ["report", *arguments])
        assert failed.exit_code == code
        assert message in failed.output


# --- In a browser -----------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MEASURE = """
<!DOCTYPE html><html><body>
<iframe id="page" style="width:WIDTHpx;height:900px;border:0" srcdoc="PAGE"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("page");
function box(element) {
  const range = element.ownerDocument.createRange();
  range.selectNodeContents(element);
  return range.getBoundingClientRect();
}
function name(element) { return element.textContent.trim().slice(0, 40); }
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, problems = [];
  page.querySelectorAll("details").forEach(d => d.open = true);
  if (root.scrollWidth > frame.clientWidth) problems.push(`page is ${root.scrollWidth} wide`);
  let smallest = 99, texts = 0;
  for (const svg of page.querySelectorAll("figure svg")) {
    const own = svg.getBoundingClientRect(), scale = own.width / svg.viewBox.baseVal.width;
    const labels = [...svg.querySelectorAll("text")].filter(t => name(t));
    const boxes = labels.map(t => t.getBoundingClientRect());
    texts += labels.length;
    boxes.forEach((a, i) => {
      smallest = Math.min(smallest, parseFloat(page.defaultView.getComputedStyle(labels[i]).fontSize) * scale);
      if (a.left < own.left - 3 || a.right > own.right + 3 || a.top < own.top - 3 || a.bottom > own.bottom + 3)
        problems.push(`${name(labels[i])}: out of its figure`);
      boxes.slice(i + 1).forEach((b, j) => {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1.5 && down > 3) problems.push(`${name(labels[i])} / ${name(labels[i + 1 + j])}: overlap`);
      });
    });
  }
  const blocks = [...page.querySelectorAll("h1,h2,h3,h4,p,li,dt,dd,figcaption,summary,caption")];
  for (const block of blocks) {
    const inside = box(block), outside = block.getBoundingClientRect();
    if (inside.right > outside.right + 1.5 && outside.width > 2) problems.push(`${name(block)}: overflows`);
  }
  const visible = blocks.map(b => [b, box(b)]).filter(([b, r]) => r.width > 2 && r.height > 2);
  for (let i = 1; i < visible.length; i++) {
    const [a, p] = visible[i - 1], [b, q] = visible[i];
    const across = Math.min(p.right, q.right) - Math.max(p.left, q.left);
    const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
    if (!a.contains(b) && across > 2 && down > 4) problems.push(`${name(a)} / ${name(b)}: overlap`);
  }
  for (const cell of page.querySelectorAll("td,th")) {
    const inside = box(cell), outside = cell.getBoundingClientRect();
    if (outside.width > 2 && inside.right > outside.right + 1.5) problems.push(`cell ${name(cell)}: overflows`);
  }
  document.getElementById("found").textContent = JSON.stringify({problems, smallest, texts});
};
</script></body></html>
"""


def laid_out(page: str, width: int, folder: Path) -> dict[str, Any]:
    """Return problems, the smallest text and the number of texts in a page of this width in Chromium."""
    assert CHROMIUM is not None
    wrapper = folder / f"wrapper-{width}.html"
    wrapper.write_text(
        MEASURE.replace("WIDTH", str(width)).replace("PAGE", html.escape(page, quote=True)), "utf-8"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [*command, wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(folder)},
    )
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not load: {done.stderr[-500:]}"
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overlaps_or_sticks_out(page: str, tmp_path: Path, width: int) -> None:
    found = laid_out(page, width, tmp_path)
    assert found["problems"] == []
    assert found["texts"] > 60
    assert found["smallest"] >= 9


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_measurement_notices_what_overlaps(page: str, tmp_path: Path) -> None:
    wide = page.replace("<main>", '<main><div style="width:2000px">wide</div>').replace(
        "svg text {", "svg text {font-size:40px!important;"
    )
    problems = laid_out(wide, 390, tmp_path)["problems"]
    assert any("wide" in problem for problem in problems)
    assert any("overlap" in problem for problem in problems)
    assert any("out of its figure" in problem for problem in problems)


# --- TensorBoard ------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars in all event files, as they lie on the disk."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, float(value.tensor.float_val[0])))
    return found


def test_tensorboard_gets_each_evaluation_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    experiment = jwins.load(
        "digits",
        [
            "nodes.count=4",
            "topology.kind=ring",
            "run.rounds=6",
            "run.eval_every=2",
            "run.checkpoint_every=2",
            "run.tensorboard=true",
        ],
    ).changed({"run": {"folder": tmp_path / "run"}})

    class KilledError(Exception):
        pass

    def kill(progress: Any) -> None:
        if progress.row is not None and progress.row.round == 4:
            raise KilledError

    with pytest.raises(KilledError):
        jwins.simulate(experiment, progress=kill)
    assert [step for step, _ in scalars(tmp_path / "run")["accuracy/mean"]] == [0, 2, 4]
    result = jwins.simulate(experiment, resume=True)
    found = scalars(tmp_path / "run")
    expected = [(row["round"], row["accuracy_mean"]) for row in result.rows]
    assert [step for step, _ in found["accuracy/mean"]] == [0, 2, 4, 6]
    assert [value for _, value in found["accuracy/mean"]] == pytest.approx([value for _, value in expected])
    assert [value for _, value in found["bytes/total"]] == [row["bytes_total"] for row in result.rows]
    jwins.simulate(experiment, resume=True)  # complete: written anew, not twice
    assert scalars(tmp_path / "run") == found


def test_tensorboard_does_not_change_what_is_run(tmp_path: Path) -> None:
    experiment = jwins.load("digits")
    assert experiment.changed({"run": {"tensorboard": True}}).digest() == experiment.digest()


def test_a_missing_tensorboard_is_said_before_anything_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    experiment = jwins.load("digits", ["run.tensorboard=true"]).changed({"run": {"folder": tmp_path / "run"}})
    with pytest.raises(ConfigError, match=r'pip install "jwins\[tensorboard\]"'):
        jwins.simulate(experiment)
    assert not (tmp_path / "run").exists()


def test_a_study_knows_its_runs(compared: Path) -> None:
    study = gather([compared])[0]
    assert isinstance(study, Study)
    assert study.percent
    assert study.has_target


# --- What is in it, and what is not -----------------------------------------------------------------------


def parts_study(**parts: int) -> Study:
    runs = [group("full sharing", "full", [record([0.1, 0.9])])]
    return study([*runs, group("JWINS", "jwins", [record([0.1, 0.8], parts=parts)])])


@pytest.mark.usefixtures("unseen_figures")
def test_a_difference_over_fewer_seeds_is_not_said_to_be_that_of_the_final_values() -> None:
    full = group("full sharing", "full", [record([0.1, 0.5 + 0.1 * s], seed=s) for s in (1, 2, 3)])
    some = group("JWINS", "jwins", [record([0.1, 0.5 + 0.1 * s], seed=s) for s in (1, 2)])
    same = replace(full, name="again", algorithm="top_k")
    assert "final values as shown" in savings_notes(study([full, same]))
    assert "in brackets the number of seeds" in savings_notes(study([full, some, same]))
    table = page_table(study([full, some]).table(), Target("accuracy", 0.5))
    difference = table.head.index("difference to full sharing [95 %]")
    assert table.rows[1][difference] == "0.0 [0.0, 0.0] (2)"


def test_kinds_of_bytes_that_nobody_sent_are_left_out() -> None:
    text, charts = render([parts_study(values=3, positions=1)])
    table = Page(text).tables["Bytes per node by content, mean over seeds"]
    assert table[0] == ["variant", "values", "positions", "total"]
    assert "No variant sent bytes of header or keyframe or control." in text
    (chart,) = (chart for name, chart in charts if name == "bytes-by-content")
    with drawing_style():
        legend = chart.draw(True).legends[0]
    assert [one.get_text() for one in legend.get_texts()] == ["values", "positions"]
    full = Page(render([parts_study(values=1, positions=1, header=1, keyframe=1, control=1)])[0])
    assert full.tables["Bytes per node by content, mean over seeds"][0][1:-1] == list(KIND_COLOURS)


@pytest.mark.usefixtures("unseen_figures")
def test_every_number_of_the_curves_is_in_a_table(compared: Path, page: str) -> None:
    """Also of points that the axis leaves out."""
    head, *rows = Page(page).tables["Accuracy at each evaluation, mean over seeds"]
    runs = [raw(compared / "full-sharing" / f"seed-{seed}")[1] for seed in (1, 2)]
    assert [row[0] for row in rows] == [str(row["round"]) for row in runs[0]]
    for row, *evaluations in zip(rows, *runs, strict=True):
        mean = statistics.fmean(one["metrics"]["accuracy"]["mean"] for one in evaluations)
        assert row[head.index("full sharing")] == f"{mean * 100:.1f} %"
    many = study([group("JWINS", "jwins", [record([0.1] * 200)])])
    rows = Page(render([many])[0]).tables["Accuracy at each evaluation, mean over seeds; 51 of 200 evaluations"]
    assert (rows[1][0], rows[-1][0]) == ("0", "1990")


@pytest.mark.usefixtures("unseen_figures")
def test_activities_that_took_no_time_are_left_out(single: Path) -> None:
    path = single / "metrics.jsonl"
    *rows, last = path.read_text().splitlines(keepends=True)
    end = json.loads(last)
    end["wall_s"] = {"start-up": 0.01, "training": 2.0, "total": 3.0}
    path.write_text("".join([*rows, json.dumps(end) + "\n"]))
    text = rendered(single)
    head = Page(text).tables["Wall-clock seconds by activity, mean over seeds"][0]
    assert head == ["variant", "training", "total", "all but training and evaluation"]


def test_the_heat_map_has_a_key_and_leaves_out_cells_without_samples() -> None:
    counts = ((0, 7, 1), (40, 0, 2), (0, 0, 11))
    partition = PartitionCounts(tuple(map(sum, counts)), (3, 4, 9), counts)
    with drawing_style():
        drawn = partition_chart("p", "P", "", partition, by_class=True).draw(False)
        drawn.draw_without_rendering()
    cells, key = drawn.axes
    assert cells.images[0].get_array().tolist() == [[None, 40, None], [7, None, None], [1, 2, 11]]
    assert key.get_ylim() == (1, 40)
    labels = [label.get_text() for label in cells.get_yticklabels()]
    assert [label for label in labels if label] == ["3", "4", "9"]
    opacity = cells.images[0].to_rgba(cells.images[0].get_array())[..., 3]
    assert opacity[0, 0] == 0.0 < opacity[2, 0] < opacity[2, 2] < opacity[0, 1] == 1.0


@pytest.mark.parametrize(
    "places", [("/home/me/secret place", "C:\\Users\\me"), ("../../secret", "other/folder")]
)
def test_files_are_named_without_their_folders(places: tuple[str, str]) -> None:
    """A task's, a graph's, and those that a task is given; in tables, configurations and notes."""
    here, there = places
    tables = [
        TABLES
        | {
            "task": {"file": f"{place}/my_task.py:Mine{i}", "options": {"words": "/home/me/words.txt", "n": i}},
            "topology": {"kind": "edge_list", "path": f"{place}/graph{i}.txt"},
        }
        for i, place in enumerate((here, there))
    ]
    groups = [group(f"v{i}", "jwins", [record([0.1, 0.9], folder=Path("/home/me/run"))]) for i in range(2)]
    variants = tuple(StudyVariant(one, table) for one, table in zip(groups, tables, strict=True))
    found = Study("s", variants, Target("accuracy", math.nan), None)
    text = render([found])[0]
    for part in ("/home", "secret", "Users", "other/folder", "me/"):
        assert part not in text
    assert "my_task.py:Mine0 / my_task.py:Mine1" in html.unescape(text).replace(
        "\N{NO-BREAK SPACE}", " "
    ).replace(", words words.txt, n 0", "").replace(", words words.txt, n 1", "")
    assert "graph0.txt" in text
    table = {row[0]: row[1:] for row in Page(text).tables["Every setting in which the variants differ"]}
    assert table["task.file"] == ["my_task.py:Mine0", "my_task.py:Mine1"]


# --- Templates --------------------------------------------------------------------------------------------


def test_no_html_is_written_in_python() -> None:
    for path in sorted(Path(jwins.report.__file__).parent.glob("*.py")):
        strings = [n.value for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Constant)]
        for text in (text for text in strings if isinstance(text, str)):
            assert not re.search(
                r"</?(div|p|table|t[dhr]|span|section|h[1-6]|ul|li|dl|dd|details)\b[^`]*>", text
            ), path


def test_templates_escape_and_refuse_what_is_missing() -> None:
    template = templates().from_string("{{ name }} {{ 'a' ~ name }}")
    assert template.render(name="<b>'\"&") == "&lt;b&gt;&#39;&#34;&amp; a&lt;b&gt;&#39;&#34;&amp;"
    with pytest.raises(UndefinedError):
        template.render()
    assert templates().from_string("{{ n }}").render(n="95.4 % of 3 MB, 2 by 2") == (
        "95.4\N{NO-BREAK SPACE}% of 3\N{NO-BREAK SPACE}MB, 2 by 2"
    )


def test_a_configuration_is_given_as_it_is(page: str) -> None:
    """Text that is copied from the page is TOML with plain blanks."""
    configs = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page, re.DOTALL)
    assert len(configs) == 4
    for text in configs:
        assert "\N{NO-BREAK SPACE}" not in text
        tables = tomllib.loads(html.unescape(text))
        assert tables["nodes"]["count"] == 6


@pytest.mark.usefixtures("unseen_figures")
def test_several_studies_begin_with_who_is_best_in_each() -> None:
    one = parts_study(values=1)
    text = render([one, study([group("JWINS", "jwins", [record([0.1, 0.9])])])])[0]
    navigation = text.partition("<nav")[2].partition("</nav>")[0]
    assert "Full sharing ends at 90.0" in navigation
    assert "JWINS ends at 90.0" in navigation


FORBIDDEN = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_has_nothing_to_say_and_asks_for_nothing(page: str, tmp_path: Path) -> None:
    """No message on the console where every request and script is forbidden, and would leave one there."""
    assert console(page, tmp_path / "as it is") == []
    for name, addition in (
        ("image", '<img src="http://127.0.0.1:9/x.png">'),
        ("script", '<script>console.log("hello")</script>'),
        ("style", '<link rel="stylesheet" href="http://127.0.0.1:9/x.css">'),
    ):
        (message,) = console(page.replace("<main>", f"<main>{addition}"), tmp_path / name)
        assert "Content Security Policy" in message


def console(page: str, folder: Path) -> list[str]:
    """Return Chromium's messages about a page, which may load nothing else."""
    assert CHROMIUM is not None
    folder.mkdir()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{FORBIDDEN}">'
    (folder / "page.html").write_text(page.replace("<head>", f"<head>{policy}"), "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", (folder / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(folder)},
    )
    assert "</html>" in done.stdout, done.stderr[-500:]
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
