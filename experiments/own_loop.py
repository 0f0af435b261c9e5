"""A training loop of one's own that shares its model: two lines of it are jwins.

Make an identity for each machine and a roster for all, as docs/how-to/deploy.md shows. Then, on each machine:

    python experiments/own_loop.py roster.toml keys/alice.key
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import jwins
from jwins.net.roster import read_roster
from jwins.tasks.digits import Digits


def main() -> None:
    """Train on this member's digits, and say how good the model is at all of them."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("roster")
    arguments.add_argument("key")
    arguments.add_argument("--rounds", type=int, default=30)
    given = arguments.parse_args()

    # Each member holds its own digits: of ten classes, those that no other has.
    members = read_roster(Path(given.roster))
    rank, count = members.ids.index(members.owner_of(Path(given.key)).id), len(members.members)
    task = Digits()
    mine = (task.train.targets % count) == rank
    inputs, targets = task.prepare(task.train.inputs[mine]), task.train.targets[mine]

    torch.manual_seed(members.seed)  # all begin alike
    model: nn.Module = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.manual_seed(rank)
    with jwins.Peer(model, roster=given.roster, key=given.key, sharing=jwins.sharing.jwins()) as peer:
        for _ in peer.rounds(given.rounds):
            for batch in torch.randperm(len(inputs))[:96].split(8):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
                optimizer.step()
            report = peer.exchange()
        without = f", timed out in the last round: {', '.join(report.timed_out)}" if report.timed_out else ""
        print(f"{peer.name}: {report.round + 1} rounds, {report.bytes_total / 1e6:.2f} MB sent{without}")
    with torch.no_grad():
        found = model(task.prepare(task.test.inputs)).argmax(dim=1)
    print(f"accuracy on all digits: {100 * float((found == task.test.targets).float().mean()):.1f} %")


if __name__ == "__main__":
    main()
