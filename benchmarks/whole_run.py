"""Cost of a whole run, from its process's start to its end, against training and evaluation alone.

16 nodes, 20 rounds of JWINS with the paper's preset, GN-LeNet, each node tested on the whole test set of 10,000
images before the first round and after the last, on all cores. Alone means: in a process that has everything
ready, the same rounds of the same trainer, and the same models tested by it. Processes take turns; medians are
compared. Without a folder with CIFAR-10's parquet files, random images stand in for it. From the root:

    python -m benchmarks.whole_run [--data FOLDER] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import verdict

NODES, ROUNDS, TEST_SAMPLES = 16, 20, 10_000
MOST = 1.15


def experiment(data: str | None, folder: str) -> Any:
    """The run, as a user would state it."""
    import jwins

    return jwins.Experiment(
        name="whole-run",
        task={"name": "cifar10", "data": data} if data else {"own": stand_in()},
        nodes={"count": NODES},
        topology={"kind": "regular", "degree": 4},
        sharing={"kind": "jwins"},
        train={"local_steps": 3, "batch_size": 8, "optimizer": {"kind": "sgd", "lr": 0.01}},
        run={"rounds": ROUNDS, "folder": folder},
    )


def stand_in() -> Any:
    """Random images in the shape of CIFAR-10's, and its network."""
    import torch

    from jwins.tasks.base import Dataset
    from jwins.tasks.cifar10 import Cifar10

    class StandIn(Cifar10):
        def __init__(self) -> None:
            self.name = "stand-in"
            self.train, self.test = self._random(50_000), self._random(TEST_SAMPLES)

        def _random(self, count: int) -> Dataset:
            generator = torch.Generator().manual_seed(count)
            images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
            return Dataset(images, torch.randint(10, (count,), generator=generator))

    return StandIn()


def whole(data: str | None) -> dict[str, float]:
    """Seconds of a process that does nothing but the run, and where the run says that they went."""
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/run"
        started = time.perf_counter()
        _call("--whole", "--folder", folder, *(["--data", data] if data else []))
        seconds = time.perf_counter() - started
        last = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return {"process": seconds, **json.loads(last)["wall_s"]}


def alone(data: str | None) -> dict[str, float]:
    """Seconds of the run's training and evaluation, by a trainer that has nothing else to do."""
    import torch

    from jwins.run.assembly import build
    from jwins.training.allocator import keep_freed_memory
    from jwins.training.evaluation import EvalRequest

    keep_freed_memory()
    trainer = build(experiment(data, "unused")).driver.groups[0].trainer
    started = time.perf_counter()
    for at in range(ROUNDS):
        trainer.train(dict.fromkeys(trainer.nodes, at))
    trained = time.perf_counter()
    rows = torch.cat([trainer.params, trainer.params.mean(0, keepdim=True)])
    buffers = [trainer.buffers(node) for node in (*trainer.nodes, -1)]
    for request in (EvalRequest(rows[:1], [0], buffers[:1]), EvalRequest(rows, [*trainer.nodes, -1], buffers)):
        trainer.evaluate_all([request])
    ended = time.perf_counter()
    return {"training": trained - started, "evaluation": ended - trained}


def _call(*options: str) -> str:
    command = [sys.executable, "-m", "benchmarks.whole_run", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with the parquet files of uoft-cs/cifar10")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.whole:
        import jwins
        from jwins.training.allocator import keep_freed_memory

        keep_freed_memory()
        jwins.simulate(experiment(given.data, given.folder))
        return
    if given.alone:
        print(json.dumps(alone(given.data)))
        return
    data = str(Path(given.data).resolve()) if given.data else None
    runs, bases = [], []
    for _ in range(given.repetitions):
        bases.append(json.loads(_call("--alone", *(["--data", data] if data else []))))
        runs.append(whole(data))
    base = {name: statistics.median(turn[name] for turn in bases) for name in bases[0]}
    run = {name: statistics.median(turn[name] for turn in runs) for name in runs[0]}
    ratio = statistics.median(
        turn["process"] / sum(least.values()) for turn, least in zip(runs, bases, strict=True)
    )
    print(f"{NODES} nodes, {ROUNDS} rounds, {'CIFAR-10' if data else 'random images'}; medians, seconds\n")
    print("alone:     " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in base.items()))
    print("whole run: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in run.items()))
    print(f"whole run / training and evaluation alone: {ratio:.2f}, {verdict(ratio, at_most=MOST)}")


if __name__ == "__main__":
    main()
