"""Play many schedules of faults in the simulated world of tests/net/world.py, and count what was played.

``python -m benchmarks.simulate --schedules 1000000 --seconds 3600 --jobs 2`` stops at whichever comes first.
It prints its progress once a minute and a table at the end. A schedule that fails is printed as a script,
without the faults that it fails without, and the exit code is 1. Deliberate bugs, which schedules must find,
are put into a copy of the package with ``--mutations``.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).parents[1]
BATCH = 50
TOLD_EVERY_S = 60.0

MUTATIONS = {
    "a frame of a later round is no evidence that the peer is ahead": (
        "arrivals.py",
        "if known.synced and (",
        "if False and (",
    ),
    "a node that has never merged keeps its own model": ("waiting.py", "if self._session.fresh:", "if False:"),
    "whoever is behind stays there": ("waiting.py", "if target <= at:", "if True:"),
    "one witness is enough": (
        "waiting.py",
        "if 2 * len(ahead) <= len(expected) or len(ahead) < min(2, len(expected)):",
        "if not ahead:",
    ),
    "any round is believed": ("waiting.py", "self._session.node.round + possible", "2**40"),
    "settings are not compared": ("handshake.py", "if theirs and self.greeting else", "if False else"),
    "a limit that has passed is waited for again and again": (
        "waiting.py",
        "if self._is_resolved(peer) or",
        "if self._session.peers[peer].timed_out_in is not None or",
    ),
    "a peer that was given up is never waited for again": (
        "arrivals.py",
        "known.readmit_from, known.timeouts = at + known.backoff, 0",
        "known.readmit_from, known.timeouts = 2**40, 0",
    ),
    "frames are not sent again to one that comes back": (
        "arrivals.py",
        "known.buffer.retransmit_from(",
        "(lambda _: None)(",
    ),
    "a peer that disconnects is given up at once": (
        "peer_session.py",
        "Signal.DISCONNECTED: State.LOST,\n    },\n    State.BEHIND",
        "Signal.DISCONNECTED: State.SUSPECT,\n    },\n    State.BEHIND",
    ),
    "a round merged with nobody is not reported": ("rounds.py", '"merged with nobody"', '"merged"'),
    "what a sender may have wait for a merge is not limited": (
        "../node.py",
        "math.isinf(self",
        "math.isfinite(self",
    ),
}


def play_batch(first: int, count: int) -> tuple[Counter[str], Counter[str], str]:
    """Play seeds in order; return counts, counts of faults, and what failed, or ""."""
    sys.path.insert(0, str(ROOT / "tests" / "net"))
    import torch
    from world import Schedule, Tally, ViolationError, play, shrunk

    torch.set_num_threads(1)
    tally, failed, before = Tally(), "", time.process_time()
    for seed in range(first, first + count):
        schedule = Schedule.drawn(seed)
        try:
            play(schedule, tally)
        except ViolationError as error:
            failed = f"seed {seed}: {error}\nplay({shrunk(schedule).script()})"
            break
    counts = Counter(
        {
            "schedules": count,
            "events": tally.events,
            "rounds of a node": tally.rounds,
            "neighbours left out of a round": tally.partial,
            "ends of a node's run": tally.ended,
            "CPU seconds": round(time.process_time() - before),
        }
    )
    return counts, tally.faults, failed


def simulate(schedules: int, seconds: float, jobs: int, first: int) -> int:
    """Play schedules until there are enough, or the time is over, or one fails."""
    begun = told = time.monotonic()
    counts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    failed = ""
    seeds = iter(range(first, first + schedules, BATCH))
    with ProcessPoolExecutor(jobs) as pool:
        running = {pool.submit(play_batch, seed, BATCH) for seed in itertools.islice(seeds, 2 * jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for batch in done:
                found = batch.result()
                counts, faults, failed = counts + found[0], faults + found[1], failed or found[2]
                now = time.monotonic()
                if not failed and now < begun + seconds and (seed := next(seeds, None)) is not None:
                    running.add(pool.submit(play_batch, seed, BATCH))
                if now > told + TOLD_EVERY_S:
                    told = now
                    played = f"{counts['schedules']:,} schedules, {counts['rounds of a node']:,} rounds"
                    print(f"{now - begun:.0f} s: {played}, no violation", file=sys.stderr, flush=True)
    width = max(map(len, [*counts, *faults]))
    for name, number in [*counts.items(), *faults.most_common()]:
        print(f"{name:{width}}  {number:>12,}")
    print(failed or "no violation")
    return 1 if failed else 0


def mutate(schedules: int) -> int:
    """Put one bug after the other into a copy of the package; how many were not found."""
    missed = 0
    for name, (file, old, new) in MUTATIONS.items():
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "src"
            shutil.copytree(ROOT / "src", copy)
            path = (copy / "jwins" / "net" / file).resolve()
            text = path.read_text()
            assert old in text, f"{file} has no {old!r}"
            path.write_text(text.replace(old, new, 1))
            command = [
                sys.executable,
                "-m",
                "benchmarks.simulate",
                "--schedules",
                str(schedules),
                "--jobs",
                "1",
            ]
            environment = os.environ | {"PYTHONPATH": str(copy)}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        played = done.stdout.partition(" ")[0]
        why = (done.stdout.splitlines() or [""])[1:2]
        print(f"{'found' if done.returncode else 'MISSED'} within {played}: {name} {why}", flush=True)
        missed += done.returncode == 0
    return missed


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing after this time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one for each core")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--mutations", action="store_true")
    options = parser.parse_args()
    if options.mutations:
        sys.exit(mutate(min(options.schedules, 2000)))
    sys.exit(simulate(options.schedules, options.seconds, options.jobs, options.first))


if __name__ == "__main__":
    main()
