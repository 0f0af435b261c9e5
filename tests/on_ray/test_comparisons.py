"""Comparisons on a cluster leave what they leave on one machine."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
from clusters import add_machine

from jwins import Ray
from jwins.compare import CellProgress, ComparisonResult, compare
from jwins.compare.comparison import Comparison, load_comparison
from jwins.errors import ConfigError, DataError, UsageError
from jwins.run_folder.record import Record

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.filterwarnings("ignore"),  # Ray's own leave sockets and files open
]

FILE = """
name = "tiny"
base = "digits"
[nodes]
count = 4
[topology]
kind = "ring"
[run]
rounds = ROUNDS
eval_every = 50
checkpoint_every = 5
[compare]
seeds = [1, 2]
target = { accuracy = 0.15 }
folder = "FOLDER"
[[variants]]
name = "full sharing"
sharing = { kind = "full" }
[[variants]]
name = "JWINS"
"""


def comparison(folder: Path, rounds: int = 6, extra: str = "", *overrides: str) -> Comparison:
    path = folder.parent / f"{folder.name}.toml"
    path.write_text(FILE.replace("FOLDER", str(folder)).replace("ROUNDS", str(rounds)) + extra)
    return load_comparison(path, ["name=tiny", *overrides])


def files(folder: Path) -> dict[str, bytes]:
    """All that runs leave, but for what differs between any two runs."""
    found = {}
    for path in sorted(folder.glob("*/seed-*/**/*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.name == "metrics.jsonl":
            rows = path.read_bytes().splitlines()
            found[name] = b"\n".join([*rows[:-1], rows[-1].partition(b'"wall_s"')[0]])
        elif path.parent.name == "checkpoints":
            found[name.rpartition("-")[0]] = b""  # holds the log's length
        else:
            found[name] = path.read_bytes()
    return found


def same(one: ComparisonResult, other: ComparisonResult) -> None:
    assert one.table == other.table
    mine, theirs = files(one.folder), files(other.folder)
    assert mine.keys() == theirs.keys()
    for name, content in mine.items():
        if name.endswith("config.toml"):
            configs = [(content, one.folder), (theirs[name], other.folder)]
            texts = [
                text.replace(str(folder).encode(), b"").replace(b"threads = 1\n", b"")
                for text, folder in configs
            ]
            assert texts[0] == texts[1], name
        else:
            assert content == theirs[name], name


def test_a_cluster_leaves_what_processes_leave(two_machines: Any, tmp_path: Path) -> None:
    by_processes = compare(comparison(tmp_path / "processes"), jobs=2)
    told: list[CellProgress] = []
    by_ray = compare(comparison(tmp_path / "ray"), engine=Ray(), progress=told.append)
    same(by_ray, by_processes)
    assert {progress.cell for progress in told} == {0, 1, 2, 3}
    assert [progress.status for progress in told].count("finished") == 4


def test_a_lost_machine_costs_the_rounds_since_a_checkpoint(two_machines: Any, tmp_path: Path) -> None:
    """One machine is lost, another one comes: the runs of the first go on elsewhere."""
    whole = compare(comparison(tmp_path / "whole", 300), jobs=1)
    lost = add_machine(two_machines, tmp_path / "machine")
    told: list[CellProgress] = []

    def watch(progress: CellProgress) -> None:
        nonlocal lost
        told.append(progress)
        if lost is not None and all(any(p.cell == cell and p.round >= 12 for p in told) for cell in range(3)):
            two_machines.remove_node(lost, allow_graceful=False)
            lost = None
            add_machine(two_machines, tmp_path / "other")

    same(compare(comparison(tmp_path / "lost", 300), engine=Ray(), progress=watch), whole)
    again = 0
    for cell in range(4):
        rounds = [progress.round for progress in told if progress.cell == cell and progress.round < 300]
        for before, after in itertools.pairwise(rounds):
            if after <= before:
                again += 1
                assert before - after <= 5, "no more than since the last checkpoint"
    assert again >= 1, "the machine that was lost had a run"


def test_interrupted_on_a_cluster_and_finished_without(two_machines: Any, tmp_path: Path) -> None:
    whole = compare(comparison(tmp_path / "whole", 120), jobs=1)
    begun: set[int] = set()

    def interrupt(progress: CellProgress) -> None:
        if progress.round >= 8 and progress.cell not in begun:
            begun.add(progress.cell)
            if len(begun) == 2:
                signal.raise_signal(signal.SIGINT)

    halves = comparison(tmp_path / "halves", 120)
    assert compare(halves, engine=Ray(), progress=interrupt).status == "interrupted"
    left = [path.parent for path in halves.folder.glob("*/seed-*/checkpoints/round-*")]
    assert len(set(left)) >= 2, "runs that had begun have left a checkpoint"
    resumed = compare(halves, jobs=1)
    assert resumed.table == whole.table
    for folder in halves.folder.glob("*/seed-*"):
        ends = [Record.read(path).end for path in (folder, whole.folder / folder.relative_to(halves.folder))]
        assert ends[0] is not None
        assert ends[1] is not None
        assert ends[0].sha256 == ends[1].sha256


def test_what_a_run_says_is_wrong_ends_all(two_machines: Any, tmp_path: Path) -> None:
    endless = comparison(tmp_path / "metric", 5000, "", "compare={metric='acuracy', lower_is_better=false}")
    with pytest.raises(ConfigError, match=r"compare.metric = 'acuracy': .*did you mean \"accuracy\"\?"):
        compare(endless, engine=Ray())


def test_a_task_and_its_data_are_sent(two_machines: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seed.txt").write_text("7")
    (tmp_path / "own.py").write_text(TASK)
    task = f"[task]\nfile = '{tmp_path / 'own.py'}:Own'\ndata = '{tmp_path / 'data'}'\n"
    here = comparison(tmp_path / "here", 4)
    text = (tmp_path / "here.toml").read_text().replace("[nodes]", task + "[nodes]")
    (tmp_path / "here.toml").write_text(text)
    (tmp_path / "there.toml").write_text(text.replace(str(here.folder), str(tmp_path / "there")))
    runs = [load_comparison(tmp_path / f"{name}.toml", ["name=tiny"]) for name in ("here", "there")]
    same(compare(runs[1], engine=Ray()), compare(runs[0], jobs=1))

    (tmp_path / "data" / "seed.txt").write_text("not a number")
    with pytest.raises(DataError, match="data are damaged"):
        compare(
            load_comparison(tmp_path / "there.toml", ["compare.folder=" + str(tmp_path / "third")]),
            engine=Ray(),
        )


TASK = """
import torch
from jwins.errors import DataError
from jwins.tasks import Dataset, Task

class Own(Task):
    def __init__(self, data):
        try:
            seed = int((data / "seed.txt").read_text())
        except ValueError:
            raise DataError("data are damaged") from None
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(96, 6, generator=generator)
        targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(dim=1)
        self.train, self.test = Dataset(inputs[:64], targets[:64]), Dataset(inputs[64:], targets[64:])

    def model(self):
        return torch.nn.Linear(6, 3)
"""


def test_files_are_fetched_where_they_are_not_and_checked(
    two_machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jwins.engines.ray import files

    monkeypatch.setenv("JWINS_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_CHUNK_BYTES", 1000)
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "large.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "empty").write_bytes(b"")
    (tmp_path / "task.py").write_text("1")
    shipping = files.FileSharing()
    sent = [shipping.send(folder), shipping.send(tmp_path / "task.py")]
    assert files.local_copy(sent[0]) == folder, "it is here already"
    files._found.clear()
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "task.py").write_text("2")
    found = [files.local_copy(one) for one in sent]
    assert (found[0] / "deep" / "large.bin").read_bytes() == bytes(range(256)) * 40
    assert (found[0] / "empty").read_bytes() == b""
    assert found[1].name == "task.py"
    assert found[1].read_text() == "1"
    with pytest.raises(DataError, match="no such file or folder, so it cannot be sent"):
        shipping.send(tmp_path / "nothing")
    other = files.SharedPath(
        str(tmp_path / "other"), "0" * 64, {"": "0" * 64}, {"0" * 64: next(iter(sent[1].pieces.values()))}
    )
    with pytest.raises(DataError, match="was damaged on the way"):
        files.local_copy(other)


def test_a_cluster_that_will_not_do_is_refused(
    two_machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jwins.compare import on_ray
    from jwins.engines.ray import cluster

    with monkeypatch.context() as patch:
        patch.setattr(on_ray, "memory_needed", lambda experiments: 1e13)
        with pytest.raises(
            UsageError, match=r"too small: 1 runs of 1 core, 1e\+04 GB of memory each do not fit"
        ):
            compare(comparison(tmp_path / "large"), engine=Ray())
    version = cluster.metadata.version
    monkeypatch.setattr(cluster.metadata, "version", lambda name: "1.0" if name == "torch" else version(name))
    with pytest.raises(UsageError, match=r"torch is .* there, 1\.0 here; install the same versions"):
        compare(comparison(tmp_path / "versions"), engine=Ray())
