"""Cost of sharing on top of training: whole JWINS rounds, a thousand nodes, and each step by itself.

From the root:

    python -m benchmarks.rounds [--nodes 96] [--repetitions 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.training import (
    POOL,
    GroupNormLeNet,
    Synthetic,
    make_trainer,
    mlp,
    synthetic_parts,
)
from jwins.engines.node_group import NodeGroup
from jwins.engines.simulator import Progress, SimulatedDriver
from jwins.node import Rules
from jwins.ops.select import count_of, largest_k
from jwins.rng import RoundContext
from jwins.run.memory import peak_bytes
from jwins.run_folder.rows import StartRow
from jwins.sharing import FixedCutoff, Sharing, closed_loop, full, jwins, stateless
from jwins.sharing.update import Received
from jwins.topology import Regular
from jwins.training.trainer import Trainer
from jwins.wire.codec import codec
from jwins.wire.frame import Frame, Wire

DIGEST = b"\0" * 8
WARM_UP = 2


@dataclass(frozen=True)
class RoundRow:
    """Whole rounds of one algorithm against local training alone, in one run: means over its rounds."""

    name: str
    training_ms: float
    round_ms: float
    ratio: float
    target: float


@dataclass(frozen=True)
class ScaleRow:
    """One size of network in a process of its own."""

    nodes: int
    seconds_per_round: float
    peak_mb: float
    growth_mb_per_node: float


@dataclass(frozen=True)
class StepRow:
    """One step of a JWINS round of one node: median and fastest of the repetitions."""

    params: int
    step: str
    median_us: float
    least_us: float


def simulate(trainer: Trainer, sharing: Sharing, rounds: int, *, threads: int) -> SimulatedDriver:
    n, size = trainer.num_nodes, trainer.layout.size
    start = StartRow("bench", DIGEST.hex(), 1, n, size, 4.0, {}, {}, {}, trainer.batching)
    wire = Wire(codec("pco"), DIGEST, sharing.update_dim(size))
    rules = Rules(sharing, wire, Regular(num_nodes=n, seed=1, degree=4), rounds=rounds, seed=1)
    return SimulatedDriver([NodeGroup(trainer, rules, threads=threads)], start=start)


def round_rows(num_nodes: int = 96, repetitions: int = 15) -> list[RoundRow]:
    """CIFAR-10's GN-LeNet: 3 local steps of 8 images, a static 4-regular graph, the default codec, two threads.

    After every round of the simulation, a trainer without simulation trains a round; both are timed, in turns,
    because the machine's speed drifts by more than what is measured.
    """
    task = Synthetic(GroupNormLeNet, (3, 32, 32), POOL)
    parts = synthetic_parts(num_nodes)
    alone = make_trainer(task, parts, batching="loop", threads=2)
    rows = []
    algorithms = {
        "JWINS": jwins(),
        "full sharing": full(),
        "closed loop": closed_loop(),
        "stateless": stateless(),
    }
    for name, sharing in algorithms.items():
        trainer = make_trainer(task, parts, batching="loop", threads=2)
        simulator = simulate(trainer, sharing, WARM_UP + repetitions, threads=2)
        whole: list[float] = []
        training: list[float] = []
        marks = [time.perf_counter()]

        def on_progress(progress: Progress, whole=whole, training=training, marks=marks) -> None:
            if progress.round == len(whole):
                return
            now = time.perf_counter()
            whole.append((now - marks[-1]) * 1e3)
            alone.train(dict.fromkeys(range(num_nodes), progress.round))
            marks.append(time.perf_counter())
            training.append((marks[-1] - now) * 1e3)

        simulator.on_progress = on_progress
        simulator.run()
        del whole[:WARM_UP], training[:WARM_UP]
        # Means: nodes that are ahead train their next round before the last ends this one; single rounds blur.
        base, all_of_it = sum(training) / repetitions, sum(whole) / repetitions
        rows.append(RoundRow(f"{name}, {num_nodes} nodes", base, all_of_it, all_of_it / base, 1.25))
    return rows


def scale_rows(sizes: tuple[int, ...] = (100, 300, 1000)) -> list[ScaleRow]:
    """The 50,890-parameter MLP under JWINS: seconds per round and peak memory, each size in its own process."""
    rows: list[ScaleRow] = []
    for nodes in sizes:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.rounds", "--scale", str(nodes)],
            capture_output=True,
            text=True,
            check=True,
        )
        measured = json.loads(done.stdout.splitlines()[-1])
        growth = 0.0 if not rows else (measured["peak_mb"] - rows[0].peak_mb) / (nodes - rows[0].nodes)
        rows.append(ScaleRow(nodes, measured["seconds"], measured["peak_mb"], growth))
    return rows


def one_scale(nodes: int, rounds: int = 5) -> dict[str, float]:
    """Seconds per round after the first, and peak memory of this process in MB."""
    task = Synthetic(lambda: mlp(784, 64, 10), (784,), POOL)
    trainer = make_trainer(task, synthetic_parts(nodes), batching="auto", threads=2)
    marks: list[tuple[int, float]] = []
    simulator = simulate(trainer, jwins(), rounds + 1, threads=2)

    def on_progress(progress: object) -> None:
        done = progress.round  # type: ignore[attr-defined]
        if not marks or marks[-1][0] != done:
            marks.append((done, time.perf_counter()))

    simulator.on_progress = on_progress
    simulator.run()
    at = dict(marks)
    return {
        "seconds": (at[rounds + 1] - at[1]) / rounds,
        "peak_mb": peak_bytes() / 1e6,
    }


def step_rows(sizes: tuple[int, ...] = (89_834, 1_690_046), repetitions: int = 30) -> list[StepRow]:
    """Share, encode, decode and merge (four neighbours) at a fraction of 0.3, and two choices, on one thread.

    Most of the rows of an embedding get no gradient in a round, so most of its scores are zero.
    """
    torch.set_num_threads(1)
    rows = []
    for params in sizes:
        generator = torch.Generator().manual_seed(1)
        x = 0.05 * torch.randn(params, generator=generator)
        y = x + 0.01 * torch.randn(params, generator=generator)
        algorithm = jwins(FixedCutoff(0.3))
        ctx = RoundContext(seed=1, node=0, round=0, weights=dict.fromkeys(range(1, 5), 0.2))
        before = algorithm.init(x)
        update, after = algorithm.share(before, y, ctx)
        wire = Wire(codec("pco"), DIGEST, update.dim)
        packed = wire.pack(Frame(0, 0, update))
        received = [Received(j, 0, 0.2, update) for j in range(1, 5)]
        scores = y - x
        few = torch.where(torch.rand(params, generator=generator) < 0.6, 0.0, scores)
        k = count_of(0.3, params)
        steps: dict[str, Callable[[], object]] = {
            "share": lambda a=algorithm, b=before, y=y, c=ctx: a.share(b, y, c),
            "encode": lambda u=update, w=wire: w.pack(Frame(0, 0, u)),
            "decode": lambda p=packed, w=wire: w.unpack(p.data),
            "merge": lambda a=algorithm, s=after, y=y, r=received, c=ctx: a.merge(s, y, r, c),
            "choose": lambda s=scores, k=k: largest_k(s, k),
            "choose, 60 % zeros": lambda s=few, k=k: largest_k(s, k),
        }
        for name, step in steps.items():
            step()
            taken = []
            for _ in range(repetitions):
                started = time.perf_counter()
                step()
                taken.append((time.perf_counter() - started) * 1e6)
            rows.append(StepRow(params, name, statistics.median(taken), min(taken)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--scale", type=int, help="only measure this many nodes, and print JSON")
    arguments = parser.parse_args()
    if arguments.scale:
        print(json.dumps(one_scale(arguments.scale)))
        return
    print("3 local steps of 8 images, GN-LeNet (89,834), two threads; a round is all but evaluation")
    for row in round_rows(arguments.nodes, arguments.repetitions):
        print(
            f"{row.name}: training alone {row.training_ms:.0f} ms, whole round {row.round_ms:.0f} ms, "
            f"ratio {row.ratio:.2f} (target at most {row.target:.2f})"
        )
    print("\nJWINS with the MLP of 50,890 parameters, all nodes in one process")
    scales = scale_rows()
    for scale in scales:
        print(f"{scale.nodes:5d} nodes: {scale.seconds_per_round:.2f} s a round, peak {scale.peak_mb:.0f} MB")
    first, last = scales[0], scales[-1]
    print(
        f"from {first.nodes} to {last.nodes} nodes ({last.nodes / first.nodes:.0f} times as many): "
        f"time x {last.seconds_per_round / first.seconds_per_round:.1f}, "
        f"memory x {last.peak_mb / first.peak_mb:.1f}, {last.growth_mb_per_node:.2f} MB a node"
    )
    print("\nOne node's steps at a fraction of 0.3, microseconds on one thread: median (fastest)")
    for step in step_rows():
        print(f"{step.params:9,d} parameters, {step.step}: {step.median_us:.0f} ({step.least_us:.0f})")


if __name__ == "__main__":
    main()
