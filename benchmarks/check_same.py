"""Check that results have not changed: SHA-256 of parameters, traffic and rows of many small experiments.

For a change that must not change results. Runs every experiment with the sources of a commit and with those
that are here, in two processes, and compares column by column. From the root:

    python -m benchmarks.check_same [--commit HEAD] [--data FOLDER] [--only TEXT]

or in two steps, for instance to keep what a release computed:

    python -m benchmarks.check_same --write before.json
    python -m benchmarks.check_same --against before.json

MovieLens and CIFAR-10 are skipped without ``--data``, the folder with ``movielens-small`` and ``cifar10``.
Digests of different machines or versions of torch cannot be compared.

This file uses only what users use, as it must run with older sources: ``load`` and ``simulate``, the keys of
TOML, and the files of a run folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import jwins
from jwins.tasks import Dataset, Task

ROOT = Path(__file__).resolve().parent.parent

RENAMED = {"traffic.key": "traffic.keyframe"}
"""Columns that had another name in older digests and run folders, by that name."""

BASE = """
name = "same"
task = { name = "digits", partition = { kind = "shards" } }
nodes = { count = 8 }
topology = { kind = "regular", degree = 4 }
compute = { spread = 0.2, jitter = 0.3 }
run = { rounds = 10, eval_every = 4, checkpoint_every = 3, threads = 2, device = "cpu" }
"""
"""Settings of every experiment unless it has its own; none is left to a default that may change."""

ALGORITHMS = {
    "full": '{ kind = "full" }',
    "full, bfloat16": '{ kind = "full", values = "bfloat16" }',
    "random-k": '{ kind = "random_k", fraction = 0.2 }',
    "top-k": '{ kind = "top_k", fraction = 0.2 }',
    "top-k, accumulated": '{ kind = "top_k", fraction = 0.2, accumulate = true }',
    "CHOCO-SGD": '{ kind = "choco", fraction = 0.2, gamma = 0.4 }',
    "CHOCO-SGD, bfloat16": '{ kind = "choco", fraction = 0.2, gamma = 0.4, values = "bfloat16" }',
    "JWINS, since_sent": '{ kind = "jwins", score = "since_sent" }',
    "JWINS, reference": '{ kind = "jwins", score = "reference" }',
    "JWINS, training_only": '{ kind = "jwins", score = "training_only" }',
    "JWINS, not accumulated": '{ kind = "jwins", accumulate = false }',
    "JWINS, bfloat16": '{ kind = "jwins", values = "bfloat16" }',
    "JWINS, periodization": '{ kind = "jwins", mode = "periodization", wavelet = "db3", levels = 2 }',
    "closed loop": '{ kind = "closed_loop" }',
    "closed loop, fixed step": '{ kind = "closed_loop", step = 0.01, wavelet = "none" }',
    "closed loop, budget": '{ kind = "closed_loop", budget = 0.4, gamma = 0.9 }',
    "stateless": '{ kind = "stateless" }',
    "BEER": '{ kind = "beer", fraction = 0.2, gamma = 0.4, momentum = 0.5 }',
    "SparseLoCo": '{ kind = "sparse_loco", fraction = 0.1, gamma = 0.5 }',
    "Moniqua": '{ kind = "moniqua", theta = 0.1 }',
    "JWINS, no wavelet": '{ kind = "jwins", wavelet = "none", cutoff = { kind = "fixed", fraction = 0.1 } }',
}

TOPOLOGIES = {
    "ring": '{ kind = "ring" }',
    "star": '{ kind = "star" }',
    "torus": '{ kind = "torus" }',
    "fully connected": '{ kind = "fully_connected" }',
    "small world, dynamic": '{ kind = "small_world", degree = 4, dynamic = true }',
    "Erdos-Renyi": '{ kind = "erdos_renyi", p = 0.5 }',
    "one-peer exponential": '{ kind = "one_peer_exponential" }',
}

FAULTS = """[
    { kind = "crash", node = 1, round = 3 }, { kind = "rejoin", node = 1, round = 6 },
    { kind = "crash", node = 5, round = 7 }, { kind = "drop", sender = 2, round = 4 },
    { kind = "drop", sender = 3, receiver = 0, round = 5 },
    { kind = "delay", sender = 4, round = 2, seconds = 0.5 },
    { kind = "delay", sender = 6, receiver = 7, round = 3, seconds = 0.05 }]"""
FAULTY = [f"faults={' '.join(FAULTS.split())}", "run.deadline_s=0.2"]

DYNAMIC = "topology.dynamic=true"
ADAM = 'train.optimizer={ kind = "adam", lr = 0.002 }'
REMEMBERING = ("full", "CHOCO-SGD", "JWINS, reference", "closed loop")
"""Algorithms between which lost frames, new neighbours and interruptions tell the difference."""


class Noisy(Task):
    """A model that has buffers and draws: batch normalization and dropout."""

    def __init__(self) -> None:
        self.name = "noisy"
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(600, 12, generator=generator)
        data = Dataset(inputs, (inputs[:, :3].sum(dim=1) > 0).long())
        self.train, self.test = data, Dataset(data.inputs[:200], data.targets[:200])

    def model(self) -> nn.Module:
        """One hidden layer."""
        return nn.Sequential(
            nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2)
        )


@dataclass(frozen=True)
class Case:
    """An experiment.

    Attributes:
        name: what is printed.
        assignments: laid over ``BASE``.
        stop_at: the round after which it is interrupted, to be resumed; None to run through.
        needs: folder of data that it reads.
    """

    name: str
    assignments: tuple[str, ...]
    stop_at: int | None = None
    needs: str | None = None


def cases() -> Iterator[Case]:
    """All experiments."""
    for name, table in ALGORITHMS.items():
        for batching in ("loop", "stacked"):
            yield Case(f"{name}, {batching}", (f"sharing={table}", f"train.batching={batching}"))
    for name, table in TOPOLOGIES.items():
        yield Case(name, (f"topology={table}", f"sharing={ALGORITHMS['CHOCO-SGD']}"))
    for name in REMEMBERING:
        sharing = f"sharing={ALGORITHMS[name]}"
        yield Case(f"{name}, dynamic graph", (sharing, DYNAMIC))
        yield Case(f"{name}, every fault", (sharing, *FAULTY))
        yield Case(f"{name}, every fault, dynamic graph", (sharing, *FAULTY, DYNAMIC))
        yield Case(f"{name}, resumed", (sharing,), stop_at=5)
        yield Case(f"{name}, every fault, resumed", (sharing, *FAULTY, DYNAMIC), stop_at=5)
    for batching in ("loop", "stacked"):
        for state in ("keep", "reset"):
            own = (ADAM, f"train.optimizer_state={state}", f"train.batching={batching}")
            yield Case(f"Adam, {state}, {batching}", own)
            yield Case(f"Adam, {state}, {batching}, resumed", own, stop_at=5)
        noisy = (f"task.file={Path(__file__).resolve()}:Noisy", f"train.batching={batching}")
        yield Case(f"batch normalization and dropout, {batching}", noisy)
        yield Case(f"batch normalization and dropout, {batching}, resumed", noisy, stop_at=5)
    for codec in ("raw", "paper"):
        yield Case(f"codec {codec}", (f"wire.codec={codec}",))
    yield Case("Dirichlet partition", ('task.partition={ kind = "dirichlet", alpha = 0.3 }',))
    yield Case("few samples early", ("run.eval_samples=300", "run.eval_samples_early=40", "run.eval_last=2"))
    yield Case("slow links", ("links.uplink_mbps=0.5", "links.latency_ms=50", "run.deadline_s=0.3"))
    movielens = ("task.name=movielens", "task.partition.kind=by_key", "run.eval_own=true")
    cifar10 = ("task.name=cifar10", "run.eval_samples=400")
    for name in REMEMBERING:
        sharing = f"sharing={ALGORITHMS[name]}"
        yield Case(f"MovieLens, {name}", (*movielens, sharing), needs="movielens-small")
        yield Case(f"CIFAR-10, {name}", (*cifar10, sharing), needs="cifar10")


def run(case: Case, folder: Path, data: Path | None) -> None:
    """Run an experiment; with ``stop_at``, interrupted as by Ctrl-C and resumed."""
    base = folder.with_suffix(".toml")
    text = BASE
    if any(assignment.startswith("task.file=") for assignment in case.assignments):
        text = text.replace('name = "digits", ', "")
    base.write_text(text, encoding="utf-8")
    place = [f"task.data={data / case.needs}"] if data is not None and case.needs else []
    experiment = jwins.load(base, [*case.assignments, *place, f"run.folder={folder}"])
    if case.stop_at is not None:
        stopped = False

        def interrupt(progress: Any) -> None:
            nonlocal stopped
            if not stopped and progress.round >= case.stop_at:
                stopped = True
                signal.raise_signal(signal.SIGINT)

        status = jwins.simulate(experiment, progress=interrupt).status
        assert status == "interrupted", status
    status = jwins.simulate(experiment, resume=case.stop_at is not None).status
    assert status == "finished", status


def digest(value: Any) -> str:
    """SHA-256 of plain values; of floats, every bit counts."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return the measurements of a run by column."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    columns: dict[str, list[Any]] = {}
    for row in rows:
        if row["kind"] == "eval":
            for path, value in leaves(row):
                if path != "kind":
                    columns.setdefault(path, []).append((row["round"], value))
    end = rows[-1]
    found = {path: digest(values) for path, values in columns.items()}
    found |= {f"end.{key}": digest(end[key]) for key in ("status", "round", "time_s", "sha256")}
    return found | {"edges": digest(edges(folder, end)), "parameters": parameters(folder)}


def leaves(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Return the values of nested tables by dotted path."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def edges(folder: Path, end: Mapping[str, Any]) -> list[list[int]]:
    """Bytes by kind for each pair of nodes: from ``traffic.csv``, or from the last row of runs without one."""
    kinds = ("positions", "values", "header", "keyframe", "control")
    table = folder / "traffic.csv"
    if table.is_file():
        head, *lines = table.read_text(encoding="utf-8").splitlines()
        assert [kind_now(word) for word in head.split(",")] == ["source", "target", *kinds], head
        return sorted([int(word) for word in line.split(",")] for line in lines)
    found = []
    for edge in end["traffic"]:
        sent = {kind_now(kind): count for kind, count in edge["bytes"].items()}
        found.append([edge["source"], edge["target"], *(sent.get(kind, 0) for kind in kinds)])
    return sorted(found)


def kind_now(kind: str) -> str:
    """Return the name that a kind of bytes has now."""
    return RENAMED.get(f"traffic.{kind}", kind).removeprefix("traffic.")


def parameters(folder: Path) -> str:
    """Of the final models of all nodes."""
    total = hashlib.sha256()
    for path in sorted((folder / "final").iterdir()):
        tensors: dict[str, Tensor] = load_file(path)
        for name, tensor in sorted(tensors.items()):
            total.update(f"{path.name} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(
                tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"%r" % tensor
            )
    return total.hexdigest()


def compute(only: str, data: Path | None) -> dict[str, Any]:
    """Run all experiments that can be run."""
    found: dict[str, dict[str, str]] = {}
    skipped: dict[str, str] = {}
    for case in cases():
        if only not in case.name:
            continue
        if case.needs is not None and (data is None or not (data / case.needs).is_dir()):
            skipped[case.name] = f"no folder {case.needs} in {data}" if data else "no --data"
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "run")
            run(case, folder, data)
            found[case.name] = digests(folder)
        print(f"  {case.name}: {found[case.name]['parameters'][:16]}", file=sys.stderr, flush=True)
    return {"machine": about(), "digests": found, "skipped": skipped}


def about() -> str:
    """Return everything that digests depend on, except the sources."""
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"{processor}, {platform.system()}, torch {torch.__version__}"


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Print a line for each experiment; whether all are equal."""
    if before["machine"] != after["machine"]:
        print(f"not comparable: {before['machine']} before, {after['machine']} now")
        return False
    same = True
    width = max(map(len, after["digests"]), default=0)
    for name, mine in after["digests"].items():
        theirs = before["digests"].get(name)
        if theirs is None:
            print(f"{name:<{width}}  new")
            continue
        theirs = {RENAMED.get(column, column): found for column, found in theirs.items()}
        both = [column for column in mine if column in theirs]
        different = [column for column in both if mine[column] != theirs[column]]
        same &= not different
        verdict = f"DIFFERENT: {', '.join(different)}" if different else f"equal in {len(both)} columns"
        only = {"only before": theirs.keys() - mine.keys(), "only now": mine.keys() - theirs.keys()}
        extra = "".join(f"; {when}: {', '.join(sorted(some))}" for when, some in only.items() if some)
        print(f"{name:<{width}}  {verdict}{extra}")
    for name, why in after["skipped"].items():
        print(f"{name:<{width}}  skipped: {why}")
    return same


def of_commit(commit: str, arguments: list[str]) -> dict[str, Any]:
    """Compute the digests with the sources of a commit, in a separate process."""
    packed = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(place, filter="data")
        file = Path(place, "digests.json")
        environment = os.environ | {"PYTHONPATH": str(Path(place, "src"))}
        command = [sys.executable, str(Path(__file__).resolve()), "--write", str(file), *arguments]
        subprocess.run(command, cwd=place, env=environment, check=True)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--commit", default="HEAD", help="compare with the sources of this commit")
    what.add_argument("--write", type=Path, metavar="FILE", help="only write the digests")
    what.add_argument(
        "--against", type=Path, metavar="FILE", help="compare with digests that were written before"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="TEXT", help="experiments whose names have this in them")
    given = parser.parse_args()
    data = None if given.data is None else given.data.resolve()
    print(f"sources: {Path(jwins.__file__).parent}", file=sys.stderr, flush=True)
    if given.write is not None:
        found = compute(given.only, data)
        given.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    if given.against is not None:
        before = json.loads(given.against.read_text(encoding="utf-8"))
    else:
        before = of_commit(given.commit, ["--only", given.only, *(["--data", str(data)] if data else [])])
    sys.exit(0 if compare(before, compute(given.only, data)) else 1)


if __name__ == "__main__":
    main()
