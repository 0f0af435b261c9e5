"""A callback: which nodes are worst off, and how far their models are from the others'?"""

from pathlib import Path

import torch

import jwins


class WorstNode(jwins.Callback):
    """Prints a line for each evaluation."""

    def on_evaluation(self, row, models):
        """Compare the worst node's model with the mean of all."""
        accuracy = dict(zip(row.nodes, row.per_node["accuracy"], strict=True))
        worst = min(accuracy, key=accuracy.get)
        vectors = {
            node: torch.cat([tensor.flatten() for tensor in model.values()]) for node, model in models.items()
        }
        mean = torch.stack(list(vectors.values())).mean(dim=0)
        away = float((vectors[worst] - mean).norm())
        print(f"round {row.round:3}: node {worst} has {accuracy[worst]:.1%}, {away:.3f} from the mean model")

    def on_end(self, result):
        """Say how it ended."""
        print(f"{result.status}: {result.folder}")


if __name__ == "__main__":
    folder = Path("runs/callback")
    sets = ["nodes.count=8", "run.rounds=40", "run.eval_every=10", f"run.folder={folder}"]
    jwins.simulate(jwins.load("digits", sets), callbacks=[WorstNode()], resume=True)
