"""Put deliberate bugs into a copy of the package, one at a time, and see that a test of their rooms fails.

``python -m benchmarks.check_tests`` runs the tests that are not slow, prints for each bug the first that fails,
and ends with the number of bugs that none has found, which is 0. ``--only TEXT`` tries those whose name has a
text in it: ``--only session:`` those of the protocol between peers. Most of these play all schedules of faults
of ``tests/net/test_session.py``, slow ones too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


SCHEDULES = "net/test_session.py::test_schedules_of_faults"
"""The tests that run with their slow cases."""


@dataclass(frozen=True)
class Bug:
    """A line that is wrong.

    Attributes:
        name: in words.
        file: under ``src/jwins``.
        old: a part of a line, which stands there once.
        new: in its place.
        tests: that run, under ``tests``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str = SCHEDULES


BUGS = (
    Bug(
        "a frame loses the version of its roster",
        "wire/frame.py",
        "update, bool(header.flags & _KEYFRAME_FLAG), header.flags >> 1",
        "update, bool(header.flags & _KEYFRAME_FLAG), 0",
        "property/test_wire.py golden",
    ),
    Bug(
        "messages without a payload have no checksum",
        "wire/frame.py",
        "if zlib.crc32(payload, zlib.crc32(view[: _FIELDS.size])) != checksum:",
        "if zlib.crc32(payload, zlib.crc32(view[: _FIELDS.size])) != checksum and len(payload):",
        "property/test_wire.py golden",
    ),
    Bug(
        "fractions are cut off instead of rounded",
        "ops/select.py",
        "return round(fraction * size)",
        "return int(fraction * size)",
        "property sharing ../src/jwins/ops",
    ),
    Bug(
        "mixing weights use the smaller degree",
        "topology/graph.py",
        "1.0 / (1.0 + max(degree, degrees[j]))",
        "1.0 / (1.0 + min(degree, degrees[j]))",
        "contract/test_topologies.py property/test_topology.py",
    ),
    Bug(
        "a merge takes the parameters in place of what was sent",
        "sharing/sparse.py",
        "    own = params if state.own is None else state.own\n    return",
        "    own = params\n    return",
        "contract/test_sharing.py sharing property/test_algebra.py",
    ),
    Bug(
        "a replica's update does not say what it follows",
        "sharing/choco.py",
        "base=state.shared, check=hash_of(x_hat)",
        "base=None, check=hash_of(x_hat)",
        "node contract/test_sharing.py",
    ),
    Bug(
        "an update that comes late is merged with its weight",
        "node/state_machine.py",
        "if r == newest.get(j, self.round) and frame.roster_version == version:",
        "if frame.roster_version == version:",
        "node",
    ),
    Bug(
        "an asynchronous node adds the training to the model that it shared, not to the merged one",
        "node/state_machine.py",
        "        after = self.params + change",
        "        after = self.params",
        "engines/test_asynchronous.py",
    ),
    Bug(
        "the staleness of a sender is counted since the first merge",
        "node/state_machine.py",
        "        self._merged_rounds[sender] = (self.round, round)",
        "        self._merged_rounds.setdefault(sender, (self.round, round))",
        "engines/test_asynchronous.py",
    ),
    Bug(
        "bytes to several receivers count once",
        "engines/traffic_counter.py",
        "self._total += size_bytes * len(targets)",
        "self._total += size_bytes",
        "engines/test_driver.py",
    ),
    Bug(
        "a fault comes a round late",
        "engines/simulator/fault_script.py",
        "fault.round <= round:",
        "fault.round < round:",
        "engines/test_faults.py",
    ),
    Bug(
        "a message takes a tenth of its time on the uplink",
        "engines/simulator/network.py",
        "uplink, bits = self.uplinks[envelope.sender], 8 * envelope.packed.size_bytes",
        "uplink, bits = self.uplinks[envelope.sender], envelope.packed.size_bytes",
        "engines/test_driver.py",
    ),
    Bug(
        "gradients pile up from step to step",
        "training/loop.py",
        "                zero_grad_(optimizer)\n",
        "                pass\n",
        "training/test_trainer.py",
    ),
    Bug(
        "the first step of dampened momentum comes again and again",
        "training/loop.py",
        "started[row] = 1",
        "started[row] = 0",
        "training/test_trainer.py",
    ),
    Bug(
        "samples are dealt out in their order",
        "tasks/partition.py",
        "np.array_split(rng.permutation(num_samples), num_nodes)",
        "np.array_split(np.arange(num_samples), num_nodes)",
        "contract/test_partitioners.py property/test_partition.py",
    ),
    Bug(
        "rounds share their random numbers",
        "rng.py",
        'struct.pack("<qqq", seed, node, round)',
        'struct.pack("<qqq", seed, node, 0)',
        "test_rng.py",
    ),
    Bug(
        "a timeout may be shorter than the one that was set",
        "net/neighbour_timeout.py",
        "return max(self.timeout_s, min(own_s, most_s))",
        "return min(own_s, most_s)",
        "net/test_session.py net/test_faults.py",
    ),
    Bug(
        "an id is given to a second member",
        "net/roster.py",
        "& set(self.departed)):",
        "& set()):",
        "net/test_roster.py net/test_membership.py",
    ),
    Bug(
        "session: a frame of a later round is no evidence that its sender is ahead",
        "net/arrivals.py",
        "            known.ahead_from = round\n",
        "            pass\n",
    ),
    Bug(
        "session: a node that has never merged keeps its own model",
        "net/waiting.py",
        "if self._session.fresh:",
        "if False:",
    ),
    Bug(
        "session: settings of peers are not compared",
        "net/handshake.py",
        "if theirs and self.greeting else",
        "if False else",
    ),
    Bug(
        "session: wire formats of peers are not compared",
        "net/handshake.py",
        "if there[0] == here[0] and FORMAT not in names:",
        "if there[0] == here[0]:",
    ),
    Bug(
        "session: a limit that has passed is waited for again and again",
        "net/waiting.py",
        " for p in self._session.missing if not self._is_resolved(p)]",
        " for p in self._session.missing]",
    ),
    Bug(
        "session: start-up and downtime count as the time of a frame",
        "net/arrivals.py",
        "known.present_from = self._session.awake",
        "known.present_from = 0.0",
    ),
    Bug(
        "session: a key that is in use elsewhere is not reported",
        "net/session.py",
        '"key in use"',
        '"key"',
    ),
    Bug(
        "session: a Bye has another reason",
        "net/session.py",
        "reason[:200]",
        '"failed"',
    ),
    Bug(
        "session: frames of a sender wait without limit",
        "node/inbox.py",
        "if math.isinf(self._rules.inbox_bytes) or",
        "if math.isfinite(self._rules.inbox_bytes) or",
    ),
    Bug(
        "session: whoever is behind stays there",
        "net/waiting.py",
        "if target <= at:",
        "if True:",
    ),
    Bug(
        "session: one witness is enough",
        "net/waiting.py",
        "return 2 * len(ahead) > len(expected) and len(ahead) >= min(2, len(expected))",
        "return bool(ahead)",
    ),
    Bug(
        "session: any round is believed",
        "net/waiting.py",
        "round <= known.merged_in + possible",
        "round <= 2**40",
    ),
    Bug(
        "session: who fell behind together asks nobody for signed rounds",
        "net/waiting.py",
        "            self._session.witnesses.ask(passed)\n",
        "",
        "net/test_witnesses.py",
    ),
    Bug(
        "session: a signature of anybody counts as that of a member",
        "net/witnesses.py",
        "return self._signatures.verify(member, text, signed.signature)",
        "return True",
        "net/test_witnesses.py",
    ),
    Bug(
        "session: a node that has just skipped rounds is a witness",
        "net/witnesses.py",
        "if self._signatures is None or session.fresh or not session.settled:",
        "if self._signatures is None:",
        "net/test_witnesses.py",
    ),
    Bug(
        "session: a slow peer is never waited for again",
        "net/peer_session.py",
        "Signal.ON_TIME: State.ACTIVE,\n        Signal.READMITTED: State.ACTIVE",
        "Signal.ON_TIME: State.SLOW,\n        Signal.READMITTED: State.SLOW",
    ),
    Bug(
        "session: frames are not sent again to a peer that returns",
        "net/peer_session.py",
        "frame.sent = frame.counted = False",
        "pass",
    ),
    Bug(
        "session: a peer that disconnects is given up at once",
        "net/peer_session.py",
        "Signal.DISCONNECTED: State.LOST,\n    },\n    State.BEHIND",
        "Signal.DISCONNECTED: State.SUSPECT,\n    },\n    State.BEHIND",
    ),
    Bug(
        "session: a round merged with nobody is not reported",
        "net/rounds.py",
        '"merged with nobody"',
        '"merged"',
    ),
    Bug(
        "session: frames that a restarted node sends again do not count",
        "net/session.py",
        "f.purpose, False, f.counted and not f.sent)",
        "f.purpose, False, True)",
    ),
    Bug(
        "session: a model is sent in every round",
        "net/bootstrap.py",
        "at < known.provided_in + PROVIDE_EVERY",
        "at < known.provided_in",
    ),
    Bug(
        "session: garbage is not counted",
        "net/arrivals.py",
        "            self._session.refuse(peer, str(error))\n            return\n",
        "            return\n",
    ),
    Bug(
        "session: a removed member stays what it was",
        "net/session.py",
        "            self.apply(peer, Signal.REMOVED)\n",
        "            pass\n",
    ),
    Bug(
        "session: a provider does not know who joined",
        "net/session.py",
        "self.peers[peer].joined_later = True",
        "pass",
    ),
    Bug(
        "session: former neighbours are asked for a model",
        "net/waiting.py",
        "[peer for peer in ahead if peer in there] or connected or ahead",
        "ahead",
        "net/test_session.py",
    ),
    Bug(
        "session: older versions of the roster are forgotten",
        "net/roster_versions.py",
        "[version for version in self._every if version.from_round < from_round] + [added]",
        "[added]",
    ),
    Bug(
        "session: frames of another version of the roster have their weight",
        "node/state_machine.py",
        "if r == newest.get(j, self.round) and frame.roster_version == version:",
        "if r == newest.get(j, self.round):",
    ),
    Bug(
        "session: a frame for which the queue had no room is forgotten",
        "net/outbox.py",
        "            frame.sent = False\n        elif",
        "            pass\n        elif",
        "net/test_session.py",
    ),
    Bug(
        "session: a Hello for which the queue had no room is forgotten",
        "net/outbox.py",
        "known.hello_due = known.connected",
        "pass",
    ),
    Bug(
        "session: a wait ends at half of its limit",
        "net/waiting.py",
        "self.waited_s < limit_s - SOON_S",
        "self.waited_s < limit_s / 2",
    ),
    Bug(
        "session: skipped rounds are not counted",
        "net/waiting.py",
        "        self._session.skipped_rounds += target - at\n",
        "",
    ),
    Bug(
        "session: a loop over the rounds counts by itself",
        "net/peer.py",
        "        while self._next < count:\n            at = self._next\n",
        "        for at in range(self._next, count):\n",
        "net/test_peer.py net/test_own_loop.py",
    ),
    Bug(
        "session: training under way is waited for without limit",
        "net/driver.py",
        "job.result(SETTLE_S)",
        "job.result()",
        "net/test_driver.py",
    ),
    Bug(
        "runs that are not alike are compared",
        "compare/comparability.py",
        "if found.get(what) != expected[what] and not allowed:",
        "if found.get(what) != expected[what] and allowed:",
        "compare/test_compare.py",
    ),
    Bug(
        "any number of bytes is like that of the other variant",
        "compare/plan.py",
        "abs(sent / wanted - 1.0) <= SAME_BYTES",
        "abs(sent / wanted - 1.0) >= 0",
        "compare/test_tuning.py",
    ),
    Bug(
        "an interval is of single differences, not of their mean",
        "report/seed_groups.py",
        "/ (count - 1) / count)",
        "/ (count - 1))",
        "compare/test_tuning.py",
    ),
    Bug(
        "bundled tasks have the usual metrics only",
        "report/studies.py",
        "declared = {**USUAL_DIRECTIONS, **others, ",
        "declared = {**USUAL_DIRECTIONS, ",
        "report experiment/test_catalogue.py",
    ),
    Bug(
        "seeds that ended early count as measured",
        "report/summary_rows.py",
        "counted=sum(not record.ended_early for record in group.records)",
        "counted=len(group.records)",
        "compare/test_compare.py report",
    ),
    Bug(
        "a damaged checkpoint is read",
        "run_folder/checkpoint.py",
        "if match and not hashlib",
        "if False and not hashlib",
        "run_folder/test_checkpoint.py",
    ),
    Bug(
        "the last complete line of a log is cut in two",
        "run_folder/rows.py",
        'rfind(b"\\n") + 1',
        'rfind(b"\\n")',
        "run_folder/test_rows.py",
    ),
    Bug(
        "the model before training is not evaluated",
        "run/evaluation_plan.py",
        "frozenset({*range(0, run.rounds, run.eval_every)",
        "frozenset({*range(run.eval_every, run.rounds, run.eval_every)",
        "run engines/test_driver.py",
    ),
    Bug(
        "threads change the identity of a run",
        "experiment/experiment.py",
        'for key in ("threads", "checkpoint_every"',
        'for key in ("checkpoint_every"',
        "experiment/test_experiment.py",
    ),
    Bug(
        "missing data end with the exit code of a crash",
        "cli/app.py",
        "leave(_message(error), NO_DATA)",
        "leave(_message(error), FAILED)",
        "cli report/test_page.py",
    ),
)


def found_by(bug: Bug) -> str:
    """The first test that fails with a bug, or nothing."""
    with tempfile.TemporaryDirectory() as place:
        for path in ROOT.iterdir():
            if path.name in ("src", "tests"):
                shutil.copytree(path, Path(place) / path.name)
            elif not path.name.startswith("."):
                (Path(place) / path.name).symlink_to(path)
        path = Path(place) / "src" / "jwins" / bug.file
        text = path.read_text()
        assert text.count(bug.old) == 1, f"{bug.file} has {text.count(bug.old)} of {bug.old!r}"
        path.write_text(text.replace(bug.old, bug.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--tb=no"]
        command += [] if bug.tests == SCHEDULES else ["-m", "not slow"]
        command += [os.path.normpath(Path("tests") / name) for name in bug.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(Path(place) / "src")}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        return failed[1] if failed else ""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of a bug's name")
    options = parser.parse_args()
    missed = 0
    for bug in BUGS:
        if options.only in bug.name:
            test = found_by(bug)
            missed += not test
            print(f"{bug.file}: {bug.name}: {test or 'NOT FOUND'}", flush=True)
    print(f"{missed} not found")
    sys.exit(min(missed, 100))


if __name__ == "__main__":
    main()
