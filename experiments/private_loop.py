"""A training loop of one's own with differential privacy by opacus, which shares models of noisy steps alone.

pip install 'jwins[privacy]', then: jwins launch --script experiments/private_loop.py --nodes 3
"""

from __future__ import annotations

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import jwins
from jwins.tasks.digits import Digits

ROUNDS, STEPS, DELTA = 20, 4, 1e-4


def main() -> None:
    """Train privately, and say what it cost."""
    task = Digits()
    torch.manual_seed(1)  # all begin alike
    model: nn.Module = task.model()
    with jwins.Peer(model, sharing=jwins.sharing.jwins()) as peer:
        torch.seed()  # noise that nobody else can draw again
        mine = slice(int(peer.name.rpartition("-")[2]), None, 3)
        samples = TensorDataset(task.prepare(task.train.inputs[mine]), task.train.targets[mine])
        engine = PrivacyEngine()
        private, optimizer, batches = engine.make_private(
            module=model,  # wrapped, not copied: the peer shares its parameters
            optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
            data_loader=DataLoader(samples, batch_size=16),  # drawn anew, each sample by itself
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        drawn = iter(batches)
        for _ in peer.rounds(ROUNDS):
            for _ in range(STEPS):
                inputs, targets = next(drawn, None) or next(drawn := iter(batches))
                optimizer.zero_grad()
                functional.cross_entropy(private(inputs), targets).backward()
                optimizer.step()
            peer.exchange()
    with torch.no_grad():
        found = model(task.prepare(task.test.inputs)).argmax(dim=1)
    accuracy = float((found == task.test.targets).float().mean())
    print(f"{peer.name}: accuracy {accuracy:.1%}, epsilon {engine.get_epsilon(DELTA):.2f} at delta {DELTA}")


if __name__ == "__main__":
    main()
