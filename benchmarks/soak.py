"""A long run of processes that are killed at random: do memory and open files stay flat, and is anyone silent?

All nodes of an experiment on digits run as processes over loopback. Now and then one is killed with SIGKILL and
starts again from its checkpoint. Resident memory and open files of every process are noted meanwhile.

A process is a segment of its own, as a restart begins anew; its first rounds, in which caches fill, do not
count. The slope is that of a line with one slope for all segments and a level for each; its standard error
allows for samples of one process that are not independent (clustered by segment). A silence is how long a
node's count of rounds stood still, restarts included. In the end the run is simulated, and compared.
Ctrl-C ends it early and prints what there is.

    python -m benchmarks.soak [--nodes 16] [--rounds 1000] [--kill-every 20]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jwins
from benchmarks.report import table
from jwins.run.launch import Launched, NodeView, launch

WARM_UP_ROUNDS = 30
MIN_SAMPLES = 8
SAMPLE_EVERY_S = 2.0
TIMEOUT_S = 120.0
"""Longer than a restart takes, so that no round is merged without the node that was killed."""

Sample = tuple[int, float, float]
"""Completed rounds, resident bytes, open files."""


@dataclass
class Watch:
    """Kills, and notes what each process holds."""

    kill_every_s: float
    draws: random.Random
    segments: dict[int, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    kills: int = 0
    silences: dict[str, float] = field(default_factory=dict)
    _rounds: dict[str, tuple[int, float]] = field(default_factory=dict)
    _sampled: float = 0.0
    _killed: float = field(default_factory=time.monotonic)

    def __call__(self, now: Launched) -> None:
        at = time.monotonic()
        for view in now.nodes:
            self._listen(view, at)
        if at - self._sampled >= SAMPLE_EVERY_S:
            self._sampled = at
            for view in now.nodes:
                if view.state == "running":
                    self._sample(view)
        if at - self._killed >= self.kill_every_s:
            self._killed = at
            self._kill([view for view in now.nodes if view.state == "running" and view.round > 0])

    def _listen(self, view: NodeView, at: float) -> None:
        last, since = self._rounds.get(view.name, (-1, at))
        if view.round != last:
            self._rounds[view.name] = (view.round, at)
        if last > 0 and view.state in ("running", "killed"):
            self.silences[view.name] = max(self.silences.get(view.name, 0.0), at - since)

    def _sample(self, view: NodeView) -> None:
        process = Path("/proc") / str(view.pid)
        with contextlib.suppress(OSError, StopIteration):  # it was killed meanwhile
            lines = (process / "status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
            files = len(os.listdir(process / "fd"))
            self.segments[view.pid].append((view.round, kilobytes * 1024.0, float(files)))

    def _kill(self, running: list[NodeView]) -> None:
        if running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.draws.choice(running).pid, signal.SIGKILL)
                self.kills += 1


def warm(segments: dict[int, list[Sample]], after: int) -> list[list[Sample]]:
    """Segments without their beginnings, from some round on; those that are left too short are no use."""
    found = []
    for samples in segments.values():
        first = max(after, samples[0][0] + WARM_UP_ROUNDS)
        rest = [sample for sample in samples if sample[0] >= first]
        if len(rest) >= MIN_SAMPLES and rest[-1][0] > rest[0][0]:
            found.append(rest)
    return found


def slope(segments: list[list[Sample]], value: Callable[[Sample], float]) -> tuple[float, float]:
    """Slope per 100 rounds, and its standard error."""
    centred = []
    for samples in segments:
        x = [sample[0] / 100 for sample in samples]
        y = [value(sample) for sample in samples]
        mx, my = statistics.fmean(x), statistics.fmean(y)
        centred.append([(a - mx, b - my) for a, b in zip(x, y, strict=True)])
    spread = sum(a * a for pairs in centred for a, _ in pairs)
    found = sum(a * b for pairs in centred for a, b in pairs) / spread
    scores = [sum(a * (b - found * a) for a, b in pairs) for pairs in centred]
    count = len(scores)
    error = (sum(score * score for score in scores) * count / (count - 1)) ** 0.5 / spread
    return found, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--kill-every", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1, help="of the kills")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(given.nodes, given.rounds, given.kill_every, given.seed, Path(folder))


def soak(nodes: int, rounds: int, kill_every_s: float, seed: int, folder: Path) -> None:
    experiment = jwins.load("digits").changed(
        {
            "nodes": {"count": nodes},
            "train": {"batching": "loop"},
            "run": {
                "rounds": rounds,
                "eval_every": max(1, rounds // 4),
                "checkpoint_every": 10,
                "threads": 1,
                "folder": folder / "wall",
            },
        }
    )
    watch = Watch(kill_every_s, random.Random(seed))
    begun = time.monotonic()
    launched = launch(experiment, progress=watch, timeout_s=TIMEOUT_S)
    seconds = time.monotonic() - begun
    accuracy = launched.record.evaluations[-1].metrics["accuracy"].mean
    print(f"{nodes} nodes, {rounds} rounds in {seconds:.0f} s, {launched.status}, {watch.kills} kills")
    print(f"accuracy {accuracy:.3f}; longest silence of a node {max(watch.silences.values()):.1f} s")
    for after in (0, rounds // 2):
        print(f"\nfrom round {after} on:")
        tell(warm(watch.segments, after))
    if launched.status != "finished":
        return
    simulated = jwins.simulate(experiment.changed({"run": {"folder": folder / "virtual"}}))
    print(f"the same final parameters as in the simulator: {launched.sha256 == simulated.sha256}")


def tell(segments: list[list[Sample]]) -> None:
    samples = [sample for part in segments for sample in part]
    print(f"{len(samples)} samples of {len(segments)} processes that lasted long enough")
    if len(segments) < 2:
        return
    rows = []
    for what, value in (
        ("resident memory, MB", lambda sample: sample[1] / 1e6),
        ("open files", lambda sample: sample[2]),
    ):
        found, error = slope(segments, value)
        held = list(map(value, samples))
        levels = (f"{level:.1f}" for level in (min(held), statistics.median(held), max(held)))
        rows.append([what, f"{found:+.3f}", f"{error:.3f}", *levels])
    print(table(["", "slope per 100 rounds", "standard error", "least", "median", "most"], rows))


if __name__ == "__main__":
    main()
