"""Made-up runs and studies, without any training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jwins.report.seed_groups import Group, Target
from jwins.report.studies import Study, StudyVariant
from jwins.run_folder.record import Record
from jwins.run_folder.rows import EndRow, EvalRow, Spread, StartRow, TrafficSplit

NODES = 4


def record(
    values: Sequence[float],
    *,
    seed: int = 1,
    metric: str = "accuracy",
    round_bytes: int = 1000,
    parts: Mapping[str, int] | None = None,
    folder: Path = Path("run"),
) -> Record:
    """A finished run: the metric at rounds 0, 10, 20 and so on, and so many bytes per node and round.

    Args:
        values: of the metric.
        seed: of the run.
        metric: name of the metric.
        round_bytes: sent by each node in each round.
        parts: what they carried, as whole numbers that say the proportion; None for values alone.
        folder: where the run lies.
    """
    shares = dict(parts or {"values": 1})
    rows = []
    for i, value in enumerate(values):
        total = 10 * i * round_bytes * NODES
        traffic = {part: total * portion // sum(shares.values()) for part, portion in shares.items()}
        spread = Spread(None if math.isnan(value) else value, 0.0, value, value)
        rows.append(
            EvalRow(
                round=10 * i,
                time_s=float(i),
                nodes=list(range(NODES)),
                metrics={metric: spread},
                per_node={metric: [value] * NODES},
                train_loss=1.0 / (1 + i),
                consensus_distance=0.1 * i,
                traffic=TrafficSplit(**traffic),
                samples=100,
            )
        )
    prints = {"model": "a", "partition": "b", "batches": "c", "evaluation": "d", "codec": "e"}
    start = StartRow("made up", "0" * 16, seed, NODES, 100, 2.0, {"jwins": "0"}, {}, prints, "loop")
    end = EndRow("finished", rows[-1].round, rows[-1].time_s, "", "f" * 64, {"total": 2.0, "training": 1.0})
    return Record(folder, start, tuple(rows), end)


def group(name: str, algorithm: str, records: Sequence[Record]) -> Group:
    """The runs of one variant, of which full sharing would have sent 2000 bytes per node and round."""
    return Group(name, algorithm, tuple(records), tuple(2000.0 * r.rounds for r in records))


TABLES: dict[str, Any] = {
    "name": "made up",
    "task": {"name": "digits", "partition": {"kind": "iid"}},
    "nodes": {"count": NODES},
    "topology": {"kind": "ring"},
    "train": {"local_steps": 1, "batch_size": 8, "optimizer": {"kind": "sgd", "lr": 0.1}},
    "wire": {"codec": "pco"},
    "links": {"uplink_mbps": 100, "latency_ms": 20},
    "run": {"rounds": 20, "seed": 1},
}


def study(
    groups: Sequence[Group],
    target: float = math.nan,
    *,
    metric: str = "accuracy",
    lower_is_better: bool = False,
    full: str | None = "full sharing",
    tables: Mapping[str, Any] = TABLES,
) -> Study:
    """A study of these variants."""
    return Study(
        "made up",
        tuple(StudyVariant(one, tables) for one in groups),
        Target(metric, target, lower_is_better, "so"),
        full if any(one.name == full for one in groups) else None,
    )
