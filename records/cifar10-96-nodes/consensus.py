"""What further averaging, without training, does to the final models of finished runs.

    python records/cifar10-96-nodes/consensus.py RUN... [--samples 1000] [--rounds 0 1 2 4]

RUN is a run folder with its final models. Each of these rounds is one of full sharing: every node takes the
weighted mean of its own and its neighbours' models. Prints the mean accuracy over nodes, and the spread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from jwins.experiment import load
from jwins.run import build


def averaged(run: Path, samples: int, rounds: list[int]) -> None:
    """Print one line for each number of rounds."""
    parts = build(load(run / "config.toml"))
    count = parts.experiment.nodes.count
    models = [parts.task.model() for _ in range(count)]
    rows = []
    trainer = parts.simulator.trainer
    for node, model in enumerate(models):
        model.load_state_dict(load_file(run / "final" / f"node-{node}.safetensors"))
        rows.append(trainer.layout.flatten(model))
    params = torch.stack(rows)
    mixing = torch.from_numpy(parts.simulator.topology.at(0).matrix()).float()
    tested = torch.arange(0, len(parts.task.test), len(parts.task.test) // samples)[:samples]
    mean = params.mean(dim=0, keepdim=True)
    done = 0
    for wanted in rounds:
        for _ in range(wanted - done):
            params = mixing @ params
        done = wanted
        accuracy = trainer.evaluate(params, list(range(count)), tested)["accuracy"]
        apart = (params - mean).square().sum(dim=1).mean().sqrt()
        print(
            f"{run.parent.name:18} {wanted:2} rounds: accuracy {100 * accuracy.mean():.1f} % "
            f"(sd {100 * accuracy.std():.1f}), consensus distance {apart:.3f}",
            flush=True,
        )
    accuracy = trainer.evaluate(mean, [-1], tested)["accuracy"]
    print(f"{run.parent.name:18} average model: accuracy {100 * float(accuracy):.1f} %", flush=True)


def main() -> None:
    """All runs, one after another."""
    parser = argparse.ArgumentParser(description="Average final models without training.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, nargs="+", default=[0, 1, 2, 4])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for run in given.runs:
        averaged(run, given.samples, sorted(given.rounds))


if __name__ == "__main__":
    main()
