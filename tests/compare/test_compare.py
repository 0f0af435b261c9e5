"""Comparisons: cells, like for like, and tables whose every number is checked against the raw JSONL."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

import jwins
from jwins import compare as comparing
from jwins import sharing
from jwins.compare import compare, workers
from jwins.compare.comparability import check_comparable
from jwins.compare.comparison import Comparison, Variant, load_comparison
from jwins.compare.plan import target_of
from jwins.compare.settings import CompareConfig, TargetConfig
from jwins.errors import ConfigError, DataError, ResumeError
from jwins.experiment import Experiment, FullConfig
from jwins.report.chart import save_figure
from jwins.report.comparison_table import latex, markdown, metrics_table, table_cells
from jwins.report.curve_charts import figure
from jwins.report.formatting import difference_text, share
from jwins.report.page import render
from jwins.report.seed_groups import Group, Target
from jwins.report.studies import gather
from jwins.report.summary_rows import SummaryRow, summary_row
from jwins.run_folder.lock import locked
from jwins.run_folder.record import Record, flat_rows, samples_note
from jwins.run_folder.rows import Spread, TrafficSplit

FILE = """
name = "tiny"
base = "digits"
[nodes]
count = 4
[topology]
kind = "ring"
[train]
batching = "loop"
[run]
rounds = 4
eval_every = 2
[compare]
seeds = [1, 2]
target = { accuracy = 0.15 }
folder = "FOLDER"
[[variants]]
name = "full sharing"
sharing = { kind = "full" }
[[variants]]
name = "random 20 %"
sharing = { kind = "random_k", fraction = 0.2 }
[[variants]]
name = "JWINS"
"""

Write = Callable[..., Comparison]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(extra: str = "", *overrides: str) -> Comparison:
        path = tmp_path / "tiny.toml"
        path.write_text(FILE.replace("FOLDER", str(tmp_path / "out")) + extra)
        return load_comparison(path, overrides)

    return write


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> comparing.ComparisonResult:
    folder = tmp_path_factory.mktemp("compared")
    path = folder / "tiny.toml"
    path.write_text(FILE.replace("FOLDER", str(folder / "out")))
    return compare(load_comparison(path), jobs=1)


def raw_rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def total(row: dict[str, Any]) -> int:
    return sum(row["traffic"].values())


# --- What is compared -------------------------------------------------------------------------------------


def test_cells_are_variants_times_seeds_in_their_own_folders(write: Write, tmp_path: Path) -> None:
    cells = write().cells()
    assert [(cell.variant.name, cell.seed) for cell in cells][:4] == [
        ("full sharing", 1),
        ("random 20 %", 1),
        ("JWINS", 1),
        ("full sharing", 2),
    ]
    assert cells[1].folder == tmp_path / "out" / "random-20" / "seed-1"
    assert all(cell.experiment.nodes.count == 4 and cell.experiment.run.seed == cell.seed for cell in cells)
    assert len({cell.experiment.digest() for cell in cells}) == len(cells)


def test_overrides_lie_over_every_variant(write: Write) -> None:
    comparison = write("", "run.rounds=7", "compare.seeds=[5]", "sharing.values=bfloat16")
    assert [cell.experiment.run.rounds for cell in comparison.cells()] == [7, 7, 7]
    assert all(v.experiment.sharing.values == "bfloat16" for v in comparison.variants)  # type: ignore[union-attr]


def test_bundled_comparison_loads() -> None:
    comparison = load_comparison("digits-compare", seeds=[4])
    assert [cell.seed for cell in comparison.cells()] == [4] * len(comparison.variants)
    assert comparison.full is not None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("train = { batch_size = 4 }", r"variants\[2\].train.batch_size = 4: 'full sharing' has 8.*'batches'"),
        ("wire = { codec = 'raw' }", r"variants\[2\].wire.codec = 'raw'.*allow_different = \['codec'\]"),
        ("sharing = { level = 3 }", r"sharing.level = 3: unknown key; did you mean \"levels\"\?"),
        ("[[variants]]\nname = 'jwins'", r"variants\[3\].name = 'jwins': has the same folder as 'JWINS'"),
        ("[[variants]]", r"variants\[3\].name = <missing>: required"),
        (
            "allow_different = ['codecs']",
            r"variants\[2\].allow_different\[0\] = 'codecs'.*did you mean \"codec\"",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    write: Write, extra: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write(extra)


def test_difference_can_be_allowed(write: Write) -> None:
    assert len(write("wire = { codec = 'raw' }\nallow_different = ['codec']").variants) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compare.seeds=[1, 1]"], r"compare.seeds\[1\] = 1: is in the list already"),
        (["compare.target={fraction=0.9, accuracy=0.9}"], "compare.target = .*expected one of"),
        (["compare.target={accuracy=95}"], r"compare.target = .*95.*at most 1; did you mean 0\.95\?"),
        (["compare.full=nobody"], "compare.full = 'nobody': expected a variant: full sharing"),
        (["sharing.kind=full", "compare.seeds=[]"], "compare.seeds = .*at least one"),
        (["run.seed=5"], r"run.seed = 5: a comparison has seeds of its own; use --seeds or compare.seeds"),
        (["run.folder=here"], r"run.folder = 'here': .*its own folder; use compare.folder"),
    ],
)
def test_comparison_settings_are_checked(write: Write, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write("", *overrides)


@pytest.mark.parametrize(
    ("override", "jobs", "message"),
    [
        *(
            pytest.param(
                "compare={metric='acuracy', lower_is_better=false}",
                jobs,
                r"compare.metric = 'acuracy': .*did you mean \"accuracy\"\?",
                marks=marks,
            )
            for jobs, marks in ((1, ()), (2, pytest.mark.slow))
        ),
        ('compare.also=["loss", "los"]', 1, r"compare.also\[1\] = 'los': .*accuracy, loss; did you mean"),
    ],
)
def test_a_misspelt_metric_is_found_in_the_first_runs(
    write: Write, override: str, jobs: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(write("", override, "run.rounds=5000", "run.eval_every=1000"), jobs=jobs)
    assert 1 <= len(list((tmp_path / "out").glob("*/*/metrics.jsonl"))) <= 2  # of six


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["compare.metric=acuracy"], r"compare.metric = 'acuracy': .*did you mean \"accuracy\"\?.* better = "),
        (["compare.metric=f1"], r"compare.metric = 'f1': the task declares .*set compare.lower_is_better"),
        (["compare.metric=own_rmse"], r"compare.metric = 'own_rmse': the task declares"),
        (
            ["compare.metric=loss", "compare.lower_is_better=false"],
            r"compare.lower_is_better = False: .*opposite",
        ),
        (["compare.lower_is_better=true"], r"compare.lower_is_better = True: .*opposite of accuracy"),
    ],
)
def test_a_metric_without_one_direction_is_refused_before_anything_runs(
    write: Write, settings: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(write("", *settings), jobs=1)
    assert not list((tmp_path / "out").glob("*/*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("task", "metric", "lower"),
    [
        ("digits", "accuracy", False),
        ("digits", "own_accuracy", False),
        ("digits", "loss", True),
        ("digits", "own_loss", True),
        ("movielens", "squared_error", True),
        ("movielens", "own_squared_error", True),
        ("movielens", "within_half_star", False),
        ("movielens", "loss", True),
    ],
)
def test_the_task_declares_the_direction_of_its_metrics(
    write: Write, task: str, metric: str, lower: bool
) -> None:
    settings = write("", f"task.name={task}", f"compare.metric={metric}").settings
    assert settings.lower_is_better is lower


OWN = """
from jwins.tasks.digits import Digits
class Own(Digits):
    better = {"rmse": "lower", "f1": "DIRECTION"}
"""


def test_an_own_task_declares_directions(write: Write, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN.replace("DIRECTION", "higher"))
    task = f"task={{file='{tmp_path}/own.py:Own'}}"
    for metric, lower in (("rmse", True), ("f1", False), ("loss", True), ("accuracy", False)):
        assert write("", task, f"compare.metric={metric}").settings.lower_is_better is lower
    (tmp_path / "own.py").write_text(OWN.replace("f1", "own_f1").replace("DIRECTION", "higher"))
    assert not write("", task, "compare.metric=own_f1").settings.lower_is_better
    (tmp_path / "own.py").write_text(OWN.replace("DIRECTION", "up"))
    with pytest.raises(ConfigError, match=r"Own.better\['f1'\] = 'up': expected higher or lower"):
        assert write("", task, "compare.metric=f1").settings
    (tmp_path / "own.py").write_text(OWN[: OWN.index("{")] + "'lower'")
    with pytest.raises(ConfigError, match=r"Own.better = 'lower': expected a direction for each metric"):
        assert write("", task, "compare.metric=f1").settings


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_tuning_picks_the_best_by_the_direction_of_the_metric(write: Write, metric: str) -> None:
    grid = "[tune]\nkey = 'train.optimizer.lr'\nvalues = [0.0001, 0.1]\n"
    found = compare(write(grid, f"compare.metric={metric}", "compare.seeds=[1]"), jobs=1, only=["full sharing"])
    assert any("train.optimizer.lr = 0.1, the best of 2" in note for note in found.notes)
    assert found.target is not None
    assert found.target.lower_is_better is (metric == "loss")


@pytest.mark.parametrize("names", [("日本", "中国"), ("日本 a", "中国 a"), ("α = 1", "β = 1"), ("%", "&")])
def test_variants_without_ascii_letters_have_folders_of_their_own(write: Write, names: tuple[str, str]) -> None:
    extra = "".join(f"[[variants]]\nname = '{name}'\n" for name in names)
    slugs = [variant.slug for variant in write(extra).variants]
    assert len(set(slugs)) == 5
    assert all(slug.isascii() for slug in slugs)


@pytest.mark.parametrize(
    "name",
    [
        "summary.json",
        "Summary.JSON",
        "table.md",
        "comparison.png",
        "report.html",
        "tuning.csv",
        "x" * 400,
        "lr 0.",
    ],
)
def test_a_variant_may_be_called_like_a_file_of_the_comparison(write: Write, name: str) -> None:
    comparison = write(f"[[variants]]\nname = '{name}'\n", "compare.seeds=[1]", "run.rounds=1")
    found = compare(comparison, jobs=1, only=[name])
    assert [row.variant for row in found.table] == [name]
    assert json.loads((found.folder / "summary.json").read_text())["table"][0]["variant"] == name


def test_tables_come_even_where_no_figure_can_be_drawn(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("latex could not be found")

    monkeypatch.setattr("jwins.compare.result.figure", broken)
    found = compare(write("", "compare.seeds=[1]", "run.rounds=1"), jobs=1, only=["JWINS"])
    assert "A figure could not be drawn: RuntimeError: latex could not be found" in found.notes
    assert (found.folder / "table.md").is_file()


@pytest.mark.usefixtures("complete_figures")
def test_one_node_is_compared_and_reported(write: Write) -> None:
    also = (
        "[[variants]]\nname = 'as jwins'\nsharing = { kind = 'random_k', fraction = 0.2 }\nbytes_as = 'JWINS'\n"
    )
    found = compare(
        write(also, "nodes.count=1", "task.partition={kind='iid'}", "compare.target={fraction=0.95}"), jobs=1
    )
    assert [row.bytes_per_node for row in found.table] == [0.0] * 4
    assert not any("could not be drawn" in note for note in found.notes)
    page, _ = render(gather([found.folder]))
    assert "nothing was sent" in page


@pytest.mark.usefixtures("complete_figures")
def test_a_target_that_is_met_before_anything_is_sent(write: Write) -> None:
    found = compare(write("", "compare.target={accuracy=0.0}", "compare.seeds=[1]"), jobs=1)
    assert [row.bytes_to_target for row in found.table] == [0.0] * 3
    for row in found.table:
        assert table_cells(row, percent=True)[5:8] == ["0 B", "0", "0.0"], row.variant
    page, _ = render(gather([found.folder]))
    assert "Unfinished" not in page


@pytest.mark.usefixtures("complete_figures")
def test_runs_that_their_rule_ends_are_compared(write: Write) -> None:
    rule = "run.stop={metric='loss', target=2.25}"
    found = compare(write("", rule, "run.eval_every=1", "run.rounds=9", "compare.seeds=[1]"), jobs=1)
    assert [row.status for row in found.table] == ["stopped @ 2", "stopped @ 8", "stopped @ 2"]
    assert [table_cells(row, percent=True)[-1] for row in found.table] == [row.status for row in found.table]
    for folder in found.folder.glob("*/seed-1"):
        assert len(list((folder / "final").glob("*.safetensors"))) == 4
    page, _ = render(gather([found.folder]))
    assert "Unfinished" not in page


def test_a_misspelt_metric_is_found_in_finished_runs(done: comparing.ComparisonResult) -> None:
    settings = done.comparison.compare.model_copy(update={"metric": "acuracy"})
    with pytest.raises(ConfigError, match=r"compare.metric = 'acuracy'"):
        compare(done.comparison.model_copy(update={"compare": settings}), jobs=1)


def test_a_file_in_the_place_of_the_folder_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ConfigError, match=r"compare.folder = '.*out': .*out is a file; choose another"):
        compare(write(), jobs=1)
    assert (tmp_path / "out").read_text() == "precious"


def test_relative_target_needs_full_sharing(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('base = "digits"\n[[variants]]\nname = "JWINS"\n')
    with pytest.raises(
        ConfigError, match=r"no variant has sharing\.kind = 'full'.* name a variant in compare\.full"
    ):
        load_comparison(path)


def test_full_sharing_may_be_an_object() -> None:
    names = {"random": sharing.random_k(0.2), "full": sharing.full(), "table": FullConfig()}
    variants = tuple(Variant(name=name, experiment=Experiment(sharing=one)) for name, one in names.items())
    for these, full in ((variants, "full"), (variants[::2], "table")):
        comparison = Comparison(name="objects", variants=these)
        assert comparison.full is not None
        assert comparison.full.name == full
        assert comparison.full_of(these[0]) is comparison.full


# --- Numbers ----------------------------------------------------------------------------------------------


def test_table_is_what_the_raw_metrics_say(done: comparing.ComparisonResult) -> None:
    out = done.folder
    dim = raw_rows(out / "jwins" / "seed-1", "start")[0]["dim"]
    sent_in_full = []
    for line, slug in zip(done.table, ("full-sharing", "random-20", "jwins"), strict=True):
        runs = [raw_rows(out / slug / f"seed-{seed}", "eval") for seed in (1, 2)]
        finals = [run[-1]["metrics"]["accuracy"]["mean"] for run in runs]
        sent = [total(run[-1]) / 4 for run in runs]
        sent_in_full = sent_in_full or sent
        assert [row["round"] for row in runs[0]] == [0, 2, 4]
        assert line.final == pytest.approx(statistics.fmean(finals), rel=1e-12)
        assert line.final_sd == pytest.approx(statistics.stdev(finals), rel=1e-12)
        assert line.bytes_per_node == statistics.fmean(sent)
        raw = 4 * dim * 2 * 4  # bytes x parameters x neighbours in a ring x rounds
        assert line.saving_raw == pytest.approx(1 - statistics.fmean(sent) / raw, rel=1e-12)
        assert line.saving_codec == pytest.approx(1 - sum(sent) / sum(sent_in_full), rel=1e-12, abs=1e-12)
        rate = 8 * statistics.fmean(sent) / (dim * 4 * 3)  # bits to both neighbours in a ring
        assert line.bits_per_link == pytest.approx(rate / 2)
        assert line.bits_per_node == pytest.approx(2 * rate)
        hits = [next((r for r in run if r["metrics"]["accuracy"]["mean"] >= 0.15), None) for run in runs]
        reached = [hit for hit in hits if hit is not None]
        assert line.reached == len(reached)
        if reached:
            assert line.bytes_to_target == statistics.fmean(total(hit) / 4 for hit in reached)
            assert line.rounds_to_target == statistics.fmean(hit["round"] for hit in reached)
            assert line.seconds_to_target == statistics.fmean(hit["time_s"] for hit in reached)
        assert line.status == "finished"
    assert done.table[0].saving_codec == 0.0


def test_bytes_of_edges_sum_to_the_total(done: comparing.ComparisonResult) -> None:
    folder = done.folder / "jwins" / "seed-1"
    with (folder / "traffic.csv").open(encoding="utf-8") as file:
        edges = list(csv.DictReader(file))
    assert len({(edge.pop("source"), edge.pop("target")) for edge in edges}) == len(edges) > 0
    assert sum(int(count) for edge in edges for count in edge.values()) == total(raw_rows(folder, "eval")[-1])


def test_files_hold_the_table(done: comparing.ComparisonResult) -> None:
    with (done.folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["final"]) for row in rows] == [line.final for line in done.table]
    summary = json.loads((done.folder / "summary.json").read_text())
    assert [row["bytes_per_node"] for row in summary["table"]] == [line.bytes_per_node for line in done.table]
    assert summary["target"]["value"] == 0.15
    markdown = (done.folder / "table.md").read_text()
    assert all(line.variant in markdown for line in done.table)
    assert "Target: accuracy 15.0 %." in markdown
    tex = (done.folder / "table.tex").read_text()
    rows_of_tex = [row for row in tex.splitlines() if row.endswith(r" \\")]
    assert len(rows_of_tex) == 1 + len(done.table)
    assert [row.split(" & ")[0] for row in rows_of_tex[1:]] == [
        line.variant.replace("%", r"\%") for line in done.table
    ]
    assert all(row.count(" & ") == 12 for row in rows_of_tex)
    assert re.search(r"[^\\\n]%", tex) is None, "a percent sign would begin a comment"
    assert (done.folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (done.folder / "comparison.pdf").read_bytes().startswith(b"%PDF")
    assert (done.folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (done.folder / "pareto.pdf").read_bytes().startswith(b"%PDF")
    assert (done.folder / "jwins" / "experiment.toml").is_file()


def test_a_variant_s_experiment_runs_beside_the_comparison(done: comparing.ComparisonResult) -> None:
    alone = jwins.load(done.folder / "jwins" / "experiment.toml")
    assert alone.name == "tiny: JWINS" == done.groups[2].records[0].start.name
    assert (
        alone.folder
        != done.comparison.model_copy(
            update={"compare": done.comparison.compare.model_copy(update={"folder": None})}
        ).folder
    )


def test_latex_escapes_what_it_would_take_for_commands() -> None:
    text = latex(
        ["a_b", "50 %"],
        [["[x] R&D", "-1.2 [-3.2, +0.8]"], ["top-k", "1 ± 2"], ["{\\}", "~^#$ 1e-3"], ["<b>", "a|b"]],
    )
    assert text.splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\_b & 50 \% \\",
        r"\midrule",
        r"{}[x] R\&D & $-$1.2 [$-$3.2, +0.8] \\",
        r"top-k & 1 $\pm$ 2 \\",
        r"\{\textbackslash{}\} & \textasciitilde{}\textasciicircum{}\#\$ 1e-3 \\",
        r"\textless{}b\textgreater{} & a\textbar{}b \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_rows_of_a_comparison_name_variant_and_seed(done: comparing.ComparisonResult) -> None:
    assert {(row["variant"], row["seed"]) for row in done.rows} == {
        (group.name, seed) for group in done.groups for seed in (1, 2)
    }
    assert [row["round"] for row in done.rows[:3]] == [0, 2, 4]


def test_flat_rows_fit_pandas(done: comparing.ComparisonResult) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(flat_rows(done.groups[2].records[0]))
    assert list(frame["round"]) == [0, 2, 4]
    parts = ["bytes_positions", "bytes_values", "bytes_header", "bytes_keyframe", "bytes_control"]
    assert (frame[parts].sum(axis=1) == frame["bytes_total"]).all()
    assert frame["accuracy_mean"].between(0, 1).all()
    assert not any(isinstance(value, dict | list) for value in frame.iloc[-1])


def test_relative_targets(done: comparing.ComparisonResult) -> None:
    finals = [record.final("accuracy") for record in done.groups[0].records]
    starts = [record.series("accuracy")[0] for record in done.groups[0].records]
    for wanted, value in (
        ({"fraction": 0.5}, 0.5 * statistics.fmean(finals)),
        ({"way": 0.5}, (statistics.fmean(starts) + statistics.fmean(finals)) / 2),
    ):
        settings = done.comparison.compare.model_copy(update={"target": TargetConfig(**wanted)})
        comparison = done.comparison.model_copy(update={"compare": settings})
        again = comparing.summarize(comparison)
        assert again.target is not None
        assert again.target.value == pytest.approx(value)
    comparing.summarize(done.comparison)  # the files as the other tests expect them


def test_a_target_names_fraction_and_variant_as_they_are(done: comparing.ComparisonResult) -> None:
    found = target_of(CompareConfig(), TargetConfig(way=0.995), "full, 20% or so", done.groups[0].records)
    assert found.meaning == "99.5 % of the way of full, 20% or so from start to end"
    found = target_of(CompareConfig(), TargetConfig(fraction=0.29), "x", done.groups[0].records)
    assert found.meaning == "29 % of the final value of x"


# --- Going on ---------------------------------------------------------------------------------------------


def test_finished_cells_are_not_run_again(done: comparing.ComparisonResult) -> None:
    logs = {path: path.stat().st_mtime_ns for path in done.folder.glob("*/seed-*/metrics.jsonl")}
    assert len(logs) == 6
    told: list[comparing.CellProgress] = []
    again = compare(done.comparison, jobs=1, progress=told.append)
    assert again.table == done.table
    assert logs == {path: path.stat().st_mtime_ns for path in logs}
    assert [progress.status for progress in told] == ["finished"] * 6


def test_unfinished_cells_go_on_to_the_same_result(
    write: Write, done: comparing.ComparisonResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second cell: it and the ones after it are run by the next call."""
    comparison = write("", "run.checkpoint_every=1")
    real = workers.run_job
    stop = {"now": False}

    def run_job(job: workers.Job, send: Any) -> str:
        def watch(progress: comparing.CellProgress) -> None:
            stop["now"] = progress.cell == 1 and progress.round >= 2 and progress.status == "running"
            send(progress)

        return real(job, watch, lambda: stop["now"])

    monkeypatch.setattr(workers, "run_job", run_job)
    first = compare(comparison, jobs=1)
    assert first.status == "interrupted"
    assert first.table == []
    monkeypatch.setattr(workers, "run_job", real)
    second = compare(comparison, jobs=1)
    assert second.table == done.table


@pytest.mark.slow
def test_side_by_side_gives_the_same(write: Write, done: comparing.ComparisonResult, tmp_path: Path) -> None:
    told: list[comparing.CellProgress] = []
    other = compare(write(), jobs=2, progress=told.append)
    assert other.table == done.table
    assert {progress.cell for progress in told if progress.status == "finished"} == set(range(6))
    ours = [group.records[0].end.sha256 for group in other.groups if group.records[0].end]
    theirs = [group.records[0].end.sha256 for group in done.groups if group.records[0].end]
    assert ours == theirs


SCRIPT = """
from dataclasses import dataclass
from pathlib import Path
import torch
from jwins.compare import compare
from jwins.compare.comparison import Comparison, Variant
from jwins.experiment import Experiment, JwinsConfig
from jwins.sharing import Full
from jwins.tasks import Dataset, Task
from jwins.tasks.partition import Iid
from jwins.topology import Ring

class Blobs(Task):
    def __init__(self):
        inputs = torch.arange(40.0).reshape(20, 2) / 40
        self.train = self.test = Dataset(inputs, torch.arange(20) % 2)
    def model(self):
        return torch.nn.Linear(2, 2)

class Half:
    def __call__(self, ctx):
        return 0.5

class Split:
    split = staticmethod(Iid().split)

class Graph:
    num_nodes = 3
    at = staticmethod(Ring(num_nodes=3).at)

@dataclass(frozen=True)
class Mine(Full):
    cutoff: object = Half

if __name__ == "__main__":
    tables = {"task": {"own": Blobs, "partition": Split()}, "nodes": {"count": 3}, "topology": Graph()}
    tables["train"] = {"batching": "loop"}  # takes fewer imports
    base = Experiment().changed({**tables, "sharing": Mine(), "run": {"rounds": 2}})
    half = base.changed({"sharing": JwinsConfig(cutoff=Half())})
    variants = [Variant(name="mine", experiment=base), Variant(name="half", experiment=half)]
    settings = {"seeds": [1, 2], "target": {"accuracy": 0.5}, "folder": Path("here")}
    print(compare(Comparison(name="c", variants=variants, compare=settings), jobs=2).status)
"""


@pytest.mark.slow
def test_objects_of_a_script_are_compared_in_parallel(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "finished\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_a_cell_come_through(write: Write, workers: int) -> None:
    with pytest.raises(ConfigError, match="model"):
        compare(write("", "task.options={model='none'}"), jobs=workers)


def test_folder_of_another_comparison_is_refused(done: comparing.ComparisonResult) -> None:
    tables = {"run": {"rounds": 5}}
    variants = tuple(
        variant.model_copy(update={"experiment": variant.experiment.changed(tables)})
        for variant in done.comparison.variants
    )
    with pytest.raises(ResumeError, match=r"run\.rounds = 4 there, 5 here"):
        compare(done.comparison.model_copy(update={"variants": variants}), jobs=1)


def test_tables_without_runs_do_not_replace_those_of_another_experiment(
    write: Write, done: comparing.ComparisonResult, tmp_path: Path
) -> None:
    shutil.copytree(done.folder, tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(ResumeError, match=r"full-sharing.seed-1: .*\(run\.rounds = 4 there, 5 here\)"):
        comparing.summarize(write("", "run.rounds=5"), partial=True)
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_tables_say_which_runs_they_are_without(
    write: Write, done: comparing.ComparisonResult, tmp_path: Path
) -> None:
    shutil.copytree(done.folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "full-sharing" / "seed-2")
    found = comparing.summarize(write('sharing = { kind = "jwins", levels = 3 }\n'), partial=True)
    assert found.notes == [
        "3 runs have not ended, or not begun; the tables are without: full sharing, seed 2; JWINS.",
        "JWINS: seed-1 holds another experiment (sharing.levels = 4 there, 3 here).",
    ]
    assert [line.variant for line in found.table] == ["full sharing", "random 20 %"]


def test_fingerprints_are_compared(done: comparing.ComparisonResult) -> None:
    """Fingerprints show changes that settings cannot, such as a data set that changed between two runs."""
    cells = {(cell.variant.name, cell.seed): Record.read(cell.folder) for cell in done.comparison.cells()}
    other = cells["JWINS", 2]
    prints = {**other.start.fingerprints, "partition": "another"}
    start = msgspec.structs.replace(other.start, fingerprints=prints)
    cells["JWINS", 2] = Record(other.folder, start, other.evaluations, other.end)
    with pytest.raises(ConfigError, match=r"'JWINS', seed 2, partition = 'another'.*not comparable"):
        check_comparable(done.comparison, cells)


TASK = """
from pathlib import Path

import torch
from jwins.tasks import Dataset, Task

class Mine(Task):
    def __init__(self, *, samples: str):
        lines = Path(samples).read_text().splitlines()
        inputs = torch.tensor([[float(word) for word in line.split()] for line in lines])
        self.train = self.test = Dataset(inputs, (torch.arange(len(inputs)) % 2))

    def model(self):
        return torch.nn.Linear(2, 2)
"""


@pytest.fixture
def own(tmp_path: Path) -> Write:
    """A comparison with a task of one's own: one file has its code, another its data."""
    (tmp_path / "mine.py").write_text(TASK)
    (tmp_path / "samples.txt").write_text("".join(f"{i} {i % 7}\n" for i in range(20)))

    def own(extra: str = "", *overrides: str) -> Comparison:
        task = f'file = "mine.py:Mine"\noptions = {{ samples = "{tmp_path / "samples.txt"}" }}'
        path = tmp_path / "own.toml"
        path.write_text(FILE.replace("FOLDER", str(tmp_path / "out")) + f"{extra}\n[task]\n{task}\n")
        return load_comparison(path, overrides)

    return own


def test_a_comparison_notices_that_data_or_code_have_changed(own: Write, tmp_path: Path) -> None:
    """Not when all have run: with the first row of the first run that is after the change."""
    assert compare(own("", "compare.seeds=[1]"), jobs=1).status == "finished"
    samples, code = tmp_path / "samples.txt", tmp_path / "mine.py"
    before = samples.read_text()
    samples.write_text(before.replace("3 3", "3 4"))
    with pytest.raises(
        ConfigError, match=r"full sharing, seed 2, data = .*the task's data have changed since .*seed-1"
    ):
        compare(own(), jobs=1)
    assert not (tmp_path / "out" / "jwins").joinpath("seed-2").exists()
    assert compare(own('allow_different = ["data"]'), jobs=1, only=["JWINS"]).status == "partial"
    shutil.rmtree(tmp_path / "out" / "full-sharing" / "seed-2")
    shutil.rmtree(tmp_path / "out" / "jwins" / "seed-2")
    samples.write_text(before)
    code.write_text("# A comment changes nothing.\n" + TASK)
    assert compare(own(), jobs=1).status == "finished"
    code.write_text(TASK.replace("Linear(2, 2)", "Linear(2, 2, bias=True)"))
    with pytest.raises(ConfigError, match=r"seed 3, task = .*the task's code has changed since"):
        compare(own("", "compare.seeds=[1, 2, 3]"), jobs=1)
    compare(own('allow_different = ["task"]', "compare.seeds=[1, 2, 3]"), jobs=1, only=["JWINS"])
    with pytest.raises(ConfigError, match=r"JWINS, seed 3, task = .*the task's code has changed since"):
        comparing.summarize(own("", "compare.seeds=[1, 2, 3]"), partial=True)


def test_a_comparison_says_that_versions_differ(
    write: Write, done: comparing.ComparisonResult, tmp_path: Path
) -> None:
    assert not any("versions" in note for note in done.notes)
    shutil.copytree(done.folder, tmp_path / "out")
    log = tmp_path / "out" / "jwins" / "seed-2" / "metrics.jsonl"
    now = done.groups[0].records[0].start.versions["torch"]
    log.write_text(log.read_text().replace(f'"torch":"{now}"', '"torch":"1.0"'))
    said: list[str] = []
    compared = compare(write(), jobs=1, log=said.append)
    assert f"The runs were made with different versions: torch {now} and 1.0." in compared.notes
    assert said == [note for note in compared.notes if "versions" in note]


def test_unmeasured_cell_is_an_error(write: Write) -> None:
    with pytest.raises(DataError, match="no run here"):
        comparing.summarize(write())


# --- Runs that end badly ----------------------------------------------------------------------------------


def test_diverged_run_is_a_result(write: Write) -> None:
    comparison = write(
        "[[variants]]\nname = 'too fast'\nsharing = { kind = 'full' }\ntrain = { optimizer = { lr = 1e20 } }",
        "compare.seeds=[1]",
        "run.eval_every=1",
    )
    table = {line.variant: line for line in compare(comparison, jobs=1).table}
    assert table["JWINS"].status == "finished"
    assert table["too fast"].status.startswith("diverged @ ")
    assert table_cells(table["too fast"], percent=True)[-1] == table["too fast"].status
    json.loads((comparison.folder / "summary.json").read_text())


def summary_rows(groups: list[Group], target: Target, *, full: str | None) -> list[SummaryRow]:
    whole = next((group for group in groups if group.name == full), None)
    return [summary_row(group, target, full=whole, reference=whole) for group in groups]


def record(values: list[float], *, seed: int = 1, done: bool = True, source: Record) -> Record:
    """A made-up run with one evaluation per round and 100 bytes per round."""
    evaluations = tuple(
        msgspec.structs.replace(
            source.evaluations[-1],
            round=index,
            time_s=float(index),
            metrics={"accuracy": Spread(None if math.isnan(value) else value, 0.0, 0.0, 0.0)},
            traffic=TrafficSplit(values=100 * index),
        )
        for index, value in enumerate(values)
    )
    start = msgspec.structs.replace(source.start, seed=seed, num_nodes=1)
    return Record(source.folder, start, evaluations, source.end if done else None)


def test_targets_are_on_the_samples_of_early_evaluations(done: comparing.ComparisonResult) -> None:
    source = done.groups[0].records[0]
    first, second, *last = record([0.1, 0.3, 0.5, 0.7], source=source).evaluations
    few = [msgspec.structs.replace(row, samples=10) for row in (first, second)]
    many = [
        msgspec.structs.replace(row, samples=60, early={"accuracy": mean})
        for row, mean in zip(last, (0.35, 0.45), strict=True)
    ]
    both = replace(record([], source=source), evaluations=(*few, *many))
    assert both.series("accuracy") == [0.1, 0.3, 0.35, 0.45]
    assert both.final("accuracy", 2) == pytest.approx(0.6)
    assert both.end_of_series("accuracy", 2) == pytest.approx(0.4)
    assert (both.early_samples, both.mixed) == (10, False)
    assert samples_note([both]) == (
        "Curves and targets are on the same 10 test samples throughout, final values on 60."
    )
    frame = flat_rows(both)
    assert [row["accuracy_mean"] for row in frame] == [0.1, 0.3, 0.5, 0.7]
    assert [row["accuracy_early"] for row in frame] == both.series("accuracy")

    settings = done.comparison.compare
    target = target_of(settings, TargetConfig(way=0.9), "full sharing", [both])
    assert target.value == pytest.approx(
        0.1 + 0.9 * (both.end_of_series("accuracy", settings.final_over) - 0.1)
    )
    reached = target.first(both)
    assert reached is not None
    assert reached.round == 3

    old = replace(both, evaluations=(*few, *(msgspec.structs.replace(row, early={}) for row in many)))
    assert old.series("accuracy") == [0.1, 0.3, 0.5, 0.7]
    assert (old.early_samples, old.mixed) == (10, True)
    assert "may not on 60" in str(samples_note([both, old]))
    assert replace(both, evaluations=()).early_samples is None
    plain = record([0.1, 0.3], source=source)
    assert (plain.early_samples, plain.mixed, samples_note([plain])) == (None, False, None)
    assert "accuracy_early" not in flat_rows(plain)[0]


def test_savings_refer_to_as_many_rounds(done: comparing.ComparisonResult) -> None:
    source = done.groups[0].records[0]
    full = Group("full", "full", (record([0.1, 0.5, 0.9, 0.9], source=source),), (400.0,))
    short = Group("short", "jwins", (record([0.1, 0.5], source=source),), (400.0,))
    unfinished = Group("cut", "jwins", (record([0.1, math.nan], source=source, done=False),), (400.0,))
    table = summary_rows([full, short, unfinished], Target("accuracy", 0.8), full="full")
    assert [line.saving_codec for line in table] == [0.0, 0.0, 0.0]
    assert table[1].saving_raw == 0.75
    assert [line.reached for line in table] == [1, 0, 0]
    assert table_cells(table[1], percent=True)[5:8] == ["—", "—", "—"]
    assert table[2].status == "unfinished @ 1"
    assert math.isnan(table[2].final)


def test_some_seeds_reach_the_target(done: comparing.ComparisonResult) -> None:
    source = done.groups[0].records[0]
    runs = (record([0.1, 0.9], source=source), record([0.1, 0.2], seed=2, source=source))
    (line,) = summary_rows([Group("x", "jwins", runs, (1.0, 1.0))], Target("accuracy", 0.8), full=None)
    assert (line.reached, line.rounds_to_target, line.saving_codec) == (1, 1.0, None)
    assert table_cells(line, percent=True)[5] == "100 B (1/2)"
    assert (
        summary_rows([Group("x", "own", runs, (1.0, 1.0))], Target("accuracy", 0.15, True), full=None)[
            0
        ].reached
        == 2
    )


def diverged(made: Record) -> Record:
    assert made.end is not None
    return replace(made, end=msgspec.structs.replace(made.end, status="diverged", round=made.rounds))


def test_a_seed_that_diverged_has_no_final_value_and_is_marked(done: comparing.ComparisonResult) -> None:
    source = done.groups[0].records[0]
    full = tuple(record([0.1, 0.5, 0.9], seed=seed, source=source) for seed in (1, 2, 3))
    good = tuple(record([0.1, 0.6, level], seed=seed, source=source) for seed, level in ((1, 0.7), (2, 0.9)))
    bad = diverged(record([0.1, 0.3], seed=3, source=source))
    whole, group = Group("full", "full", full, (400.0,) * 3), Group("x", "jwins", (*good, bad), (400.0,) * 3)
    line = summary_rows([whole, group], Target("accuracy", 0.3), full="full")[1]
    assert (line.seeds, line.counted, line.reached) == (3, 2, 3)
    assert line.final == pytest.approx(0.8)
    assert line.bytes_per_node == 200.0
    assert (line.saving_raw, line.saving_codec) == (0.5, 0.0)
    assert line.difference == pytest.approx(-0.1)
    assert line.difference_seeds == 2
    assert table_cells(line, percent=True)[1] == "80.0 ± 14.1 % (2/3)"
    reference = summary_row(whole, Target("accuracy", 0.3), full=whole)
    apart = table_cells(line, percent=True, reference=reference)[8]
    assert apart.endswith("] (2)")
    assert not table_cells(replace(line, counted=3, difference_seeds=3), percent=True, reference=reference)[
        8
    ].endswith(")")
    further = metrics_table([(group, whole)], ["accuracy"])
    assert further.rows[0][2:] == ["80.0 ± 14.1 % (2/3)", apart]
    (lost,) = summary_rows([Group("x", "jwins", (bad,), (400.0,))], Target("accuracy", 0.8), full=None)
    assert (lost.counted, lost.bytes_per_node) == (0, 100.0)
    cells = table_cells(lost, percent=True)
    assert [*cells[1:5], cells[10]] == ["—"] * 5, "its bytes are left out"
    assert (whole.diverged, group.diverged) == ("", "1 of 3 diverged")
    drawing = figure([whole, group], None, metric="accuracy")
    (curve,) = (line for line in drawing.axes[0].get_lines() if line.get_label() == "x (1 of 3 diverged)")
    assert list(curve.get_ydata()) == pytest.approx([10.0, 60.0, 80.0])


def test_the_model_before_training_is_in_no_final_value(done: comparing.ComparisonResult) -> None:
    made = record([0.1, 0.6, 0.8], source=done.groups[0].records[0])
    assert made.final("accuracy", 5) == pytest.approx(0.7)
    assert replace(made, evaluations=made.evaluations[1:]).final("accuracy", 5) == pytest.approx(0.7)
    assert replace(made, evaluations=made.evaluations[:1]).final("accuracy", 5) == 0.1
    assert math.isnan(replace(made, evaluations=()).final("accuracy", 5))


def test_each_group_says_its_own_target(done: comparing.ComparisonResult) -> None:
    runs = (record([0.1, 0.9], source=done.groups[0].records[0]),)
    group = Group("x", "jwins", runs, (1.0,))
    table = [
        summary_row(group, Target("accuracy", value, meaning="so"), full=None, label=label)
        for value, label in ((0.5, "a"), (0.8, "b"))
    ]
    other = replace(table[1], variant="y")
    text = markdown([table[0], other], Target("accuracy", 0.5, meaning="so"))
    assert "Target: accuracy 50.0 % (so): for x.\nTarget: accuracy 80.0 % (so): for y." in text
    assert "Target: accuracy 50.0 % (so).\n" in markdown([table[0]], Target("accuracy", 0.5, meaning="so"))


def test_what_rounds_to_zero_has_no_sign() -> None:
    assert difference_text(-0.0002, 0.0001, percent=True) == "0.0 [0.0, 0.0]"
    assert share(-0.0001) == "0.0 %"


def test_a_second_process_is_refused(write: Write) -> None:
    comparison = write()
    comparison.folder.mkdir(parents=True)
    with locked(comparison.folder, "this"), pytest.raises(ResumeError, match="another process is running this"):
        compare(comparison, jobs=1)


def test_the_target_of_a_loss_lies_on_the_way_there() -> None:
    assert CompareConfig(lower_is_better=True).all_targets == (TargetConfig(way=0.95),)
    assert CompareConfig().all_targets == (TargetConfig(fraction=0.95),)
    given = CompareConfig(lower_is_better=True, target=TargetConfig(fraction=1.1))
    assert given.all_targets == (TargetConfig(fraction=1.1),)


@pytest.mark.usefixtures("complete_figures")
def test_figures_are_the_same_for_the_same_numbers(done: comparing.ComparisonResult, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_figure(figure(done.groups, done.target, metric="accuracy"), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
