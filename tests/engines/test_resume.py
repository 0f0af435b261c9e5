"""A run that is interrupted, killed or out of disk goes on to a bit-identical result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import Lines, end, evals, simulator

from jwins.engines.interrupts import interrupts
from jwins.engines.simulator import Compute, Faults, Outcome, Progress
from jwins.errors import DataError, ResumeError
from jwins.node import Staleness
from jwins.run_folder import checkpoint
from jwins.run_folder.rows import EndRow, read_rows
from jwins.sharing import (
    Nesterov,
    choco,
    closed_loop,
    demo,
    full,
    jwins,
    noloco,
    power_gossip,
    sparse_loco,
    stateless,
)
from jwins.topology import FullyConnected, Regular
from jwins.topology.participation import Participation
from jwins.training.learning_rate import LearningRateSchedule
from jwins.training.optimizer import Optimizer

LONG = Optimizer(
    "adamw",
    {"lr": 0.02, "weight_decay": 0.1},
    weight_decay_on="matrices",
    clip_norm=0.5,
    schedule=LearningRateSchedule("cosine", total_steps=20, warmup_steps=5, final_fraction=0.1),
)
QUASI_GLOBAL = Optimizer("sgd", {"lr": 0.05, "momentum": 0.9}, quasi_global=0.8)
CASES: dict[str, dict[str, Any]] = {
    "jwins-loop": {"sharing": jwins()},
    "jwins-stacked": {"sharing": jwins(), "train": {"batching": "stacked"}},
    "choco-dynamic": {
        "sharing": choco(0.3, 0.5),
        "topology": Regular(num_nodes=4, seed=1, degree=3, dynamic=True),
    },
    "choco-faults": {
        "sharing": choco(0.3, 0.5),
        "topology": Regular(num_nodes=4, seed=1, degree=3),
        "faults": Faults().crash(1, 2).rejoin(1, 5).drop(0, 3).delay(2, 7, 0.3),
        "deadline_s": 0.1,
    },
    "closed-loop-faults": {
        "sharing": closed_loop(budget=4.0),
        "topology": Regular(num_nodes=4, seed=1, degree=3),
        "faults": Faults().crash(1, 2).rejoin(1, 5).drop(0, 3).delay(2, 7, 0.3),
        "deadline_s": 0.1,
    },
    "stateless-dynamic": {
        "sharing": stateless(),
        "topology": Regular(num_nodes=4, seed=1, degree=3, dynamic=True),
    },
    "uneven-steps": {"sharing": jwins(), "train": {"local_steps": [1, 4, 2, 3], "optimizer": QUASI_GLOBAL}},
    "participation": {
        "sharing": choco(0.3, 0.5),
        "topology": Participation(Regular(num_nodes=4, seed=1, degree=3), 0.5, seed=1),
        "compute": Compute(10.0, spread=0.5, jitter=0.5),
    },
    "consensus": {"sharing": closed_loop(), "consensus_rounds": 4},
    "quasi-global-faults": {
        "sharing": full(),
        "train": {"optimizer": QUASI_GLOBAL},
        "topology": Regular(num_nodes=4, seed=1, degree=3),
        "faults": Faults().crash(1, 2).rejoin(1, 5),
        "deadline_s": 0.1,
        "consensus_rounds": 2,
    },
    "schedule-loop": {"sharing": full(), "train": {"optimizer": LONG, "precision": "bfloat16"}},
    "schedule-stacked": {
        "sharing": closed_loop(),
        "train": {"optimizer": LONG, "batching": "stacked"},
        "topology": Regular(num_nodes=4, seed=1, degree=3),
        "faults": Faults().crash(1, 2).rejoin(1, 5),
        "deadline_s": 0.1,
    },
    "outer-faults": {
        "sharing": closed_loop(),
        "outer": Nesterov(0.7, 0.8),
        "topology": Regular(num_nodes=4, seed=1, degree=3),
        "faults": Faults().crash(1, 2).rejoin(1, 5),
        "deadline_s": 0.1,
        "consensus_rounds": 2,
    },
    "power-gossip-faults": {
        "sharing": power_gossip(),
        "topology": Regular(num_nodes=4, seed=1, degree=3),
        "faults": Faults().crash(1, 2).rejoin(1, 5),
        "deadline_s": 0.1,
    },
    "sparse-loco-faults": {
        "sharing": sparse_loco(0.2),
        "topology": FullyConnected(num_nodes=4),
        "faults": Faults().crash(1, 2).rejoin(1, 5),
        "deadline_s": 0.1,
    },
    "demo-common": {"sharing": demo(0.01, k=2, block=4), "topology": FullyConnected(num_nodes=4)},
    "demo-faults": {
        "sharing": demo(gamma=0.5, k=2, block=4),
        "topology": Regular(num_nodes=4, seed=1, degree=3),
        "faults": Faults().crash(1, 2).rejoin(1, 5),
        "deadline_s": 0.1,
    },
    "noloco-pairs": {
        "sharing": noloco(),
        "topology": Regular(num_nodes=4, seed=1, degree=1, dynamic=True),
    },
    "asynchronous": {
        "sharing": full(),
        "staleness": Staleness(16),
        "compute": Compute(10.0, spread=1.0),
        "train": {"task": Lines(batch_norm=True), "buffers": "shared"},
    },
    "asynchronous-faults": {
        "sharing": closed_loop(budget=4.0),
        "staleness": Staleness(2, power=0.5),
        "topology": Regular(num_nodes=4, seed=1, degree=3),
        "compute": Compute(10.0, spread=0.5, jitter=0.5),
        "faults": Faults().crash(1, 2).rejoin(1, 5).drop(0, 3).delay(2, 7, 0.3),
        "train": {"task": Lines(batch_norm=True)},
    },
    "codec-paper": {"sharing": jwins(), "codec": "paper"},
    "batch-norm-jitter": {
        "train": {"task": Lines(batch_norm=True)},
        "compute": Compute(10.0, spread=0.5, jitter=0.5),
    },
}


class KilledError(Exception):
    pass


def build(case: str, folder: Path | None, **options: Any) -> Any:
    return simulator(rounds=10, folder=folder, checkpoint_every=2, **{"codec": "pco", **CASES[case]}, **options)


def without_clock(outcome: Outcome) -> list[Any]:
    """All rows, less the seconds of the process."""
    final = end(outcome)
    return [*outcome.rows[:-1], (final.status, final.round, final.time_s, final.sha256, outcome.traffic)]


@pytest.mark.parametrize("case", CASES)
def test_stopping_at_any_step_and_resuming_changes_nothing(case: str, tmp_path: Path) -> None:
    reference = build(case, tmp_path / "whole").run()
    steps = 0

    def stop_at(step: int) -> Any:
        def on_progress(progress: Progress) -> None:
            nonlocal steps
            steps += 1
            if steps == step:
                raise KilledError

        return on_progress

    for step in (5, 23, 61):
        steps = 0
        folder = tmp_path / str(step)
        try:
            outcome = build(case, folder, on_progress=stop_at(step)).run()
        except KilledError:
            try:
                outcome = build(case, folder).run(resume=True)
            except ResumeError:
                assert not list((folder / "checkpoints").glob("round-*")), "there was nothing to resume yet"
                continue
        assert without_clock(outcome) == without_clock(reference), f"stopped at step {step}"
        assert [type(row) for row in read_rows(folder / "metrics.jsonl")] == [
            type(row) for row in reference.rows
        ]
        for node in range(4):
            name = f"final/node-{node}.safetensors"
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture
def default_interrupts() -> Iterator[None]:
    """Python's handling of Ctrl-C, also where the tests run in the background and the shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupts")
def test_ctrl_c_ends_with_a_checkpoint_and_a_second_one_at_once(tmp_path: Path) -> None:
    reference = build("jwins-loop", None).run()
    steps = 0

    def interrupt(progress: Progress) -> None:
        nonlocal steps
        steps += 1
        if steps == 13:
            os.kill(os.getpid(), signal.SIGINT)

    world: dict[str, Any] = {"rounds": 10, "codec": "pco", "sharing": jwins()}
    with interrupts() as stop:
        outcome = simulator(**world, folder=tmp_path, on_progress=interrupt, stop=stop).run()
    assert outcome.status == "interrupted"
    assert not any(isinstance(row, EndRow) for row in outcome.rows)
    assert len(list((tmp_path / "checkpoints").glob("round-*.safetensors"))) == 1
    again = simulator(**world, folder=tmp_path).run(resume=True)
    assert without_clock(again) == without_clock(reference)

    def insist(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interrupts() as stop:
        simulator(rounds=10, on_progress=insist, stop=stop).run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_signals_are_remembered_where_they_would_end_the_process() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts("SIGTERM", "SIGHUP", "SIGNONE") as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_a_run_is_stopped_from_any_thread(tmp_path: Path) -> None:
    """No signal is needed, so an engine that runs on another thread can be asked to stop, too."""
    reference = build("jwins-loop", None).run()
    asked = threading.Event()

    def ask(progress: Progress) -> None:
        if progress.round == 4:
            asked.set()

    outcomes: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(build("jwins-loop", tmp_path, on_progress=ask, stop=asked.is_set).run())
    )
    thread.start()
    thread.join(timeout=60)
    assert [outcome.status for outcome in outcomes] == ["interrupted"]
    assert without_clock(build("jwins-loop", tmp_path).run(resume=True)) == without_clock(reference)


def test_a_full_disk_loses_nothing_before_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = build("jwins-loop", None).run()
    writes = 0
    real = checkpoint.write_atomically

    def full_disk(path: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == 3:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build("jwins-loop", tmp_path).run()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert without_clock(build("jwins-loop", tmp_path).run(resume=True)) == without_clock(reference)


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    reference = build("jwins-loop", tmp_path / "a").run()
    newest = sorted((tmp_path / "a" / "checkpoints").glob("round-*"))[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert without_clock(build("jwins-loop", tmp_path / "a").run(resume=True)) == without_clock(reference)


def test_a_log_that_was_cut_is_noticed(tmp_path: Path) -> None:
    build("jwins-loop", tmp_path).run()
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"metrics\.jsonl.*needs the first"):
        build("jwins-loop", tmp_path).run(resume=True)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="none was written yet"):
        build("jwins-loop", tmp_path).run(resume=True)


KILLED = """
import os, random, signal, sys
from collections.abc import Iterator
from pathlib import Path
sys.path.insert(0, {here!r})
from jwins.run_folder import checkpoint
import test_resume

case, moments, folder = {case!r}, {moments!r}, Path({folder!r})
real = checkpoint.write_atomically
writes = 0
def die(): os.kill(os.getpid(), signal.SIGKILL)
def write(path, data):
    global writes
    writes += 1
    if writes == 3 and moment == "half written":
        whole = b"".join(data)
        path.with_name(f".{{path.name}}.{{os.getpid()}}.partial").write_bytes(whole[: len(whole) // 2])
        die()
    real(path, data)
    if writes == 3 and moment == "renamed":
        die()
checkpoint.write_atomically = write
def on_progress(progress):
    if moment == "running" and progress.round == 5:
        die()
for moment in moments:  # imports take longer than the runs
    child = os.fork()
    if not child:
        test_resume.build(case, folder / moment, on_progress=on_progress).run()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, moment
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["jwins-loop", "jwins-stacked"])
def test_kill_9_then_resume_is_bit_identical(case: str, tmp_path: Path) -> None:
    moments = ("half written", "renamed", "running")
    code = KILLED.format(here=str(Path(__file__).parent), case=case, folder=str(tmp_path), moments=moments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole = without_clock(build(case, None).run())
    for moment in moments:
        folder = tmp_path / moment
        assert without_clock(build(case, folder).run(resume=True)) == whole
        assert not list((folder / "checkpoints").glob(".*.partial"))


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_threads_change_no_bit(batching: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jwins.engines.node_group.SERIAL_BELOW", 0)
    hashes = {
        end(
            simulator(
                8,
                sharing=jwins(),
                codec="pco",
                threads=threads,
                train={"batching": batching, "threads": threads, "task": Lines(hidden=600)},
            ).run()
        ).sha256
        for threads in (1, 2, 3)
    }
    assert len(hashes) == 1


def test_divergence_is_a_result() -> None:
    outcome = simulator(rounds=30, train={"lr": 1e6}).run()
    assert outcome.status == "diverged"
    assert end(outcome).status == "diverged"
    assert 0 < end(outcome).round < 30
    assert f"round {end(outcome).round}" in end(outcome).reason
    assert evals(outcome), "what was measured before is kept"


def test_shared_batch_norm_variances_stay_positive() -> None:
    for buffers in ("local", "shared"):
        sim = simulator(
            rounds=12,
            sharing=jwins(),
            train={"task": Lines(batch_norm=True), "buffers": buffers, "lr": 0.5},
        )
        outcome = sim.run()
        assert outcome.params is not None
        slots = {slot.name: slot for slot in sim.groups[0].trainer.layout.slots}
        assert ("1.running_var" in slots) == (buffers == "shared")
        if buffers == "shared":
            slot = slots["1.running_var"]
            assert bool((outcome.params[:, slot.offset : slot.offset + slot.size] >= 0).all())
            assert not torch.equal(outcome.params[0], outcome.params[1])
