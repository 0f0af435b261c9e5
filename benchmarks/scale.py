"""Thousands of nodes of a small model in one process: seconds per round by part, and a line through two sizes.

Each size runs in a process of its own. The first two are fitted, part by part, by a line in the number of
nodes, and the others are compared with it. From the root:

    python -m benchmarks.scale [--sizes 500 1000 4000 10000] [--rounds 5] [--spread 0.3] [--codec raw]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import table
from benchmarks.rounds import DIGEST
from benchmarks.training import POOL, Synthetic, make_trainer, mlp, synthetic_parts
from jwins.engines.node_group import NodeGroup
from jwins.engines.simulator import Progress, SimulatedDriver
from jwins.node import Rules
from jwins.run.memory import peak_bytes
from jwins.run_folder.rows import StartRow
from jwins.scenario import Compute
from jwins.sharing import full
from jwins.topology import Regular
from jwins.wire.codec import codec
from jwins.wire.frame import Wire

DEGREE = 4
PARTS = ("training", "share and merge", "decoding", "driver")


@dataclass(frozen=True)
class Size:
    """Cost of one size: seconds per round by activity, over all rounds except the first."""

    nodes: int
    seconds: dict[str, float]
    evaluation_s: float
    peak_mb: float

    @property
    def round_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def events_per_s(self) -> float:
        """Of the driver alone: a training, and a frame through and at its receiver for each edge."""
        return self.nodes * (1 + 2 * DEGREE) / max(1e-9, self.seconds["driver"])


def measure(nodes: int, rounds: int, spread: float, codec_name: str) -> Size:
    trainer = make_trainer(
        Synthetic(lambda: mlp(64, 64, 10), (64,), POOL), synthetic_parts(nodes), batching="stacked", threads=1
    )
    size = trainer.layout.size
    start = StartRow("scale", DIGEST.hex(), 1, nodes, size, float(DEGREE), {}, {}, {}, trainer.batching)
    rules = Rules(
        full(),
        Wire(codec(codec_name), DIGEST, size),
        Regular(num_nodes=nodes, seed=1, degree=DEGREE),
        rounds=rounds,
        seed=1,
        evaluate_at=frozenset({0, rounds}),
    )
    seen: dict[int, tuple[float, dict[str, float]]] = {}

    def look(progress: Progress) -> None:
        if progress.round not in seen:
            seen[progress.round] = time.perf_counter(), dict(group.wall_s)

    group = NodeGroup(trainer, rules)
    SimulatedDriver([group], start=start, compute=Compute(10.0, spread), on_progress=look).run()
    (since, before), (until, after) = seen[1], seen[rounds]
    spent = {name: (after[name] - before[name]) / (rounds - 1) for name in PARTS[:-1]}
    evaluation_s = after["evaluation"] - before["evaluation"]
    spent["driver"] = (until - since - evaluation_s) / (rounds - 1) - sum(spent.values())
    return Size(nodes, spent, evaluation_s, peak_bytes() / 1e6)


def apart(nodes: int, given: argparse.Namespace) -> Size:
    words = ["--one", str(nodes), "--rounds", str(given.rounds), "--spread", str(given.spread)]
    words += ["--codec", given.codec]
    command = [sys.executable, "-m", "benchmarks.scale", *words]
    root = Path(__file__).parents[1]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    return Size(**json.loads(printed.splitlines()[-1]))


def predicted(few: Size, many: Size, nodes: int) -> dict[str, float]:
    """By a line through two sizes, for each part; in proportion where it would begin below nothing."""
    found = {}
    for name in PARTS:
        slope = (many.seconds[name] - few.seconds[name]) / (many.nodes - few.nodes)
        slope = min(max(slope, 0.0), many.seconds[name] / many.nodes)
        found[name] = many.seconds[name] + slope * (nodes - many.nodes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spread", type=float, default=0.0, help="of the nodes' slowness, as compute.spread")
    parser.add_argument("--codec", choices=["pco", "raw"], default="pco", help="of the frames")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(asdict(measure(given.one, given.rounds, given.spread, given.codec))))
        return
    sizes = [apart(nodes, given) for nodes in given.sizes]
    rows = []
    for size in sizes:
        line = predicted(sizes[0], sizes[1], size.nodes)
        parts = [f"{size.seconds[name]:.2f} ({line[name]:.2f})" for name in PARTS]
        total = f"{size.round_s:.2f} ({sum(line.values()):.2f})"
        driver = [f"{size.seconds['driver'] / size.round_s:.0%}", f"{size.events_per_s:,.0f}"]
        rows.append([size.nodes, *parts, total, *driver, f"{size.evaluation_s:.2f}", f"{size.peak_mb:,.0f}"])
    heads = [
        "nodes",
        *(f"{name} s" for name in PARTS),
        "round s",
        "driver",
        "events/s",
        "evaluation s",
        "peak MB",
    ]
    print("seconds per round, in brackets by the line through the first two sizes")
    print(table(heads, rows))


if __name__ == "__main__":
    main()
