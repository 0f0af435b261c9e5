"""kill -9 at random instants, then --resume: the result must be that of an undisturbed run, bit for bit.

Every other kill waits for a checkpoint that is being written, so that it strikes inside the write. From the
root:

    python -m benchmarks.check_resume [--kills 20] [--seed 1]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from jwins.run_folder.rows import EndRow, Row, read_rows

ROUNDS = 400


def command(folder: Path, batching: str, threads: int) -> list[str]:
    settings = {
        "run.folder": folder,
        "run.rounds": ROUNDS,
        "run.eval_every": 20,
        "run.checkpoint_every": 2,
        "run.threads": threads,
        "train.batching": batching,
    }
    assignments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "jwins", "run", "digits", "--quiet", *assignments]


def result(folder: Path) -> tuple[str, list[Row], dict[str, bytes]]:
    """SHA-256 of all parameters, all rows but the seconds of the process, and the files of the final models."""
    rows = list(read_rows(folder / "metrics.jsonl"))
    final = rows[-1]
    assert isinstance(final, EndRow), "the run did not end"
    models = {path.name: path.read_bytes() for path in sorted((folder / "final").iterdir())}
    return final.sha256, [*rows[:-1], msgspec.structs.replace(final, wall_s={})], models


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("round-*")}


def kill_once(arguments: list[str], folder: Path, rng: random.Random, inside: bool) -> str:
    """Run until a random instant, or until a checkpoint is half written a random time later; then kill -9."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    before, begun = checkpoints(folder), None
    delay = rng.uniform(0.0, 1.5)
    while process.poll() is None:
        now = time.monotonic()
        if begun is None and checkpoints(folder) - before:
            begun = now  # it is past its start, and has got further than the last one
        if begun is not None and now - begun >= delay:
            if not inside:
                break
            if any((folder / "checkpoints").glob(".*.partial")):
                break
        if not inside:
            time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = any((folder / "checkpoints").glob(".*.partial"))
    if process.returncode == -signal.SIGKILL:
        return "inside a checkpoint write" if left else "between writes"
    assert process.stderr is not None
    message = process.stderr.read().decode()
    assert process.returncode == 0, message
    return "after the end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = False
    for batching in ("loop", "stacked"):
        with tempfile.TemporaryDirectory() as place:
            folders = {threads: Path(place, f"whole-{threads}") for threads in (1, 2)}
            for threads, folder in folders.items():
                subprocess.run(command(folder, batching, threads), check=True)
            expected = result(folders[1])
            same = result(folders[2]) == expected
            print(f"{batching}: sha256 {expected[0]}; the same with 1 and 2 threads: {same}", flush=True)
            failed |= not same
            rng = random.Random(arguments.seed)
            tally: dict[str, int] = {}
            folder, kills = Path(place, "killed"), 0
            while kills < arguments.kills:
                resuming = ["--resume"] if checkpoints(folder) else []
                if not resuming:
                    shutil.rmtree(folder, ignore_errors=True)
                ended = kill_once([*command(folder, batching, 2), *resuming], folder, rng, kills % 2 == 1)
                if ended == "after the end":  # the next life of the experiment
                    failed |= result(folder) != expected
                    shutil.rmtree(folder)
                    continue
                kills += 1
                tally[ended] = tally.get(ended, 0) + 1
            subprocess.run([*command(folder, batching, 2), "--resume"], check=True)
            same = result(folder) == expected
            failed |= not same
            counts = ", ".join(f"{count} {where}" for where, count in sorted(tally.items()))
            print(f"{batching}: {kills} kills ({counts}); after the last resume identical: {same}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
