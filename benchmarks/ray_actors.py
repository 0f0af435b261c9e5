"""Two actors of one core each on a Ray cluster of this machine, against one process with one thread.

Runs alternate, so that both meet the same machine. Needs the extra ``ray``. From the root:

    python -m benchmarks.ray_actors [--rounds 6] [--repetitions 2] [--sharing full]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwins
from benchmarks.report import table, verdict
from benchmarks.training import POOL, GroupNormLeNet, Synthetic, mlp
from jwins.engines.simulator import Progress


def image_task() -> Synthetic:
    return Synthetic(GroupNormLeNet, (3, 32, 32), POOL)


def vector_task() -> Synthetic:
    return Synthetic(lambda: mlp(64, 512, 34, 10), (64,), POOL)


CASES = {"GN-LeNet, 32 nodes": (image_task, 32, "loop"), "50 k MLP, 256 nodes": (vector_task, 256, "auto")}


def experiment(case: str, rounds: int, folder: Path, sharing: str = "jwins") -> jwins.Experiment:
    make, nodes, batching = CASES[case]
    return jwins.Experiment(
        name="actors",
        task={"own": make()},
        nodes={"count": nodes},
        topology={"kind": "regular", "degree": 4},
        train={"local_steps": 3, "batch_size": 8, "batching": batching},
        sharing={"kind": sharing},
        run={
            "rounds": rounds,
            "eval_every": rounds,
            "eval_samples": 8,
            "checkpoint_every": 1000,
            "threads": 1,
            "folder": folder,
        },
    )


def round_s(case: str, rounds: int, sharing: str, engine: jwins.Ray | None) -> tuple[float, int, str | None]:
    """Seconds of a round, of all but the first and the last; bytes sent in all; what came out."""
    seen: dict[int, float] = {}

    def look(progress: Progress) -> None:
        seen.setdefault(progress.round, time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        result = jwins.simulate(
            experiment(case, rounds, Path(folder) / "run", sharing), engine=engine, progress=look
        )
    sent = result.record.evaluations[-1].traffic.total
    return (seen[rounds - 1] - seen[1]) / (rounds - 2), sent, result.sha256


@contextmanager
def actors_noted() -> Iterator[list[Any]]:
    """The actors of the newest simulation, with what they have put into the object store."""
    from jwins.run import on_ray

    actors: list[Any] = []
    real = on_ray.start_actors

    @contextmanager
    def noted(*args: Any, **options: Any) -> Iterator[list[Any]]:
        with real(*args, **options) as made:
            actors[:] = made
            yield made

    on_ray.start_actors = noted
    try:
        yield actors
    finally:
        on_ray.start_actors = real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--sharing", default="jwins", help="an algorithm without options")
    given = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    started = time.perf_counter()
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    print(f"Ray starts in {time.perf_counter() - started:.1f} s")
    rows = []
    with actors_noted() as actors:
        for case in CASES:
            alone, spread, stored, sent = [], [], 0, 0
            for _ in range(given.repetitions):
                seconds, sent, one = round_s(case, given.rounds, given.sharing, None)
                alone.append(seconds)
                seconds, _, other = round_s(case, given.rounds, given.sharing, jwins.Ray(actors=2))
                spread.append(seconds)
                assert one == other, "the same bits"
                stored = sum(actor.stored_bytes for actor in actors)
            ratio = statistics.median(alone) / statistics.median(spread)
            traffic = f"{stored / 1e6:.1f} of {sent / 1e6:.1f} MB"
            times = [f"{min(alone):.2f}", f"{min(spread):.2f}", f"{ratio:.2f}"]
            rows.append([case, *times, verdict(ratio, at_least=1.7), traffic])
    ray.shutdown()
    print(table(["", "one thread s", "two actors s", "ratio", "", "through the store, of what is sent"], rows))


if __name__ == "__main__":
    main()
