"""Nanoseconds per parameter that sharing costs a node in a round, for models of 12 thousand to 100 million.

A node shares, encodes once, decodes the frames of four neighbours, checks the values and merges.
Full sharing, JWINS and the closed loop take turns in each round, so that other work on the machine slows all of
them. The four frames are of one neighbour, which follows the same drift with noise of its own. The changes of a
round differ from layer to layer, so that about 7 % of the closed loop's symbols are not 0 (column "not 0"), as
late in training on CIFAR-10.

    python -m benchmarks.parameters [--sizes 12010 89834 1000000 11000000] [--rounds 7]

Medians over the rounds, in CPU time of one thread. 100 million parameters need 12 GB.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, table, verdict
from jwins.rng import RoundContext
from jwins.sharing import Sharing, closed_loop, full, jwins
from jwins.sharing.update import Quantized, Received
from jwins.training.allocator import keep_freed_memory
from jwins.wire.codec import codec
from jwins.wire.frame import Frame, Wire

SIZES = (12_010, 89_834, 1_000_000, 11_000_000)
NEIGHBOURS = (1, 2, 3, 4)
WEIGHT = 1 / (1 + len(NEIGHBOURS))
WARM_UP = 4
STEPS = ("share", "encode", "decode", "merge", "check")
COUNTED = STEPS[:-1]
MOST = {"JWINS": 25.0, "closed loop": 30.0}
LAYERS, SPREAD = 24, 2.0


class Pair:
    """A node and its neighbour, whose frame counts as that of each of :data:`NEIGHBOURS`."""

    def __init__(self, sharing: Sharing[Any], start: Tensor) -> None:
        self.sharing = sharing
        self.wire = Wire(codec("pco"), b"\0" * 8, sharing.update_dim(len(start)))
        self.states = [sharing.init(start) for _ in range(2)]
        self.params = [start] * 2
        self.sent_bytes = 0
        self.taken: dict[str, list[float]] = defaultdict(list)
        self.nonzero: float | None = None

    def round(self, number: int, changes: list[Tensor]) -> None:
        """Play a round, and measure the node's part."""
        context = RoundContext(1, 0, number, dict.fromkeys(NEIGHBOURS, WEIGHT), self.sent_bytes)
        trained = [params + change for params, change in zip(self.params, changes, strict=True)]
        theirs, self.states[1] = self.sharing.share(self.states[1], trained[1], context)
        frames = [self.wire.pack(Frame(j, number, theirs)).data for j in NEIGHBOURS]
        if isinstance(theirs.values, Quantized):
            self.nonzero = float((theirs.values.symbols != 0).float().mean())
        self.params[1], self.states[1] = self.sharing.merge(self.states[1], trained[1], [], context)
        marks = [time.thread_time()]
        update, self.states[0] = self.sharing.share(self.states[0], trained[0], context)
        marks.append(time.thread_time())
        self.sent_bytes = len(self.wire.pack(Frame(0, number, update)).data)
        marks.append(time.thread_time())
        unpacked = [self.wire.unpack(frame) for frame in frames]
        marks.append(time.thread_time())
        received = [Received(f.sender, number, WEIGHT, f.update) for f in unpacked if isinstance(f, Frame)]
        assert all(item.update.is_finite() for item in received)
        checked = time.thread_time() - marks[-1]
        self.params[0], self.states[0] = self.sharing.merge(self.states[0], trained[0], received, context)
        marks.append(time.thread_time() - checked)
        for step, before, after in zip(COUNTED, marks[:-1], marks[1:], strict=True):
            self.taken[step].append(after - before)
        self.taken["check"].append(checked)


def measured(size: int, rounds: int) -> dict[str, Pair]:
    """All algorithms on the same changes."""
    generator = torch.Generator().manual_seed(size)
    layers = (
        torch.randn(LAYERS, generator=generator)
        .mul_(SPREAD)
        .exp_()
        .repeat_interleave(-(-size // LAYERS))[:size]
    )
    layers *= 1e-3
    start = torch.randn(size, generator=generator) * 0.05
    algorithms: dict[str, Sharing[Any]] = {"full": full(), "JWINS": jwins(), "closed loop": closed_loop()}
    pairs = {name: Pair(sharing, start.clone()) for name, sharing in algorithms.items()}
    del start
    for number in range(WARM_UP + rounds):
        drift = torch.randn(size, generator=generator)
        for name in pairs:
            changes = [(torch.randn(size, generator=generator) + drift) * layers for _ in range(2)]
            pairs[name].round(number, changes)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of parameters")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as runs and peers do
    print(machine())
    rows = []
    for size in arguments.sizes:
        of_full = 0.0
        for name, pair in measured(size, arguments.rounds).items():
            ns = {step: 1e9 / size * statistics.median(pair.taken[step][WARM_UP:]) for step in STEPS}
            total = sum(ns[step] for step in COUNTED)
            of_full = of_full or total
            asked = verdict(total, at_most=MOST[name]) if name in MOST else ""
            nonzero = "" if pair.nonzero is None else f"{pair.nonzero:.1%}"
            row = [name, f"{size:,}", *(f"{ns[step]:.1f}" for step in STEPS), f"{total:.1f}"]
            rows.append([*row, f"{total / of_full:.2f}", nonzero, asked])
    print(table(["sharing", "P", *STEPS, "all but check", "to full", "not 0", "asked"], rows))


if __name__ == "__main__":
    main()
