"""Speed of evaluation and training, with and without the optimizations of this package.

Each contestant is a process of its own, and they take turns; medians are compared. From the root:

    python -m benchmarks.evaluation [--repetitions 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

NODES, SAMPLES = 8, 512
CONTESTANTS = {
    "as it is": (),
    "large batches": ("--large-batches",),
    "memory handed back": ("--hand-back",),
    "neither": ("--large-batches", "--hand-back"),
}


def measure(options: Sequence[str]) -> dict[str, float]:
    """Milliseconds per image and model of evaluation, and per step of training, in this process."""
    import torch

    import jwins.training.training_context
    from benchmarks.training import (
        LOCAL_STEPS,
        POOL,
        GroupNormLeNet,
        Synthetic,
        make_trainer,
        synthetic_parts,
    )
    from jwins.training.allocator import keep_freed_memory
    from jwins.training.evaluation import EvalRequest

    if "--hand-back" not in options:
        keep_freed_memory()
    if "--large-batches" in options:
        jwins.training.training_context.EVALUATION_BATCH_CPU = 2**40
    task = Synthetic(GroupNormLeNet, (3, 32, 32), POOL)
    task.test = task.train
    trainer = make_trainer(task, synthetic_parts(NODES), batching="loop", threads=1)
    rows, nodes, samples = trainer.initial()[None].repeat(NODES, 1), list(range(NODES)), torch.arange(SAMPLES)
    request = EvalRequest(rows, nodes, [trainer.buffers(node) for node in nodes], samples)
    found = {"evaluation": [], "training": []}
    for turn in range(3):
        start = time.perf_counter()
        trainer.evaluate_all([request])
        middle = time.perf_counter()
        trainer.train(dict.fromkeys(nodes, turn))
        end = time.perf_counter()
        found["evaluation"].append((middle - start) / (NODES * SAMPLES) * 1e3)
        found["training"].append((end - middle) / (NODES * LOCAL_STEPS) * 1e3)
    return {name: min(values) for name, values in found.items()}


def compare(repetitions: int) -> dict[str, dict[str, float]]:
    """Medians over the turns of each contestant."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for repetition in range(repetitions):
        names = list(CONTESTANTS)
        for name in names if repetition % 2 else reversed(names):
            command = [sys.executable, "-m", "benchmarks.evaluation", "--measure", *CONTESTANTS[name]]
            taken[name].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    return {
        name: {what: statistics.median(turn[what] for turn in turns) for what in turns[0]}
        for name, turns in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given, options = parser.parse_known_args()
    if given.measure:
        print(json.dumps(measure(options)))
        return
    found = compare(given.repetitions)
    best = found["as it is"]
    print(f"GN-LeNet, one thread; medians of {given.repetitions} processes\n")
    print(f"{'':20} {'evaluation':>22} {'training':>22}")
    for name, row in found.items():
        cells = [f"{row[what]:8.3f} ms ({row[what] / best[what]:.2f} x)" for what in ("evaluation", "training")]
        print(f"{name:20} {cells[0]:>22} {cells[1]:>22}")


if __name__ == "__main__":
    main()
