"""Bytes by directed edge have a file of their own; the last row of a run stays short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jwins
from jwins.errors import DataError
from jwins.run_folder import traffic
from jwins.run_folder.rows import Traffic, TrafficSplit

EDGES = [
    Traffic(0, 1, TrafficSplit(positions=1, values=2, header=3, keyframe=4, control=5)),
    Traffic(1, 0, TrafficSplit(values=10**12)),
]


def test_edges_come_back(tmp_path: Path) -> None:
    assert traffic.read(tmp_path) is None
    path = traffic.write(tmp_path, EDGES)
    assert traffic.read(tmp_path) == EDGES
    assert path.read_text() == (
        "source,target,positions,values,header,keyframe,control\n0,1,1,2,3,4,5\n1,0,0,1000000000000,0,0,0\n"
    )
    traffic.write(tmp_path, [])
    assert traffic.read(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "does not begin with source,target,"),
        ("from,to\n", "does not begin with source,target,"),
        ("HEAD\n0,1,1,2,3,4\n", r"line 2: not an edge \(expected 7 numbers, found 6\)"),
        ("HEAD\n0,1,1,2,3,4,5\n0,2,a,0,0,0,0\n", "line 3: not an edge"),
        ("HEAD\n7\n", "line 2: not an edge"),
    ],
)
def test_damaged_files_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    head = "source,target,positions,values,header,keyframe,control"
    (tmp_path / traffic.FILE).write_text(text.replace("HEAD", head))
    with pytest.raises(DataError, match=problem):
        traffic.read(tmp_path)


def test_the_end_row_of_a_dynamic_graph_holds_no_edges(tmp_path: Path) -> None:
    """Every pair of 12 nodes has exchanged something; the row that ends the log has none of it."""
    settings = ["nodes.count=12", "topology.dynamic=true", "run.rounds=12", "run.eval_samples=20"]
    settings += ["train.batching=loop"]
    result = jwins.simulate(
        jwins.load("digits", [*settings, f"run.folder={json.dumps(str(tmp_path / 'run'))}"])
    )
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert len(last) < 1000
    assert "traffic" not in json.loads(last)
    assert len(result.edges) > 100
    assert sum(edge["bytes_total"] for edge in result.edges) == result.rows[-1]["bytes_total"]
    link, node = result.bits_per_step or (0.0, 0.0)  # of four neighbours, to whom it sends and who send to it
    bits, steps = 8 * result.rows[-1]["bytes_total"] / 12, 12 * result.experiment.train.local_steps  # type: ignore[operator]
    assert node == pytest.approx(2 * bits / (result.record.start.dim * steps))
    assert node == pytest.approx(8 * link)


@pytest.mark.parametrize("setting", ["nodes.participation=0.5", "run.mode=async"])
def test_bits_per_local_step_are_unknown_where_nodes_train_in_different_rounds(
    setting: str, tmp_path: Path
) -> None:
    settings = ["nodes.count=4", "topology.kind=ring", "run.rounds=2", "run.eval_samples=20"]
    folder = f"run.folder={json.dumps(str(tmp_path / 'run'))}"
    result = jwins.simulate(jwins.load("digits", [*settings, setting, folder]))
    assert result.bits_per_step is None
