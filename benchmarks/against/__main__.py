"""Rounds of CIFAR-10's GN-LeNet against a bare torch loop, pfl and Flower: 3 steps of 8 images on each node.

The floor trains and exchanges nothing. pfl and Flower average on a server and count no bytes. Contestants take
turns, each run in a new process; seconds per round are the difference between runs of many and of few rounds.
pfl and Flower have environments of their own in ``.local/against``, which the first call installs with pip; one
that cannot be installed is skipped. Linux only. From the root, on a quiet machine:

    python -m benchmarks.against [--data FOLDER] [--nodes 96] [--rounds 10 30] [--repetitions 2] [--only ours]

Without a folder with CIFAR-10's parquet files, random images stand in for it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

from benchmarks.report import machine, table, verdict

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".local" / "against"
TORCH = "torch==2.13.0"
MOST = {"ours, full": 1.12, "ours, jwins": 1.2, "ours, closed_loop": 1.2}
FLOOR = "floor: bare torch, two threads"
_MARK = "JWINS_AGAINST"
_TICKS = os.sysconf("SC_CLK_TCK")


def environment(name: str, requirement: str) -> str | None:
    """Return the interpreter of another package's environment, which is made if it is not there yet."""
    folder = ENVIRONMENTS / name
    done = folder / "installed"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", TORCH, "numpy", requirement]
        if subprocess.run(pip, check=False).returncode:
            return None
        done.touch()
    return str(folder / "bin" / "python")


def contestants() -> dict[str, list[str]]:
    """Return each one's command, without folder, nodes and rounds."""
    found = {FLOOR: [sys.executable, str(HERE / "work.py")]}
    ours = [sys.executable, "-m", "benchmarks.against.ours"]
    found |= {name: [*ours, name.removeprefix("ours, ")] for name in MOST}
    for name, requirement in (("pfl", "pfl==0.6.0"), ("flower", "flwr[simulation]==1.42.0")):
        interpreter = environment(name, requirement)
        if interpreter is None:
            print(f"{name} is skipped: {requirement} does not install here")
        else:
            found[requirement] = [interpreter, str(HERE / f"in_{name}.py")]
    return found


def measured(command: list[str]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and the peak of resident MiB, of all processes that a command starts."""
    mark = uuid.uuid4().hex
    settings = os.environ | {_MARK: mark, "OMP_NUM_THREADS": "1"}
    settings |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    started, spent, peak = time.perf_counter(), {}, 0.0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=settings, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None:
            seconds, resident = snapshot(f"{_MARK}={mark}".encode())
            spent |= seconds
            peak = max(peak, resident)
            time.sleep(0.5)
        wall = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    return wall, sum(spent.values()), peak


def snapshot(token: bytes) -> tuple[dict[str, float], float]:
    """Return CPU seconds by process, and resident MiB, of the processes with ``token`` in their environment."""
    spent, resident = {}, 0.0
    for place in Path("/proc").iterdir():
        try:
            if not place.name.isdigit() or token not in (place / "environ").read_bytes():
                continue
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            lines = (place / "smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended, or is another user's
            continue
        spent[place.name] = (int(fields[11]) + int(fields[12])) / _TICKS
        resident += next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)
    return spent, resident


def write_images(folder: Path, data: Path | None) -> None:
    """Write the training images, once for all contestants."""
    if data is None:
        generator = np.random.default_rng(1)
        inputs = generator.integers(256, size=(50_000, 3, 32, 32), dtype=np.uint8)
        targets = generator.integers(10, size=50_000)
    else:
        from jwins.tasks.cifar10 import Cifar10

        train = Cifar10(data=data).train
        inputs, targets = train.inputs.numpy(), train.targets.numpy()
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "targets.npy", targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the parquet files of uoft-cs/cifar10")
    parser.add_argument("--nodes", type=int, default=96)
    parser.add_argument("--rounds", type=int, nargs=2, default=[10, 30])
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--only", default="", help="text in the names of those that run, besides the floor")
    given = parser.parse_args()
    few, many = given.rounds
    each = {name: c for name, c in contestants().items() if name == FLOOR or given.only in name}
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in each}
    with tempfile.TemporaryDirectory() as place:
        write_images(Path(place), given.data)
        for turn in range(given.repetitions):
            for name in list(each)[:: -1 if turn % 2 else 1]:
                short, long = (measured([*each[name], place, str(given.nodes), str(n)]) for n in (few, many))
                wall, cpu = ((long[i] - short[i]) / (many - few) for i in (0, 1))
                taken[name].append((wall, cpu, short[0] - few * wall, long[2]))
                print(f"{name}: {wall:.2f} s and {cpu:.2f} CPU s per round", file=sys.stderr, flush=True)
    medians = {
        name: [statistics.median(column) for column in zip(*of, strict=True)] for name, of in taken.items()
    }
    rows = []
    for name, (wall, cpu, start, peak) in medians.items():
        ratio = wall / medians[FLOOR][0]
        goal = verdict(ratio, at_most=MOST[name]) if name in MOST else ""
        rows.append([name, f"{wall:.2f}", f"{ratio:.2f}", f"{cpu:.2f}", f"{start:.1f}", f"{peak:,.0f}", goal])
    print(machine())
    print(
        f"{given.nodes} nodes, {'CIFAR-10' if given.data else 'random images'}, medians of {given.repetitions}"
    )
    print(table(["", "s per round", "x floor", "CPU s per round", "start-up s", "peak MiB", "goal"], rows))


if __name__ == "__main__":
    main()
