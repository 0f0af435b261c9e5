"""Play many schedules of faults in the simulated world of tests/net/world.py, and count what was played.

``python -m benchmarks.simulate --schedules 1000000 --seconds 3600 --jobs 2`` stops at whichever comes first.
It prints its progress once a minute and a table at the end. A schedule that fails is printed as a script,
without the faults that it fails without, and the exit code is 1. ``python -m benchmarks.check_tests --only
session:`` shows that schedules find deliberate bugs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).parents[1]
BATCH = 50
TOLD_EVERY_S = 60.0


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
            "schedules": seed - first + 1,
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
                if not failed and now > told + TOLD_EVERY_S:
                    told = now
                    played = f"{counts['schedules']:,} schedules, {counts['rounds of a node']:,} rounds"
                    print(f"{now - begun:.0f} s: {played}, no violation", file=sys.stderr, flush=True)
    width = max(map(len, [*counts, *faults]))
    for name, number in [*counts.items(), *faults.most_common()]:
        print(f"{name:{width}}  {number:>12,}")
    print(failed or "no violation")
    return 1 if failed else 0


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing after this time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one for each core")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    options = parser.parse_args()
    sys.exit(simulate(options.schedules, options.seconds, options.jobs, options.first))


if __name__ == "__main__":
    main()
