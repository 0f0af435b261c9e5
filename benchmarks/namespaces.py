"""Nodes in network namespaces with slow uplinks: real seconds per round against the simulator's virtual ones.

Every node is a `jwins node` in a namespace of its own, joined to the others by a pair of interfaces and a
bridge. A token bucket (`tc tbf`) on its side limits what it sends; what it receives is not limited, as in the
simulator. Latency is that of the machine, next to nothing, so the simulator is told 0.

What a round costs beside the uplink is found before, by the same nodes on the same bridge without the limit:
their seconds per round are the simulator's `compute.step_ms`. Then the same experiment runs with the limit, and
under the virtual clock, where frames leave one after another as those of a peer do. Both count from the first
evaluation after the start to the last, when the slowest node is there. The final models must be the same in all
bits, so both have sent the same.

Needs Linux, root, and `ip` and `tc` of iproute2; says so and ends where something is missing. From the root:

    python -m benchmarks.namespaces [--nodes 8] [--mbps 10] [--degree 4] [--width 1024] [--rounds 6]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwins
from benchmarks.report import table, verdict
from jwins.net.roster import Member, Roster, write_roster
from jwins.run_folder.record import Record

ROOT = Path(__file__).parent.parent
PORT = 7420
BURST = "32kb"
QUEUE = "200ms"
TIMEOUT_S = 120.0
"""Enough for all processes to start on two cores; nothing is ever late here."""
LONGEST_S = 1800.0
SHARINGS: dict[str, dict[str, Any]] = {"full": {"kind": "full"}, "jwins": {"kind": "jwins"}}
CALIBRATION_ROUNDS = 6
ROUNDS_PER_FULL_ROUND = 3
"""So many times the rounds of full sharing are measured of JWINS, whose rounds differ: fractions are drawn."""
MAX_ERROR = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--mbps", type=float, default=10.0, help="of each uplink")
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024, help="the model has about its square of parameters")
    parser.add_argument("--rounds", type=int, default=6, help="of full sharing; even")
    chosen = parser.parse_args()
    if problem := obstacle():
        print(f"skipped: {problem}")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: compare(
                Path(folder) / name,
                sharing,
                nodes=chosen.nodes,
                degree=chosen.degree,
                width=chosen.width,
                mbps=chosen.mbps,
                rounds=chosen.rounds * (1 if name == "full" else ROUNDS_PER_FULL_ROUND),
            )
            for name, sharing in SHARINGS.items()
        }
    report(found)


def obstacle() -> str:
    """Why this cannot run here, or ""."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} of iproute2 not found"
    try:
        with Site(1) as site:
            site.limit(1.0)
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}"
    return ""


# --- The site ---------------------------------------------------------------------------------------------


class Site:
    """A bridge and namespaces around it, which are gone afterwards; so are processes that were left in them.

    Args:
        nodes: how many namespaces, besides that of the bridge.
    """

    def __init__(self, nodes: int) -> None:
        self.nodes = range(nodes)
        self._prefix = f"jwins-{os.getpid()}"
        self._bridge = f"{self._prefix}-bridge"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Site:
        try:
            for name in (self._bridge, *map(self._name, self.nodes)):
                command("ip", "netns", "add", name)
            command("ip", "-n", self._bridge, "link", "add", "br0", "type", "bridge")
            command("ip", "-n", self._bridge, "link", "set", "br0", "up")
            for node in self.nodes:
                self._join(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self, node: int) -> None:
        name, port = self._name(node), f"port{node}"
        ends = ("eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", self._bridge)
        command("ip", "link", "add", *ends)
        command("ip", "-n", self._bridge, "link", "set", port, "master", "br0", "up")
        command("ip", "-n", name, "address", "add", f"{address(node)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            command("ip", "-n", name, "link", "set", device, "up")

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for name in (*map(self._name, self.nodes), self._bridge):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _name(self, node: int) -> str:
        return f"{self._prefix}-{node}"

    def limit(self, mbps: float) -> None:
        """Let no node send more."""
        for node in self.nodes:
            # Else the bucket drops packets of 64 kB whole, as no network card does, and connections stall.
            command("ip", "-n", self._name(node), "link", "set", "dev", "eth0", "gso_max_segs", "1")
            bucket = ("tbf", "rate", f"{mbps}mbit", "burst", BURST, "latency", QUEUE)
            command("tc", "-n", self._name(node), "qdisc", "add", "dev", "eth0", "root", *bucket)

    def start(self, node: int, arguments: Sequence[str], out: Path) -> subprocess.Popen[bytes]:
        """Start Python in the namespace of a node."""
        with out.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._name(node), sys.executable, *arguments],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return process


def address(node: int) -> str:
    """Of a node, in all sites alike: they do not see each other."""
    return f"10.77.0.{node + 1}"


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


# --- One algorithm ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Measurements of one algorithm.

    Attributes:
        calibrated_s: seconds per round without a limit.
        real_s: with it.
        virtual_s: of the simulator, with ``calibrated_s`` for its compute model.
        megabytes: sent per node and round.
        same: whether both ended with the same models.
    """

    calibrated_s: float
    real_s: float
    virtual_s: float
    megabytes: float
    same: bool

    @property
    def off(self) -> float:
        """Return the difference of virtual and real seconds, as a fraction of the real ones."""
        return self.virtual_s / self.real_s - 1.0


def compare(
    folder: Path,
    sharing: Mapping[str, Any],
    *,
    nodes: int,
    degree: int,
    width: int,
    mbps: float,
    rounds: int,
) -> Compared:
    """Calibrate, run for real, simulate."""

    def experiment(of: str, count: int, step_ms: float) -> jwins.Experiment:
        return jwins.Experiment(
            name="namespaces",
            task={"file": f"{ROOT / 'benchmarks' / '_wide.py'}:Wide", "options": {"width": width}},
            nodes={"count": nodes},
            topology={"kind": "regular", "degree": degree},
            train={"local_steps": 1, "batch_size": 1, "batching": "loop"},
            sharing=dict(sharing),
            links={"uplink_mbps": mbps, "latency_ms": 0.0, "sending": "in_turn"},
            compute={"step_ms": step_ms},
            run={
                "rounds": count,
                "eval_every": 2,
                "checkpoint_every": 10 * count,
                "threads": 1,
                "folder": folder / of,
            },
        )

    folder.mkdir(parents=True)
    with site(folder, nodes) as unlimited:
        calibrated_s = real_round_s(unlimited, experiment("unlimited", CALIBRATION_ROUNDS, 1.0))
    virtual = experiment("virtual", rounds, 1000.0 * calibrated_s)
    result = jwins.simulate(virtual)
    with site(folder, nodes) as limited:
        limited.limit(mbps)
        real = experiment("real", rounds, 1.0)
        real_s = real_round_s(limited, real)
    first, *_, last = result.record.evaluations[1:]
    traffic = last.traffic
    frames = traffic.positions + traffic.values + traffic.header + traffic.keyframe
    return Compared(
        calibrated_s,
        real_s,
        (last.time_s - first.time_s) / (last.round - first.round),
        frames / 1e6 / nodes / rounds,
        all(
            (real.folder / "nodes" / str(i) / "final" / f"node-{i}.safetensors").read_bytes()
            == (virtual.folder / "final" / f"node-{i}.safetensors").read_bytes()
            for i in range(nodes)
        ),
    )


@contextlib.contextmanager
def site(folder: Path, nodes: int) -> Iterator[Site]:
    """A site whose nodes have keys in ``folder/keys``, and the roster beside them."""
    keys = folder / "keys"
    shutil.rmtree(keys, ignore_errors=True)
    keys.mkdir()
    members = [Member.new(node, f"node-{node}", f"{address(node)}:{PORT}", keys) for node in range(nodes)]
    write_roster(Roster(members=tuple(members)), keys / "roster.toml")
    with Site(nodes) as made:
        yield made


def real_round_s(site: Site, experiment: jwins.Experiment) -> float:
    """Seconds of a round, of all after the first evaluation, when the slowest node is done with it."""
    folder, keys = experiment.folder, experiment.folder.parent / "keys"
    folder.mkdir()
    config = folder / "experiment.toml"
    config.write_text(experiment.to_toml(folder))
    processes = [
        site.start(
            node,
            [
                *("-m", "jwins", "node", str(config), "--as", f"node-{node}", "--quiet"),
                *("--roster", str(keys / "roster.toml"), "--key", str(keys / f"node-{node}.key")),
                *("--folder", str(folder / "nodes" / str(node)), "--neighbour-timeout", str(TIMEOUT_S)),
            ],
            folder / f"{node}.out",
        )
        for node in site.nodes
    ]
    until = time.monotonic() + LONGEST_S
    for node, process in zip(site.nodes, processes, strict=True):
        if process.wait(max(0.1, until - time.monotonic())):
            raise SystemExit(f"node {node} failed:\n{(folder / f'{node}.out').read_text()}")
    times = [completed(folder / "nodes" / str(node)) for node in site.nodes]
    at = sorted(times[0])[1:]
    ends = {r: max(found[r] for found in times) for r in at}
    return (ends[at[-1]] - ends[at[0]]) / (at[-1] - at[0])


def completed(folder: Path) -> dict[int, float]:
    """When a node had completed the rounds after which it was evaluated; seconds of the machine's clock."""
    began = next(line for line in read_lines(folder / "log.jsonl") if line["event"] == "started")
    start = datetime.datetime.fromisoformat(began["time"]).timestamp()
    return {row.round: start + row.time_s for row in Record.read(folder).evaluations}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- What came out ----------------------------------------------------------------------------------------


def report(found: Mapping[str, Compared]) -> None:
    rows = [
        [
            name,
            f"{one.megabytes:.2f}",
            f"{one.calibrated_s:.2f}",
            f"{one.real_s:.2f}",
            f"{one.virtual_s:.2f}",
            f"{100 * one.off:+.1f} %",
            "the same" if one.same else "DIFFERENT",
        ]
        for name, one in found.items()
    ]
    columns = [
        *("sharing", "MB sent per node and round", "s per round without limit", "real s per round"),
        *("virtual s per round", "virtual against real", "final models"),
    ]
    print(table(columns, rows))
    full, other = found["full"], found["jwins"]
    print(
        f"full sharing takes {full.real_s / other.real_s:.2f} times as long as JWINS, "
        f"{full.virtual_s / other.virtual_s:.2f} times on the virtual clock"
    )
    furthest = max(abs(one.off) for one in found.values())
    print(f"virtual against real: {100 * furthest:.1f} % apart at most: {verdict(furthest, at_most=MAX_ERROR)}")


if __name__ == "__main__":
    main()
