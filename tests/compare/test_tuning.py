"""Comparisons that tune: grids, equal bytes, several targets, pairs by seed, and the shipped papers."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import math
import shutil
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

import jwins
from empty_figures import empty_figures
from evaluation import evaluate
from jwins.compare import compare, runner, summarize, workers
from jwins.compare.comparison import Cell, Comparison, load_comparison
from jwins.compare.plan import Trial, at_edge, ended, plan, rank
from jwins.compare.tuning import TuningGrid
from jwins.errors import ConfigError, DataError, UsageError
from jwins.report.formatting import difference_text
from jwins.report.seed_groups import overhead, paired, student_t_quantile
from jwins.run import memory
from jwins.run_folder import archive
from jwins.run_folder.record import Record

ROOT = Path(__file__).parents[2]
PAPERS = sorted((ROOT / "experiments" / "paper").glob("*.toml"))

FILE = """
name = "tuned"
base = "digits"
[nodes]
count = 4
[topology]
kind = "ring"
[train]
batching = "loop"
[run]
rounds = 6
eval_every = 2
[compare]
seeds = [1, 2]
targets = [{ way = 0.3 }, { way = 0.9 }, { accuracy = 1.0 }]
also = ["loss"]
baselines = ["JWINS"]
folder = "FOLDER"
[tune]
key = "train.optimizer.lr"
values = [0.01, 0.1, 1.0]
seeds = [11]
rounds = 4
sensitivity = true
sensitivity_of = ["full sharing", "CHOCO"]
[[variants]]
name = "full sharing"
sharing = { kind = "full" }
[[variants]]
name = "JWINS"
[[variants]]
name = "CHOCO"
sharing = { kind = "choco", fraction = 0.3, gamma = 0.5 }
tune = { key = "sharing.gamma", values = [0.2, 0.4, 0.8] }
[[variants]]
name = "random"
sharing = { kind = "random_k", fraction = 0.9 }
bytes_as = "JWINS"
"""


def load(folder: Path, *overrides: str, text: str = FILE) -> Comparison:
    path = folder / "tuned.toml"
    path.write_text(text.replace("FOLDER", str(folder / "out")))
    return load_comparison(path, overrides)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with empty_figures():
        return compare(load(tmp_path_factory.mktemp("tuned")), jobs=1)


def logs(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}


def accuracy(folder: Path) -> float:
    return Record.read(folder).final("accuracy")


# --- Intervals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [
        (0.975, 1, 12.7062047364),
        (0.975, 2, 4.3026527297),
        (0.975, 3, 3.1824463053),
        (0.975, 4, 2.7764451052),
        (0.975, 9, 2.2621571628),
        (0.975, 10, 2.2281388520),
        (0.975, 30, 2.0422724563),
        (0.975, 1000, 1.9623390808),
        (0.995, 7, 3.4994832974),
        (0.95, 5, 2.0150483733),
        (0.5, 3, 0.0),
    ],
)
def test_t_quantiles_are_those_of_the_tables(p: float, freedom: int, expected: float) -> None:
    assert student_t_quantile(p, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_paired_differences() -> None:
    found = paired([3.0, 5.0, 4.0, 8.0], [1.0, 4.0, 1.0, 4.0])
    assert found.mean == 2.5
    assert found.half_width == pytest.approx(3.1824463053 * statistics.stdev([2.0, 1.0, 3.0, 4.0]) / 2)
    assert paired([2.0], [1.0]).half_width is None
    assert difference_text(0.025, 0.01, percent=True) == "+2.5 [+1.5, +3.5]"
    with pytest.raises(UsageError, match="expected the same number of both"):
        paired([1.0], [])


# --- Tuning -----------------------------------------------------------------------------------------------


def test_learning_rate_is_the_best_on_full_sharing_and_shared_by_all(done: Any) -> None:
    finals = {
        lr: accuracy(done.folder / "full-sharing" / "tuning" / f"lr={lr}" / "seed-11")
        for lr in (0.01, 0.1, 1.0)
    }
    best = max(finals, key=lambda lr: finals[lr])
    for slug in ("full-sharing", "jwins", "choco", "random"):
        config = (done.folder / slug / "seed-1" / "config.toml").read_text()
        assert f"lr = {best}" in config
    summary = json.loads((done.folder / "summary.json").read_text())
    assert {chosen["train.optimizer.lr"] for chosen in summary["chosen"].values()} == {best}
    assert any(f"train.optimizer.lr = {best}, the best of 3" in note for note in summary["notes"])


def test_gamma_is_the_best_of_its_grid_and_every_run_is_kept(done: Any) -> None:
    rows = json.loads((done.folder / "summary.json").read_text())["tuning"]
    gammas = {row["value"]: row for row in rows if row["key"] == "sharing.gamma"}
    assert list(gammas) == [0.2, 0.4, 0.8]
    chosen = [value for value, row in gammas.items() if row["chosen"]]
    assert chosen == [max(gammas, key=lambda value: gammas[value]["final"])]
    assert gammas[chosen[0]]["edge"] == (chosen[0] != 0.4)
    lr = next(row["value"] for row in rows if row["key"] == "train.optimizer.lr" and row["chosen"])
    for value, row in gammas.items():
        folder = done.folder / "choco" / "tuning" / f"lr={lr},gamma={value}" / "seed-11"
        assert row["final"] == accuracy(folder)
        assert Record.read(folder).rounds == 4
    line = next(line for line in done.table if line.variant == "CHOCO")
    assert line.tuned == f"gamma = {chosen[0]}"
    with (done.folder / "tuning.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_random_sampling_sends_the_same_bytes(done: Any) -> None:
    sent = {line.variant: line.bytes_per_node for line in done.table}
    assert sent["random"] == pytest.approx(sent["JWINS"], rel=0.02)
    assert any("random sends" in note for note in done.notes)


def test_sensitivity_has_a_row_per_variant_and_value(done: Any) -> None:
    rows = json.loads((done.folder / "summary.json").read_text())["sensitivity"]
    assert [(row["variant"], row["value"]) for row in rows] == [
        (name, lr) for name in ("full sharing", "CHOCO") for lr in (0.01, 0.1, 1.0)
    ]


def test_nothing_is_run_twice(done: Any) -> None:
    before = logs(done.folder)
    told: list[workers.CellProgress] = []
    again = compare(done.comparison, jobs=1, progress=told.append)
    assert again.table == done.table
    assert logs(done.folder) == before
    runs, rounds = done.comparison.expected()
    assert len({progress.cell for progress in told}) == runs
    assert rounds == 6 * (8 + 2) + 4 * (runs - 8 - 2)


def test_another_choice_sets_the_earlier_runs_aside_and_takes_them_back(done: Any, tmp_path: Path) -> None:
    small = ("tune.values=[0.1]", "compare.seeds=[1]", "tune.sensitivity=false")
    text = FILE.replace('tune = { key = "sharing.gamma", values = [0.2, 0.4, 0.8] }\n', "")
    first = compare(load(tmp_path, *small, text=text), jobs=1)
    before = accuracy(first.folder / "jwins" / "seed-1")
    compare(load(tmp_path, "tune.values=[0.3]", *small[1:], text=text), jobs=1)
    assert accuracy(first.folder / "jwins" / "earlier" / "lr=0.1" / "seed-1") == before
    stamps = {path for path in logs(first.folder) if "earlier" in path.parts}
    assert len(stamps) >= 4
    back = compare(load(tmp_path, *small, text=text), jobs=1)
    assert back.table == first.table
    assert (first.folder / "jwins" / "earlier" / "lr=0.3" / "seed-1").is_dir()


def test_a_table_may_be_tuned(tmp_path: Path) -> None:
    """Tried settings are written without defaults, and stored with them."""
    text = FILE.replace(
        'tune = { key = "sharing.gamma", values = [0.2, 0.4, 0.8] }',
        'tune = { key = "sharing.values", values = [{ kind = "uniform", step = 0.01 }, '
        '{ kind = "uniform", step = 0.1 }] }',
    )
    small = ("tune.values=[0.1]", "compare.seeds=[1]", "tune.sensitivity=false")
    first = compare(load(tmp_path, *small, text=text), jobs=1)
    stamps = logs(first.folder)
    assert not [path for path in stamps if "earlier" in path.parts]
    assert compare(load(tmp_path, *small, text=text), jobs=1).table == first.table
    assert logs(first.folder) == stamps
    assert any(str(line.tuned).startswith("values = { kind = ") for line in first.table)


def test_a_fraction_that_fits_is_kept(tmp_path: Path) -> None:
    fixed = ("tune.values=[0.1]", "tune.sensitivity=false", "compare.seeds=[1]")
    text = FILE.replace('tune = { key = "sharing.gamma", values = [0.2, 0.4, 0.8] }\n', "")
    first = compare(load(tmp_path, *fixed, text=text), jobs=1)
    chosen = plan(first.comparison).chosen["random"]
    fraction = chosen["sharing.fraction"]
    near = round(fraction * 1.004, 4)
    assert near != fraction
    for there, expected in ((near, near), (0.9, pytest.approx(fraction, rel=0.03))):
        shutil.rmtree(first.folder / "random")
        changed = {**chosen, "sharing.fraction": there}
        cell = first.comparison.cell(first.comparison.variant("random"), 1, changed)
        jwins.simulate(cell.experiment)
        compare(first.comparison, jobs=1)
        assert plan(first.comparison).chosen["random"]["sharing.fraction"] == expected


def test_runs_may_lie_in_a_folder_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "tuning").mkdir()
    text = FILE.replace('tune = { key = "sharing.gamma", values = [0.2, 0.4, 0.8] }\n', "")
    small = (
        "compare.seeds=[1]",
        "tune.sensitivity=false",
        f"compare.folder={json.dumps(str(tmp_path / 'tuning'))}",
    )
    compare(load(tmp_path, "tune.values=[0.1]", *small, text=text), jobs=1, only=["JWINS"])
    compare(load(tmp_path, "tune.values=[0.3]", *small, text=text), jobs=1, only=["JWINS"])
    assert (tmp_path / "tuning" / "jwins" / "earlier" / "lr=0.1" / "seed-1").is_dir()


def test_a_further_seed_of_like_bytes_leaves_the_runs_there_are_as_they_are(tmp_path: Path) -> None:
    fixed = ("tune.values=[0.1]", "tune.sensitivity=false")
    text = FILE.replace('tune = { key = "sharing.gamma", values = [0.2, 0.4, 0.8] }\n', "")
    text = text.replace(
        'name = "JWINS"\n', 'name = "JWINS"\nsharing = { cutoff = { kind = "fixed", fraction = 0.4 } }\n'
    )
    first = compare(load(tmp_path, "compare.seeds=[1]", *fixed, text=text), jobs=1)
    before = logs(first.folder)
    assert (first.folder / "random" / "seed-1" / "metrics.jsonl") in before
    second = compare(load(tmp_path, "compare.seeds=[1, 2]", *fixed, text=text), jobs=1)
    after = logs(second.folder)
    assert {path: after.get(path) for path in before} == before
    assert set(after) - set(before) == {
        second.folder / slug / "seed-2" / "metrics.jsonl"
        for slug in ("full-sharing", "jwins", "choco", "random")
    }


def tried(value: float, final: float, cost: float | None, reached: int = 1, status: str = "finished") -> Trial:
    return Trial("x", "sharing.gamma", value, 1, final, reached, cost, cost, status)


def test_the_rule() -> None:
    settings = load_comparison("digits-compare").compare
    rows = [
        tried(0.1, 0.9, 50.0),
        tried(0.2, 0.8, 20.0),
        tried(0.3, 0.95, None, 0),
        tried(0.4, 0.99, 1.0, 1, "diverged @ 3"),
    ]

    def best(by: str, **changed: Any) -> float:
        return min(rows, key=lambda row: rank(row, by, settings.model_copy(update=changed))).value

    assert best("final") == 0.3
    assert best("final", lower_is_better=True) == 0.2
    assert best("bytes") == best("seconds") == 0.2
    assert at_edge(TuningGrid(key="sharing.gamma", values=[0.1, 0.5, 1.0]), 0)
    assert not at_edge(TuningGrid(key="sharing.gamma", values=[0.1, 0.5, 1.0]), 1)
    assert not at_edge(TuningGrid(key="sharing.gamma", values=[0.1, 0.5, 1.0]), 2)
    assert at_edge(TuningGrid(key="train.optimizer.lr", values=[0.1, 0.5, 1.0]), 2)


LATE = """
name = "late"
base = "digits"
[nodes]
count = 2
[topology]
kind = "ring"
[train]
batching = "loop"
[train.optimizer]
lr = 0.05
momentum = 0.9
[run]
rounds = 12
eval_every = 2
[compare]
folder = "FOLDER"
[tune]
key = "train.optimizer.lr"
values = [0.02, 0.05, 0.1]
rounds = 2
seeds = [11]
[[variants]]
name = "full sharing"
sharing = { kind = "full" }
"""


def test_what_diverges_after_the_tuning_rounds_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best goes to the end, and so does the next best if it is ahead then."""
    finals = {
        # value: after the tuning rounds, and at the end; None for a run that diverges
        0.02: (0.3, 0.8),
        0.05: (0.4, 0.2),
        0.1: (0.5, None),
    }

    def final(record: Record, metric: str, over: int = 1) -> float:
        experiment = jwins.load(record.folder / "config.toml")
        short, whole = finals[experiment.train.optimizer.lr]
        reached = short if experiment.run.rounds == 2 else whole
        return math.nan if reached is None else reached

    def status(record: Record) -> str:
        return "diverged @ 7" if math.isnan(final(record, "accuracy")) else "finished"

    monkeypatch.setattr(Record, "final", final)
    monkeypatch.setattr(Record, "status", property(status))
    compared = compare(load(tmp_path, text=LATE), jobs=1)
    assert plan(compared.comparison).chosen == {"full sharing": {"train.optimizer.lr": 0.02}}
    (tuning,) = [table for table in compared.further if table.name == "tuning"]
    verdicts = [row[-1] for row in tuning.rows]
    assert verdicts == [
        "chosen, at the edge, to the end: 80.0 %, finished",
        "to the end: 20.0 %, finished",
        "to the end: —, diverged @ 7",
    ]
    whole = [folder.parent.parent.name for folder in compared.folder.rglob("to-end/seed-11")]
    assert sorted(whole) == ["lr=0.02", "lr=0.05", "lr=0.1"]
    assert plan(load(tmp_path, "tune.confirm=false", text=LATE)).chosen["full sharing"] == {
        "train.optimizer.lr": 0.1
    }


def test_a_choice_that_is_not_confirmed_yet_stands_in_tables_of_what_is_there(tmp_path: Path) -> None:
    compared = compare(load(tmp_path, "tune.confirm=false", text=LATE), jobs=1)
    comparison = load(tmp_path, text=LATE)
    assert summarize(comparison, partial=True).table == compared.table
    with pytest.raises(DataError, match="tuning of 'full sharing' has not ended"):
        summarize(comparison)
    told: list[workers.CellProgress] = []
    compare(comparison, jobs=1, progress=told.append)
    assert {of.rounds for of in told if of.name.endswith("to the end")} == {12}


def test_tuning_by_bytes_counts_to_full_sharings_target(tmp_path: Path) -> None:
    comparison = load(tmp_path, "tune.by=bytes", "compare.seeds=[1]", "tune.values=[0.1]", "compare.also=[]")
    found = compare(comparison, jobs=1, only=["CHOCO"])
    rows = {row.value: row for row in plan(comparison).trials}
    full = Record.read(found.folder / "full-sharing" / "tuning" / "lr=0.1" / "seed-11")
    start, end = full.series("accuracy")[0], full.final("accuracy")
    for value, row in rows.items():
        record = Record.read(found.folder / "choco" / "tuning" / f"lr=0.1,gamma={value}" / "seed-11")
        hits = [
            r
            for r, a in zip(record.evaluations, record.series("accuracy"), strict=True)
            if a >= start + 0.3 * (end - start)
        ]
        assert row.bytes_to_target == (hits[0].traffic.total / 4 if hits else None)
    assert found.status == "partial"
    assert [line.variant for line in found.table] == ["CHOCO"]
    assert math.isnan(found.target.value)


# --- Reporting --------------------------------------------------------------------------------------------


def test_targets_ratios_and_what_is_never_reached(done: Any) -> None:
    rows = json.loads((done.folder / "summary.json").read_text())["targets"]
    assert len(rows) == 4 * 3
    never = [row for row in rows if row["target"] == 1.0]
    assert all(
        row["reached"] == 0 and row["bytes_per_node"] is None and row["bytes_ratio"] is None for row in never
    )
    records = {
        name: [Record.read(done.folder / slug / f"seed-{seed}") for seed in (1, 2)]
        for name, slug in (("full sharing", "full-sharing"), ("JWINS", "jwins"))
    }
    full = records["full sharing"]
    start = statistics.fmean(r.series("accuracy")[0] for r in full)
    value = start + 0.3 * (statistics.fmean(r.final("accuracy") for r in full) - start)
    sent = {
        name: [
            next(
                (
                    e.traffic.total / 4
                    for e, a in zip(r.evaluations, r.series("accuracy"), strict=True)
                    if a >= value
                ),
                None,
            )
            for r in of
        ]
        for name, of in records.items()
    }
    row = next(row for row in rows if row["variant"] == "full sharing" and row["meaning"].startswith("30 %"))
    assert row["target"] == pytest.approx(value)
    assert row["baseline"] == "JWINS"
    both = [(a, b) for a, b in zip(sent["full sharing"], sent["JWINS"], strict=True) if a and b]
    assert row["pairs"] == len(both)
    if both:
        assert row["bytes_ratio"] == pytest.approx(statistics.geometric_mean(a / b for a, b in both))
    assert (row["bytes_interval"] is None) == (len(both) < 2)
    if len(both) == 2:
        logs = [math.log(a / b) for a, b in both]
        half = 12.7062 * abs(logs[0] - logs[1]) / 2  # Student's quantile, one degree of freedom
        low, high = (math.exp(sum(logs) / 2 + sign * half) for sign in (-1, 1))
        assert row["bytes_interval"] == pytest.approx([low, high], rel=1e-4)
    with (done.folder / "targets.csv").open(newline="") as file:
        line = list(csv.DictReader(file))[rows.index(row)]
    ends = [line["bytes_interval_low"], line["bytes_interval_high"]]
    assert [float(end) if end else None for end in ends] == list(row["bytes_interval"] or (None, None))
    text = (done.folder / "table.md").read_text()
    assert "never" in text
    assert "## To each target" in text
    assert "| bytes / baseline's [95 %] |" in text
    assert "## Sensitivity to train.optimizer.lr" in text


def test_differences_are_paired_by_seed(done: Any) -> None:
    for line in done.table:
        if line.variant == "full sharing":
            assert line.difference is None
            continue
        slug = line.variant.lower()
        apart = [
            accuracy(done.folder / slug / f"seed-{seed}")
            - accuracy(done.folder / "full-sharing" / f"seed-{seed}")
            for seed in (1, 2)
        ]
        assert line.difference == pytest.approx(statistics.fmean(apart))
        half = 12.7062047364 * statistics.stdev(apart) / math.sqrt(2)
        assert line.difference_half == pytest.approx(half, rel=1e-9)
        assert line.reference == "full sharing"
    summary = json.loads((done.folder / "summary.json").read_text())
    assert summary["table"][1]["difference"] == done.table[1].difference
    losses = [row for row in summary["metrics"] if row["metric"] == "loss"]
    assert [row["variant"] for row in losses] == [line.variant for line in done.table]


def test_overhead_is_what_the_clock_says(done: Any) -> None:
    walls = [record.end.wall_s for record in done.groups[0].records]
    rest = sum(wall["total"] - wall["training"] - wall["evaluation"] for wall in walls)
    assert done.table[0].overhead == pytest.approx(rest / sum(wall["training"] for wall in walls))


def test_launched_nodes_have_no_overhead_of_one_process(done: Any) -> None:
    """Their seconds are sums over processes, and the total is not."""
    group = done.groups[0]
    launched = [
        dataclasses.replace(record, start=msgspec.structs.replace(record.start, clock="wall"))
        for record in group.records
    ]
    assert overhead(group) is not None
    assert overhead(dataclasses.replace(group, records=launched)) is None


def collector() -> ModuleType:
    spec = importlib.util.spec_from_file_location("collect", ROOT / "records" / "collect.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_record_gives_the_tables_of_the_comparison_it_was_collected_of(done: Any, tmp_path: Path) -> None:
    record = tmp_path / "record"
    compared = collector().collect(done.folder, record)
    assert compared == 2 * len(done.comparison.variants)
    assert sorted(path.name for path in record.iterdir()) == ["README.md", "comparison.png", "runs.tar.xz"]
    runs = record / "runs.tar.xz"
    written = runs.read_bytes()
    (tmp_path / "page").write_text("a word before\n\n## Tables\n\nold\n")
    (tmp_path / "page").rename(record / "README.md")
    collector().collect(done.folder, record)
    assert runs.read_bytes() == written
    table = (done.folder / "table.md").read_text()
    shown = "a word before\n\n## Tables\n\n" + table.replace("\n## ", "\n### ")
    assert (record / "README.md").read_text() == shown

    again = summarize(load(tmp_path, f"compare.folder={runs}"))
    assert (again.table, again.notes, again.target) == (done.table, done.notes, done.target)
    assert [table.rows for table in again.further] == [table.rows for table in done.further]
    assert again.folder == record
    for name in ("table.md", "table.csv", "summary.json"):
        assert (record / name).read_text() == (done.folder / name).read_text()
    assert runs.read_bytes() == written
    with pytest.raises(
        ConfigError, match=r"runs\.tar\.xz is a file; unpack it \(tar -xf .*\) to continue its runs"
    ):
        compare(load(tmp_path, f"compare.folder={runs}", "compare.seeds=[1, 2, 3]"), jobs=1)
    config = archive.find(runs, "full-sharing/seed-1/config.toml")[0]
    assert (
        jwins.load(config).changed({"run": {"folder": "x"}}).digest()
        == jwins.load(done.folder / "full-sharing" / "seed-1" / "config.toml").digest()
    )


def test_only_and_report_only(tmp_path: Path) -> None:
    text = FILE.replace("bytes_as = ", "# ")
    comparison = load(tmp_path, "tune.values=[0.1]", "compare.seeds=[1]", "tune.sensitivity=false", text=text)
    nothing = summarize(comparison, partial=True)
    assert (nothing.table, nothing.status) == ([], "partial")
    with pytest.raises(DataError, match=r"has not ended|no run here"):
        summarize(comparison)
    found = compare(comparison, jobs=1, only=["full sharing", "JWINS"])
    assert [line.variant for line in found.table] == ["full sharing", "JWINS"]
    assert found.status == "partial"
    assert "2 runs have not ended, or not begun" in found.notes[0]
    before = logs(found.folder)
    assert summarize(comparison, partial=True).table == found.table
    assert logs(found.folder) == before
    with pytest.raises(ConfigError, match=r"--only = 'JWIN'.*did you mean \"JWINS\""):
        compare(comparison, jobs=1, only=["JWIN"])


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [11]", "seeds = [2]", r"tune.seeds\[0\] = 2: is also a seed of the comparison"),
        (
            'name = "JWINS"\n',
            'name = "JWINS"\ntrain = { optimizer = { lr = 1.0 } }\n',
            "is tuned for all variants",
        ),
        (
            "values = [0.2, 0.4, 0.8]",
            "values = [0.2, 1.4]",
            r"variants\[2\].tune = .*sharing.gamma: expected a consensus",
        ),
        (
            "values = [0.2, 0.4, 0.8]",
            "values = [0.2, 0.2]",
            r"variants\[2\].tune.values\[1\] = 0.2: is in the list",
        ),
        ('key = "sharing.gamma"', 'key = "sharing.gama"', "did you mean"),
        ('bytes_as = "JWINS"', 'bytes_as = "JWIN"', r"variants\[3\].bytes_as = 'JWIN': expected a variant"),
        ('baselines = ["JWINS"]', 'baselines = ["JWINS", "CHOCO"]', "variants without a group have a baseline"),
        ('key = "train.optimizer.lr"\n', "", r"tune.key = <missing>: required"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text=FILE.replace(old, new, 1))


def test_setting_what_is_tuned_says_how(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"write --set tune.values=\[0.3\]"):
        load(tmp_path, "train.optimizer.lr=0.3")


# --- Memory -----------------------------------------------------------------------------------------------


def test_memory_bounds_the_runs_side_by_side() -> None:
    assert workers.runs_that_fit(4, 1e9, 10e9) == (4, "")
    assert workers.runs_that_fit(4, 1e9, None) == (4, "")
    assert workers.runs_that_fit(4, 4e9, 10e9)[0] == 2
    assert workers.runs_that_fit(4, 40e9, 10e9)[0] == 1
    assert "1 run side by side instead of 4" in workers.runs_that_fit(4, 40e9, 10e9)[1]
    free = memory.memory_free()
    assert free is None or free > 0


def test_runs_share_a_gpu_only_if_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    todo = [
        workers.Job(number, cell.name, cell.experiment)
        for number, cell in enumerate(load_comparison("digits-compare").cells()[:2])
    ]
    said: list[str] = []
    monkeypatch.setattr(runner, "cores", lambda: 2)
    assert runner._workers(todo, None, said.append) == 2
    monkeypatch.setattr(runner, "resolve_device", lambda _: torch.device("cuda", 0))
    assert runner._workers(todo, None, said.append) == 1
    assert "share a GPU" in said[-1]
    assert runner._workers(todo, 2, said.append) == 2


def test_memory_grows_with_nodes_and_replicas() -> None:
    experiments: list[Any] = [cell.experiment for cell in load_comparison("digits-compare").cells()[:4]]
    full, _, choco, _ = (memory.memory_needed([experiment]) for experiment in experiments)
    assert choco > full > 0
    assert memory.memory_needed(experiments) == max(memory.memory_needed([e]) for e in experiments)
    assert memory.memory_needed([experiments[0].changed({"nodes": {"count": 500}})]) > full


# --- Groups, own users, and the shipped papers --------------------------------------------------------------


def tasks_of_the_contract() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "files_of_tasks", ROOT / "tests" / "contract" / "test_tasks.py"
    )
    assert spec is not None
    assert spec.loader is not None
    import sys

    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


MAKERS = {
    "cifar10": "cifar10_files",
    "femnist": "femnist_files",
    "celeba": "celeba_files",
    "shakespeare": "shakespeare_text",
    "movielens": "movielens_files",
}
SHRUNK = (
    "nodes.count=2",
    "topology.kind=fully_connected",
    "run.rounds=1",
    "run.eval_every=1",
    "train.local_steps=1",
    "train.batch_size=2",
)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_papers_have_the_papers_settings(path: Path) -> None:
    comparison = load_comparison(path)
    expected = {  # lr, local steps and batch of the authors' code
        "cifar10": (0.01, 3, 8),
        "femnist": (0.001, 47, 16),
        "celeba": (0.001, 4, 16),
        "shakespeare": (0.1, 10, 16),
        "movielens": (0.1, 10, 16),
    }.get(path.stem)
    assert comparison.compare.final_over == 5
    assert comparison.full is not None
    if expected is None:
        return
    lr, steps, batch = expected
    assert lr in comparison.rule.values
    for variant in comparison.variants:
        e = variant.experiment
        assert (e.nodes.count, e.train.local_steps, e.train.batch_size) == (96, steps, batch)
        assert e.topology.model_dump() == {"kind": "regular", "degree": 4, "dynamic": False}
    for budget in (0.2, 0.1):
        group = [v.experiment.sharing for v in comparison.variants if v.group == f"{budget * 100:.0f} %"]
        choco, jwins = group
        assert choco.fraction == budget
        assert statistics.fmean(jwins.cutoff.fractions) == pytest.approx(budget)
        assert jwins.score == "reference"
    assert all(len(v.tune.values) >= 5 for v in comparison.variants if v.tune)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_papers_run_on_tiny_data(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWINS_DATA", str(tmp_path / "cache"))
    given = [*SHRUNK, f"compare.folder={json.dumps(str(tmp_path / 'out'))}"]
    task = load_comparison(path).variants[0].experiment.task.name
    if task in MAKERS:
        (tmp_path / "data").mkdir()
        getattr(tasks_of_the_contract(), MAKERS[task])(tmp_path / "data")
        given.append(f"task.data={json.dumps(str(tmp_path / 'data'))}")
    if "eval_samples" in path.read_text(encoding="utf-8"):
        given.append("run.eval_samples=2")
    comparison = load_comparison(path, given, seeds=[1])
    if comparison.tune is not None:
        values = comparison.tune.values[:2] if task in ("movielens", "digits") else comparison.tune.values[:1]
        comparison = load_comparison(path, [*given, f"tune.values={list(values)}"], seeds=[1])
    found = compare(comparison, jobs=1)
    assert [line.variant for line in found.table] == [variant.name for variant in comparison.variants]
    assert {line.status for line in found.table} == {"finished"}
    sent = {line.variant: line.bytes_per_node for line in found.table}
    sampling = next((v for v in comparison.variants if v.name == "random sampling"), None)
    if sampling and sampling.bytes_as and task != "movielens":  # of 280 parameters, headers are most
        assert sent["random sampling"] == pytest.approx(sent["JWINS"], rel=0.02)


def test_nodes_are_tested_on_their_own_users(tmp_path: Path) -> None:
    import torch

    from jwins.run.assembly import build
    from jwins.run.evaluation_plan import own_evaluation_samples, own_test_samples

    (tmp_path / "data").mkdir()
    tasks_of_the_contract().movielens_files(tmp_path / "data")
    paper = load_comparison(
        ROOT / "experiments" / "paper" / "scale.toml", [*SHRUNK, f"task.data={tmp_path / 'data'}"]
    )
    experiment = paper.variants[0].experiment
    assembled = build(experiment)
    own = own_test_samples(assembled.task, assembled.partition)
    assert sorted(i for rows in own for i in rows.tolist()) == list(range(len(assembled.task.test)))
    rows = assembled.driver.run().rows
    last = rows[-2]
    plain = build(experiment.changed({"run": {"eval_own": False}})).driver.run()
    assert rows[-1].sha256 == plain.rows[-1].sha256  # type: ignore[union-attr]
    for node in range(2):
        model = assembled.task.model()
        (group,) = assembled.driver.groups
        group.trainer.layout.write(group.parameters(node), model)
        chosen = torch.from_numpy(own[node])
        outputs = model(assembled.task.test.inputs[chosen]).detach()
        expected = assembled.task.metrics(outputs, assembled.task.test.targets[chosen])["squared_error"].mean()
        assert last.per_node["own_squared_error"][node] == pytest.approx(float(expected), rel=1e-5)  # type: ignore[union-attr]
    mean = last.metrics["own_squared_error"]  # type: ignore[union-attr]
    assert mean.mean == pytest.approx(statistics.fmean(last.per_node["own_squared_error"]))  # type: ignore[union-attr,arg-type]
    assert mean.average_model is None
    few = experiment.changed({"run": {"eval_samples": 2, "eval_samples_early": 1}})
    last, early = own_evaluation_samples(few, assembled.task, assembled.partition)
    for some, fewer, rows_of in zip(last, early, own, strict=True):
        assert (len(some), len(fewer)) == (min(2, len(rows_of)), min(1, len(rows_of)))
        assert set(fewer.tolist()) <= set(some.tolist()) <= set(rows_of.tolist())
    assert [
        some.tolist() for some in own_evaluation_samples(experiment, assembled.task, assembled.partition)[0]
    ] == [rows_of.tolist() for rows_of in own]
    digits = load_comparison("digits-compare", ["run.eval_own=true"]).variants[0].experiment
    without = digits.changed({"run": {"eval_own": False}})
    assert without.digest() != digits.digest()


def test_early_evaluations_use_some_of_the_samples(tmp_path: Path) -> None:
    import torch

    from jwins.run.assembly import build
    from jwins.run.evaluation_plan import evaluation_samples

    def of(**run: Any) -> Any:
        run = {"rounds": 8, "eval_every": 2, "eval_own": False, **run}
        return load(tmp_path).variants[0].experiment.changed({"run": run})

    few = of(eval_samples=60, eval_samples_early=25, eval_last=2)
    assembled = build(few)
    last, early = evaluation_samples(few, assembled.task)
    assert last is not None
    assert early is not None
    assert len(early) == 25
    assert set(early.tolist()) < set(last.tolist())
    rows = {row.round: row for row in assembled.driver.run().rows if hasattr(row, "samples")}
    assert [rows[r].samples for r in (0, 2, 4, 6, 8)] == [25, 25, 25, 60, 60]

    plain = build(of(eval_samples=60))
    assert torch.equal(evaluation_samples(plain.experiment, plain.task)[0], last)  # type: ignore[arg-type]
    complete = {row.round: row for row in plain.driver.run().rows if hasattr(row, "samples")}
    assert [rows[r].metrics == complete[r].metrics for r in (0, 2, 4, 6, 8)] == [False] * 3 + [True] * 2
    (group,) = assembled.driver.groups
    at_8 = [evaluate(group.trainer, group.parameters(node)[None], [0], early) for node in group.nodes]
    assert float(at_8[0]["accuracy"][0]) * 25 == pytest.approx(round(float(at_8[0]["accuracy"][0]) * 25))
    assert rows[8].early == {
        name: pytest.approx(statistics.fmean(float(found[name][0]) for found in at_8))
        for name in rows[8].metrics
    }
    assert [bool(rows[r].early) for r in (0, 2, 4, 6, 8)] == [False] * 3 + [True] * 2
    assert not any(row.early for row in complete.values())

    everything = of(eval_samples_early=25)
    assert evaluation_samples(everything, assembled.task)[0] is None
    assert len(evaluation_samples(everything, assembled.task)[1]) == 25  # type: ignore[arg-type]
    same = of(eval_samples=20, eval_samples_early=25)
    assert torch.equal(*evaluation_samples(same, assembled.task))  # type: ignore[arg-type]
    assert of(eval_last=3).digest() == of().digest() != everything.digest()


def test_final_values_mix_no_sample_sizes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"only the last 2 evaluations .* raise run.eval_last"):
        load(tmp_path, "run.eval_samples_early=9", "run.eval_last=2", "compare.final_over=3")


def test_tuning_runs_may_be_evaluated_on_fewer_samples(tmp_path: Path) -> None:
    comparison = load(tmp_path, "tune.eval_samples=30", "run.eval_samples_early=9")
    variant = comparison.variants[0]
    tried = comparison.cell(variant, 11, {"train.optimizer.lr": 0.1}, tuning=True).experiment.run
    compared = comparison.cell(variant, 1, {"train.optimizer.lr": 0.1}).experiment.run
    assert (tried.eval_samples, tried.eval_samples_early) == (30, None)
    assert (compared.eval_samples, compared.eval_samples_early) == ("all", 9)


def test_groups_have_their_own_full_sharing(tmp_path: Path) -> None:
    text = """
base = "digits"
[topology]
kind = "ring"
[train]
batching = "loop"
[run]
rounds = 4
eval_every = 2
[compare]
target = { way = 0.5 }
folder = "FOLDER"
"""
    for nodes in (4, 8):
        for name, kind in (("full", "full"), ("JWINS", "jwins")):
            text += f"""
[[variants]]
name = "{name} {nodes}"
group = "{nodes} nodes"
nodes = {{ count = {nodes} }}
sharing = {{ kind = "{kind}" }}
allow_different = ["partition", "batches"]
"""
    found = compare(load(tmp_path, text=text), jobs=1)
    assert [line.reference for line in found.table] == ["full 4", "full 4", "full 8", "full 8"]
    assert [line.saving_codec for line in found.table[::2]] == [0.0, 0.0]
    assert found.table[3].saving_codec > 0.1  # type: ignore[operator]
    assert found.table[3].difference == accuracy(found.folder / "jwins-8" / "seed-1") - accuracy(
        found.folder / "full-8" / "seed-1"
    )


def test_unended_cell_has_no_record(tmp_path: Path) -> None:
    cell: Cell = load(tmp_path).cells()[0]
    assert ended(cell) is None
